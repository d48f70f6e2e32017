"""What a reader does with a report, done in headless Chromium.

Playwright drives it: it talks to any Chromium that is installed, without a driver of its own version beside
it, and tells of every request and every word on the console.
"""

import base64
import dataclasses
import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from playwright.sync_api import Browser, Locator, expect, sync_playwright
from playwright.sync_api import Page as Tab

from phreg.report.html import PALETTE, Chart, ImageCard, Line, Origin, Page, Patches, Picture, Report, Section
from phreg.report.html import write_report as write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, chromium-browser or google-chrome")

RED, BLUE, GREEN, YELLOW, PINK = (255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 255, 0), (255, 0, 255)
GRIDS = ((4, 6), (2, 3))
"""Rows and columns of the two models' patches: the second's are twice as long."""
OUTLIER = (1, 2)
"""Row and column of the first model's only outlier."""


def plain(colour: Sequence[int], shape: tuple[int, int] = (80, 120)) -> Picture:
    return Picture(np.full((*shape, 3), colour, dtype=np.uint8))


def patches(grid: tuple[int, int], seed: int) -> Patches:
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, (*grid, 5), dtype=np.int8)
    codes[0, 0] = 0  # such as a feature of length 0 gets
    outliers = np.zeros(grid, dtype=bool)
    if seed % 2 == 0:
        outliers[OUTLIER] = True
    return Patches(codes, np.arange(1, codes[..., 0].size + 1, dtype=np.float32).reshape(grid), outliers)


def chart(width: int = 1224) -> Chart:
    file = io.BytesIO()
    Image.new("RGB", (width, 400), "gray").save(file, format="png")
    return Chart(file.getvalue(), "Chart of nothing", "A grey area.")


def a_page(images: int = 2) -> Page:
    """A report whose every map has a colour of its own."""
    cards = [
        ImageCard(
            photo=plain((128, 128, 128)).pixels,
            maps={
                "norms": [plain(RED), plain(BLUE)],
                "features": [plain(GREEN), plain(YELLOW)],
                "attention of register 1": [None, plain(PINK)],
            },
            patches=[patches(grid, 2 * number + model) for model, grid in enumerate(GRIDS)],
            name="a-photograph-with-a-name-as-long-as-the-ones-that-cameras-and-data-sets-like-to-give.jpg",
        )
        for number in range(images)
    ]
    return Page(
        title="timm/vit_base_patch16_224.augreg_in21k_and_more_that_makes_a_name_long, before and after",
        verdict="2.0 % of tokens were artifacts; none are.",
        note="Measured on 2 images.",
        models=("before", "after"),
        lines=[
            Line("b rises, as it should", (2.0, 10.0), lower_is_better=False),
            Line("c does not exist", (None, 3.0), lower_is_better=False),
            Line("a falls, as it should not", (30, 1), lower_is_better=False),
        ],
        layers={"norms": "How long.", "features": "Which way.", "attention of register 1": "Where it looks."},
        images=cards,
        sections=[Section(title, [chart()], "Some words.") for title in ("Norms", "Where", "Cost")],
        origin=Origin("phreg inspect a --baseline b", {"size": "224"}, {"phreg": "0.1.0"}),
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write(path, a_page())
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)  # machines are shared
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


class Visit:
    """Opens pages, and notes what they ask for and complain about."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def __call__(self, source: Path | str, *, width: int = 1280, **settings) -> Tab:
        tab = self.browser.new_page(viewport={"width": width, "height": 800}, **settings)
        tab.on("request", lambda request: self.requests.append(request.url))
        tab.on("console", lambda message: self.complaints.append(message.text))
        tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        if isinstance(source, Path):
            tab.goto(source.as_uri())
        else:
            tab.set_content(source)
        return tab


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """After each test, nothing may have been fetched and nothing complained about."""
    visit = Visit(browser)
    yield visit
    for context in browser.contexts:
        context.close()
    assert visit.requests
    assert not [url for url in visit.requests if not url.startswith(("file:", "data:"))]
    assert visit.complaints == []


def seen(element: Locator, x: float, y: float = 0.9) -> tuple[int, ...]:
    """The colour at a share of an element's width and height, as it is on the screen."""
    picture = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
    return picture.getpixel((int(x * picture.width), int(y * picture.height)))


def drawn(canvas: Locator) -> np.ndarray:
    file = canvas.evaluate("canvas => canvas.toDataURL()").partition(",")[2]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def expected(shown: Patches, row: int, col: int) -> np.ndarray:
    """The similarity map that the page should draw, in the same arithmetic, so without any tolerance."""
    codes = shown.codes.astype(float)
    lengths = np.sqrt((codes**2).sum(-1))
    products = lengths * lengths[row, col]
    cosines = np.divide(codes @ codes[row, col], products, out=np.zeros_like(products), where=products > 0)
    shades = np.floor(255 * cosines.clip(0, 1) + 0.5).astype(int)
    colours = (colormaps[PALETTE](np.arange(256)) * 255).round()
    return colours[shades]


def assert_similarity(tab: Tab, row: int, col: int, image: int = 0) -> None:
    """Checks both models' maps; a patch of the second model covers two by two of the first's."""
    canvases = tab.locator(".image").nth(image).locator("canvas")
    for model, scale in enumerate((1, 2)):
        shown = a_page().images[image].patches[model]
        np.testing.assert_array_equal(drawn(canvases.nth(model)), expected(shown, row // scale, col // scale))


# -- the slider ----------------------------------------------------------------------------------------------


def test_the_slider_moves_with_the_mouse(visit: Visit, file: Path):
    stack = visit(file).locator(".stack").first
    assert (seen(stack, 0.4), seen(stack, 0.6)) == (RED, BLUE)
    box = stack.bounding_box()
    mouse, y = stack.page.mouse, box["y"] + 0.5 * box["height"]
    mouse.move(box["x"] + 0.5 * box["width"], y)
    mouse.down()
    mouse.move(box["x"] + 0.8 * box["width"], y, steps=4)
    mouse.up()
    assert (seen(stack, 0.6), seen(stack, 0.95)) == (RED, BLUE)


def test_the_slider_moves_with_the_keyboard_and_says_where_it_is(visit: Visit, file: Path):
    tab = visit(file)
    stack = tab.locator(".stack").first
    slider = tab.get_by_role("slider", name="Image 1: divider between two maps")
    slider.focus()
    for _ in range(30):
        tab.keyboard.press("ArrowLeft")
    assert (seen(stack, 0.1), seen(stack, 0.3)) == (RED, BLUE)
    expect(slider).to_have_attribute("aria-valuetext", "before on 20 %, after on the rest")
    # A divider that is moved by keys is seen to be the one.
    outline = stack.locator(".divider").evaluate("divider => getComputedStyle(divider).outlineStyle")
    assert outline == "solid"


def test_one_control_switches_the_layer_of_all_images(visit: Visit, file: Path):
    tab = visit(file)
    tab.get_by_role("radio", name="features").check()
    for stack in tab.locator(".stack").all():
        assert (seen(stack, 0.1), seen(stack, 0.9)) == (GREEN, YELLOW)
    expect(tab.get_by_text("Which way.")).to_be_visible()
    expect(tab.get_by_text("How long.")).to_be_hidden()
    tab.keyboard.press("ArrowLeft")
    assert seen(tab.locator(".stack").first, 0.1) == RED


def test_a_layer_that_one_model_has_is_shown_without_a_slider(visit: Visit, file: Path):
    tab = visit(file)
    tab.get_by_role("radio", name="attention of register 1").check()
    stack = tab.locator(".stack").first
    assert (seen(stack, 0.1), seen(stack, 0.5), seen(stack, 0.9)) == (PINK, PINK, PINK)
    expect(tab.get_by_role("slider")).to_have_count(0)
    assert tab.locator(".sides").first.inner_text().split() == ["after"]


def test_of_three_models_any_two_can_be_compared(visit: Visit, tmp_path: Path):
    page = a_page(1)
    (card,) = page.images
    maps = {name: [*pictures, plain(PINK)] for name, pictures in card.maps.items()}
    card = dataclasses.replace(card, maps=maps, patches=())
    lines = [Line("top-1", (0.8, 0.7, 0.9), lower_is_better=False)]
    page = dataclasses.replace(page, models=("one", "two", "three"), images=[card], lines=lines)
    write(tmp_path / "three.html", page)
    tab = visit(tmp_path / "three.html")
    stack = tab.locator(".stack")
    assert (seen(stack, 0.1), seen(stack, 0.9)) == (RED, BLUE)
    tab.get_by_label("left").select_option("three")
    assert (seen(stack, 0.1), seen(stack, 0.9)) == (PINK, BLUE)
    left, right = (tab.locator(".sides").get_by_text(name) for name in ("three", "two"))
    assert left.bounding_box()["x"] < right.bounding_box()["x"]
    expect(tab.locator(".sides").get_by_text("one")).to_be_hidden()
    assert tab.locator("tbody tr").inner_text().split() == [
        "top-1", "0.8", "0.7", "\N{MINUS SIGN}0.1", "worse", "0.9", "+0.1", "better",
    ]  # fmt: skip


def test_one_models_features_are_divided_from_those_averaged_over_views(visit: Visit, tmp_path: Path):
    page = a_page(1)
    (card,) = page.images
    card = dataclasses.replace(card, maps=card.maps | {"norms": [plain(RED), None]})
    lines = [Line("outlier rate", (0.02,))]
    page = dataclasses.replace(
        page, models=("one",), sides=("one", "averaged over views"), images=[card], lines=lines
    )
    write(tmp_path / "averaged.html", page)
    tab = visit(tmp_path / "averaged.html")
    stack = tab.locator(".stack")
    assert (seen(stack, 0.1), seen(stack, 0.9)) == (RED, RED)
    expect(tab.get_by_role("slider")).to_have_count(0)
    tab.get_by_role("radio", name="features").check()
    assert (seen(stack, 0.1), seen(stack, 0.9)) == (GREEN, YELLOW)
    assert tab.locator(".sides").inner_text().split("\n") == ["one", "averaged over views"]
    for number, canvas in enumerate(tab.locator("canvas").all()):
        place = [(1, 2), (0, 1)][number]  # the outlier, and the patch that holds its middle in a coarser grid
        np.testing.assert_array_equal(drawn(canvas), expected(card.patches[number], *place))
    expect(tab.get_by_role("status")).to_contain_text("one: norm")


def test_where_neither_side_has_a_map_the_page_says_so(visit: Visit, tmp_path: Path):
    page = a_page(1)
    (card,) = page.images
    maps = {name: [*pictures, None, None] for name, pictures in card.maps.items()}
    card = dataclasses.replace(card, maps=maps, patches=())
    page = dataclasses.replace(page, sides=("a", "b", "a averaged", "b averaged"), images=[card])
    write(tmp_path / "none.html", page)
    tab = visit(tmp_path / "none.html")
    said = "stack => getComputedStyle(stack, '::after').content"
    assert "no such map" not in tab.locator(".stack").evaluate(said)
    tab.get_by_label("left").select_option("a averaged")
    tab.get_by_label("right").select_option("b averaged")
    assert "no such map" in tab.locator(".stack").evaluate(said)


def test_one_model_has_its_maps_and_no_slider(visit: Visit, tmp_path: Path):
    page = a_page(1)
    (card,) = page.images
    maps = {name: pictures[:1] for name, pictures in card.maps.items() if pictures[0]}
    card = dataclasses.replace(card, maps=maps, patches=card.patches[:1])
    layers = {name: page.layers[name] for name in maps}
    lines = [Line("outlier rate", (0.02,))]
    page = dataclasses.replace(page, models=("vit",), images=[card], layers=layers, lines=lines)
    write(tmp_path / "one.html", page)
    tab = visit(tmp_path / "one.html")
    assert (seen(tab.locator(".stack"), 0.1), seen(tab.locator(".stack"), 0.9)) == (RED, RED)
    expect(tab.get_by_role("slider")).to_have_count(0)
    expect(tab.get_by_role("status")).to_have_text("Patch in row 2, column 3; norm 9, an outlier")


# -- similarity to a patch -----------------------------------------------------------------------------------


def test_it_opens_on_an_outlier_since_that_tells_most(visit: Visit, file: Path):
    assert_similarity(visit(file), *OUTLIER)


@pytest.mark.parametrize(
    "surface", range(4), ids=["photo", "slider", "similarity before", "similarity after"]
)
def test_pointing_at_a_patch_anywhere_shows_its_similarity_in_every_model(
    visit: Visit, file: Path, surface: int
):
    tab = visit(file)
    tab.locator(".image").first.locator(".surface").nth(surface).scroll_into_view_if_needed()
    box = tab.locator(".image").first.locator(".surface").nth(surface).bounding_box()
    # Row 2 of 4 and column 4 of 6.
    tab.mouse.move(box["x"] + 4.3 / 6 * box["width"], box["y"] + 2.4 / 4 * box["height"])
    assert_similarity(tab, 2, 4)
    assert_similarity(tab, *OUTLIER, image=1)
    expect(tab.get_by_role("status").first).to_have_text(
        "Patch in row 3, column 5; before: norm 17, no outlier; after: norm 6, no outlier"
    )


def test_arrow_keys_choose_a_patch_and_stop_at_the_edges(visit: Visit, file: Path):
    tab = visit(file)
    photo = tab.get_by_role("application", name="Photo of image 1")
    photo.focus()
    row, col = OUTLIER
    for key, move in (
        ("ArrowRight", (0, 1)),
        ("ArrowDown", (1, 0)),
        ("ArrowLeft", (0, -1)),
        ("ArrowUp", (-1, 0)),
    ):
        tab.keyboard.press(key)
        row, col = row + move[0], col + move[1]
        assert_similarity(tab, row, col)
    before = tab.evaluate("scrollY")
    for _ in range(10):
        tab.keyboard.press("ArrowDown")
    assert_similarity(tab, GRIDS[0][0] - 1, col)
    assert tab.evaluate("scrollY") == before
    expect(tab.get_by_role("status").first).to_contain_text("row 4, column 3")


def test_the_patch_of_a_feature_without_length_is_like_none(visit: Visit, file: Path):
    tab = visit(file)
    tab.get_by_role("application", name="Photo of image 1").focus()
    for key in ("ArrowUp", "ArrowLeft", "ArrowLeft"):
        tab.keyboard.press(key)
    assert_similarity(tab, 0, 0)


def test_a_finger_chooses_a_patch(visit: Visit, file: Path):
    tab = visit(file, width=360, has_touch=True, is_mobile=True)
    photo = tab.get_by_role("application", name="Photo of image 1")
    photo.scroll_into_view_if_needed()
    box = photo.bounding_box()
    photo.tap(position={"x": 5.5 / 6 * box["width"], "y": 0.5 / 4 * box["height"]})
    assert_similarity(tab, 0, 5)


def test_the_chosen_patch_is_framed(visit: Visit, file: Path):
    tab = visit(file)
    box = tab.locator(".surface").first.bounding_box()
    mark = tab.locator(".surface").first.locator(".mark").bounding_box()
    # Pixels; a browser rounds to 1/64 of one.
    assert mark["x"] - box["x"] == pytest.approx(OUTLIER[1] / 6 * box["width"], abs=0.1)
    assert mark["y"] - box["y"] == pytest.approx(OUTLIER[0] / 4 * box["height"], abs=0.1)
    assert mark["width"] == pytest.approx(box["width"] / 6, abs=0.1)


# -- the table -----------------------------------------------------------------------------------------------


def test_a_column_sorts_up_then_down_then_not(visit: Visit, file: Path):
    tab = visit(file)
    heading = tab.get_by_role("columnheader", name="before")

    def state() -> tuple[str, str | None]:
        return "".join(row[0] for row in tab.locator("tbody th").all_inner_texts()), heading.get_attribute(
            "aria-sort"
        )

    assert state() == ("bca", "none")
    button = heading.get_by_role("button")
    button.click()
    assert state() == ("bac", "ascending")
    button.press("Enter")
    assert state() == ("abc", "descending")  # what does not exist stays last
    tab.get_by_role("button", name="change").click()
    assert state() == ("abc", "none")  # -29, +8, none
    tab.get_by_role("button", name="figure").click()
    tab.get_by_role("button", name="figure").click()
    assert state()[0] == "cba"
    tab.get_by_role("button", name="figure").click()
    assert state() == ("bca", "none")


# -- everybody's page ----------------------------------------------------------------------------------------


def test_it_is_readable_in_the_light_and_in_the_dark(visit: Visit, file: Path):
    papers = []
    for scheme in ("light", "dark"):
        tab = visit(file, color_scheme=scheme)

        def colour(selector: str, property: str, tab: Tab = tab) -> np.ndarray:
            script = "(element, property) => getComputedStyle(element)[property].match(/\\d+/g).map(Number)"
            return np.array(tab.locator(selector).first.evaluate(script, property)[:3])

        papers.append(luminance(colour("body", "backgroundColor")))
        for selector in (
            "body",
            "h1",
            ".verdict",
            ".note",
            "figcaption",
            "thead button",
            ".better",
            ".worse",
            "footer",
        ):
            light, dark = sorted((papers[-1], luminance(colour(selector, "color"))), reverse=True)
            # What WCAG 2 asks of small text (level AA).
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, selector)
    assert papers[0] > 0.9
    assert papers[1] < 0.05


def luminance(colour: np.ndarray) -> float:
    """Relative luminance, from 0 to 1, as WCAG 2 defines it."""
    shares = colour / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("width", [360, 768])
def test_a_narrow_page_does_not_scroll_sideways(visit: Visit, file: Path, width: int):
    tab = visit(file, width=width)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # What is too wide scrolls by itself, and can be reached by keyboard to do so.
    for box in tab.locator(".scroll").all():
        wide = box.evaluate("box => box.scrollWidth > box.clientWidth")
        assert box.get_attribute("tabindex") == ("0" if wide else None)


def test_everything_that_can_be_used_or_looked_at_has_a_name(visit: Visit, file: Path):
    tab = visit(file)
    tree = tab.context.new_cdp_session(tab).send("Accessibility.getFullAXTree")
    roles = {
        "application",
        "button",
        "columnheader",
        "group",
        "image",
        "link",
        "navigation",
        "radio",
        "region",
        "slider",
    }
    found = [
        (node["role"]["value"], node["name"]["value"])
        for node in tree["nodes"]
        if not node["ignored"] and node["role"]["value"] in roles
    ]
    assert {role for role, _ in found} == roles
    assert [role for role, name in found if not name.strip()] == []
    # One image is told from another, and one model's from the other's.
    pictures = [
        name for role, name in found if role in ("image", "slider", "application") and "hart" not in name
    ]
    assert len(set(pictures)) == len(pictures)


def test_the_tab_key_reaches_every_control(visit: Visit, file: Path):
    tab = visit(file)
    reached = []
    for _ in range(30):
        tab.keyboard.press("Tab")
        reached.append(tab.evaluate("document.activeElement.tagName + (document.activeElement.type ?? '')"))
    assert {"A", "BUTTONbutton", "INPUTradio", "DIV", "INPUTrange"} <= set(reached)


def test_without_scripts_the_first_maps_are_side_by_side_and_nothing_is_offered_that_does_not_work(
    visit: Visit, file: Path
):
    tab = visit(file, java_script_enabled=False)
    stack = tab.locator(".stack").first
    assert (seen(stack, 0.25), seen(stack, 0.75)) == (RED, BLUE)
    expect(tab.get_by_text("With scripts allowed").first).to_be_visible()
    for hidden in ("slider", "radio"):
        expect(tab.get_by_role(hidden)).to_have_count(0)
    for hidden in ("canvas", "#pointing"):
        expect(tab.locator(hidden).first).to_be_hidden()


def test_the_page_lets_nothing_else_in(browser: Browser, file: Path):
    tab = browser.new_page()
    tab.goto(file.as_uri())
    blocked = tab.evaluate("""async () => {
      const blocked = [];
      document.addEventListener("securitypolicyviolation", (event) => blocked.push(event.effectiveDirective));
      const script = document.createElement("script");
      script.textContent = "document.title = 'taken'";
      const style = document.createElement("style");
      style.textContent = "body { display: none }";
      const image = document.createElement("img");
      image.src = "https://localhost:9/tracker.png";
      document.body.append(script, style, image);
      await fetch("https://localhost:9/").catch(() => {});
      await new Promise((resolve) => setTimeout(resolve, 100));
      return blocked.sort();
    }""")
    assert blocked == ["connect-src", "img-src", "script-src-elem", "style-src-elem"]
    assert tab.title() != "taken"
    tab.context.close()


def test_a_notebook_shows_the_page_in_its_cell(visit: Visit):
    tab = visit(f"<main>{Report.of(a_page())._repr_html_()}</main>")
    frame = tab.frame_locator("iframe")
    expect(frame.locator(".verdict")).to_have_text(a_page().verdict)
    expect(frame.get_by_role("status").first).to_contain_text("row 2, column 3")
    canvas = frame.locator("canvas").first
    np.testing.assert_array_equal(drawn(canvas), expected(a_page().images[0].patches[0], *OUTLIER))
    # Sandboxed: the frame cannot reach the notebook around it.
    reach = "() => { try { return parent.document.title } catch (error) { return error.name } }"
    assert tab.frames[1].evaluate(reach) == "SecurityError"
    visit.requests.append(f"data:{tab.url}")  # a page that was never at any address asks for nothing


def test_eight_images_of_two_models_stay_under_ten_megabytes_and_open_fast(visit: Visit, tmp_path: Path):
    random = np.random.default_rng(0)

    def noise() -> Picture:  # what compresses worst, in squares of 7 pixels as maps are drawn
        return Picture(random.integers(0, 256, (37, 37, 3), dtype=np.uint8).repeat(7, 0).repeat(7, 1))

    names = ["norms", "features", "first component", "attention of CLS"]
    cards = [
        ImageCard(
            photo=random.integers(0, 256, (518, 518, 3), dtype=np.uint8),
            maps={name: [noise(), noise()] for name in names},
            patches=[Patches(random.integers(-127, 128, (37, 37, 128), dtype=np.int8)) for _ in range(2)],
        )
        for _ in range(8)
    ]
    page = dataclasses.replace(a_page(), images=cards, layers=dict.fromkeys(names, "."))
    write(tmp_path / "large.html", page)
    assert (tmp_path / "large.html").stat().st_size < 10e6
    expect(visit(tmp_path / "large.html").get_by_role("status").last).to_have_text(
        "Patch in row 19, column 19"
    )
