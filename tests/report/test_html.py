import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from phreg.report.canvas import png
from phreg.report.html import (
    MAX_SHOWN,
    Chart,
    ImageCard,
    Line,
    Origin,
    Page,
    Patches,
    Picture,
    Report,
    Section,
    read_pictures,
    write_report,
)

VOID = {"meta", "img", "br", "link", "input"}
SIDES = ("before", "after")
MINUS = "\N{MINUS SIGN}"
HOSTILE = "<script>alert('x')</script> & \"co\""


class Reading(HTMLParser):
    """What a browser would make of a page: elements in order, text, and whether every element was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[list[str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))
            if self.open[-1] in ("td", "th") or self.open[-2:] == ["button", "span"]:
                self.cells[-1].append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def photos(count: int, side: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def page(title: str = "a model", models: Sequence[str] = SIDES, count: int = 2, side: int = 32) -> Page:
    """A page of noise, which compresses worst: maps of every model, one drawn over the photo, two charts."""
    pixels = photos(count, side)
    codes = np.random.default_rng(1).integers(-127, 128, (4, 4, 8), dtype=np.int8)
    cards = [
        ImageCard(
            photo=photo,
            maps={
                "norms": [Picture(photo, "1 to 2") for _ in models],
                "features": [Picture(photo) for _ in models],
                "text: a cat": [Picture(photo, photographic=True), *(None for _ in models[1:])],
            },
            patches=[Patches(codes) for _ in models],
        )
        for photo in pixels
    ]
    charts = [Chart(png(Figure()), f"Chart of {what}", "As it is.") for what in ("norms", "cost")]
    return Page(
        title=title,
        verdict="None of it is true.",
        note="Measured on nothing.",
        models=models,
        lines=[Line("outlier rate", [0.0625] * len(models), lower_is_better=True)],
        layers={name: f"About {name}." for name in ("norms", "features", "text: a cat")},
        images=cards,
        sections=[Section(chart.alt, [chart]) for chart in charts],
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def read(path: Path, page: Page) -> Reading:
    write_report(path, page)
    reading = Reading(path.read_text(encoding="utf-8"))
    assert reading.open == []
    return reading


def test_the_verdict_comes_first(path: Path):
    written = page()
    texts = read(path, written).texts
    shown = [(tag, text) for tag, text in texts if tag not in ("title", "style", "script")]
    assert shown[:2] == [("h1", "a model"), ("p", written.verdict)]


def test_a_page_fetches_nothing_and_runs_only_what_its_policy_names(path: Path):
    reading = read(path, page())
    text = path.read_text(encoding="utf-8")
    assert all(image["src"].startswith("data:image/") for image in reading.all("img"))
    assert not reading.all("link") + reading.all("iframe")
    for word in ("http:", "https:", "url(", "@import", " onclick", ' style="'):
        assert word not in text
    (policy,) = [meta["content"] for meta in reading.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        ((content,),) = [text.split(f"<{tag}>")[1].split(f"</{tag}>")[:1]]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_picture_says_what_it_shows(path: Path):
    images = read(path, page()).all("img")
    # Per image: the photo, norms and features before and after, and a text; then two charts.
    assert len(images) == 2 * 6 + 2
    assert all(len(image["alt"] or "") > 10 for image in images)
    assert len({image["alt"] for image in images}) == len(images)


def test_maps_may_be_of_more_than_the_models_and_the_table_is_not(path: Path):
    written = dataclasses.replace(page(), models=("a",), sides=SIDES, lines=[Line("rate", [0.5])])
    reading = read(path, written)
    names = [image["alt"] for image in reading.all("img")]
    assert "norms of image 1, after: 1 to 2" in names
    assert [cells for cells in reading.cells if cells] == [["figure", "value"], ["rate", "0.5"]]
    assert len([box for box in reading.all("input") if box["type"] == "range"]) == 2, "one divider an image"


def test_a_section_may_have_a_table_of_its_own(path: Path):
    sections = [Section("Views", [], "Some words.", [Line("headroom", [0.25, 0.125], lower_is_better=True)])]
    reading = read(path, dataclasses.replace(page(), sections=sections))
    assert reading.cells[-1] == ["headroom", "0.25", "0.125", f"{MINUS}0.125 better"]
    assert len(reading.all("table")) == 2
    labels = [box["aria-labelledby"] for box in reading.all("div") if box.get("class") == "scroll"]
    assert labels == ["figures", "section-1"]
    assert ("p", "Some words.") in reading.texts


def test_maps_and_charts_can_be_read_back_and_neither_photographs_nor_what_is_drawn_over_them(path: Path):
    written = page()
    write_report(path, written)
    found = read_pictures(path)
    assert [alt for alt, _ in found] == [
        *(
            f"{layer} of image {n}, {side}{reading}"
            for n in (1, 2)
            for layer, reading in (("norms", ": 1 to 2"), ("features", ""))
            for side in SIDES
        ),
        "Chart of norms",
        "Chart of cost",
    ]
    assert found[0][1] == png(written.images[0].maps["norms"][0].pixels)
    assert found[-1][1] == written.sections[-1].charts[0].png


def test_whatever_a_name_holds_is_shown_as_text(path: Path):
    card = ImageCard(photos(1)[0], {HOSTILE: [Picture(photos(1)[0], HOSTILE)] * 2}, name=HOSTILE)
    hostile = Page(
        title=HOSTILE,
        verdict=HOSTILE,
        note=HOSTILE,
        models=(HOSTILE, HOSTILE),
        lines=[Line(HOSTILE, (1.0, 2.0))],
        layers={HOSTILE: HOSTILE},
        images=[card],
        sections=[Section(HOSTILE, [], HOSTILE)],
        origin=Origin(HOSTILE, {HOSTILE: HOSTILE}, {HOSTILE: "1"}),
    )
    reading = read(path, hostile)
    assert len(reading.all("script")) == 1
    assert [tag for tag, text in reading.texts if text == HOSTILE] == [
        *("title", "h1", "p", "p"),  # title, verdict, note
        *("p", "span", "span", "span"),  # an image: the layer's caption, the name, two sides
        *("span", "span", "th"),  # the table: two models, a line
        *("h2", "p"),
        *("code", "dt", "dd"),
    ]


def test_a_comparison_says_by_how_much_and_what_became_better_and_what_worse(path: Path):
    lines = [
        Line("falls, as it should", (0.02, 0.001), lower_is_better=True),
        Line("falls, as it should not", (1.0, 0.9), lower_is_better=False),
        Line("rises, as it should", (0.5, 0.6), lower_is_better=False),
        Line("stays, to four digits", (0.123456, 0.123457), lower_is_better=False),
        Line("is neither good nor bad", (7, 5)),
        Line("is not there", (None, 0.5), lower_is_better=False),
    ]
    assert read(path, Page("t", "v", models=SIDES, lines=lines)).cells == [
        ["figure", "before", "after", "change"],
        ["falls, as it should", "0.02", "0.001", MINUS + "0.019 better"],
        ["falls, as it should not", "1", "0.9", MINUS + "0.1 worse"],
        ["rises, as it should", "0.5", "0.6", "+0.1 better"],
        ["stays, to four digits", "0.1235", "0.1235", "same"],
        ["is neither good nor bad", "7", "5", MINUS + "2"],
        ["is not there", "none", "0.5"],
    ]


def test_a_page_about_one_model_has_no_after(path: Path):
    reading = read(path, page(models=("vit",)))
    assert reading.cells == [["figure", "value"], ["outlier rate", "0.0625"]]
    assert not any("after" in (image["alt"] or "") for image in reading.all("img"))


def test_a_page_stays_small_however_large_the_photos(path: Path):
    small, large = page(count=MAX_SHOWN), page(count=MAX_SHOWN, side=600)
    # Maps are one flat square a patch, and small by themselves.
    cards = [ImageCard(one.photo, other.maps) for one, other in zip(large.images, small.images, strict=True)]
    reading = read(path, Page("t", "v", models=SIDES, layers=small.layers, images=cards))
    assert len(reading.all("img")) == 6 * MAX_SHOWN
    assert path.stat().st_size < 5e6


def test_tables_name_their_rows_and_columns(path: Path):
    scopes = [cell.get("scope") for cell in read(path, page(models=("vit",))).all("th")]
    assert scopes.count("col") == 2
    assert scopes.count("row") == len(scopes) - 2


def test_the_page_suits_dark_screens_and_narrow_ones(path: Path):
    reading = read(path, page())
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reading.all("meta")


def test_a_report_replaces_the_one_before_and_leaves_nothing_else(path: Path):
    path.write_text("old")
    write_report(path, page())
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def test_a_report_shows_itself_in_a_notebook_from_a_frame_that_it_cannot_leave():
    report = Report.of(page(title='a "model"'))
    reading = Reading(report._repr_html_())
    (frame,) = reading.all("iframe")
    assert frame["srcdoc"] == report.html
    assert frame["title"] == 'a "model"'
    assert frame["sandbox"] == "allow-scripts"
    assert len(repr(report)) < 100
