import base64
import hashlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import CORNERS, Planted, pictures

from phreg.analysis.norms import outliers
from phreg.evaluation.consistency import agreement, drift
from phreg.evaluation.retrofit import Comparison
from phreg.report.html import (
    MAX_SHOWN,
    ImageCard,
    Line,
    Origin,
    Page,
    Picture,
    Report,
    Section,
    comparison_page,
    inspection_page,
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


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    reports = tuple(outliers(Planted(pushes), [pictures()]) for pushes in ({2: (CORNERS, 100.0)}, {}))
    features = torch.randn(8, 8, 8, 16, generator=torch.Generator().manual_seed(0))
    pooled = features.mean(dim=(1, 2))
    return Comparison(
        images=12,
        held_out=True,
        reference="the original averaged over 40 views",
        norms=reports,
        agreement=(agreement(features, features + 1), agreement(features, features)),
        drift=drift(pooled + 0.1, pooled),
        shown=(features, features + 0.1),
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "report.html"


def read(path: Path, page: Page) -> Reading:
    write_report(path, page)
    reading = Reading(path.read_text(encoding="utf-8"))
    assert reading.open == []
    return reading


def inspected(title: str = "a model", count: int = 2) -> Page:
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures(20)], show=20)
    return inspection_page(title, report, photos(count), torch.randn(20, 8, 8, 16))


def test_the_verdict_comes_first(path: Path):
    page = inspected()
    texts = read(path, page).texts
    shown = [(tag, text) for tag, text in texts if tag not in ("title", "style", "script")]
    assert shown[:2] == [("h1", "a model"), ("p", page.verdict)]


def test_a_page_fetches_nothing_and_runs_only_what_its_policy_names(path: Path, comparison: Comparison):
    reading = read(path, comparison_page("a model", comparison, photos(2)))
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


def test_every_picture_says_what_it_shows(path: Path, comparison: Comparison):
    images = read(path, comparison_page("a model", comparison, photos(2))).all("img")
    # Per image: photo, norms and features before and after; then two charts.
    assert len(images) == 2 * 5 + 2
    assert all(len(image["alt"] or "") > 10 for image in images)
    assert len({image["alt"] for image in images}) == len(images)


def test_maps_and_charts_can_be_read_back_and_photographs_cannot(path: Path, comparison: Comparison):
    write_report(path, comparison_page("a model", comparison, photos(2)))
    found = read_pictures(path)
    assert [alt.partition(":")[0] for alt, _ in found] == [
        *(
            f"{layer} of image {n}, {side}"
            for n in (1, 2)
            for layer in ("norms", "features")
            for side in SIDES
        ),
        "Chart of norms per block before and after",
        "Map of the positions of outliers before and after",
    ]
    assert all(content.startswith(b"\x89PNG") for _, content in found)


def test_whatever_a_name_holds_is_shown_as_text(path: Path):
    card = ImageCard(photos(1)[0], {HOSTILE: [Picture(photos(1)[0], HOSTILE)] * 2}, name=HOSTILE)
    page = Page(
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
    reading = read(path, page)
    assert len(reading.all("script")) == 1
    assert [tag for tag, text in reading.texts if text == HOSTILE] == [
        *("title", "h1", "p", "p"),  # title, verdict, note
        *("span", "span", "th"),  # the table: two models, a line
        *("p", "span", "span", "span"),  # an image: the layer's caption, the name, two sides
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
    page = Page("t", "v", models=SIDES, lines=lines)
    assert read(path, page).cells == [
        ["figure", "before", "after", "change"],
        ["falls, as it should", "0.02", "0.001", MINUS + "0.019 better"],
        ["falls, as it should not", "1", "0.9", MINUS + "0.1 worse"],
        ["rises, as it should", "0.5", "0.6", "+0.1 better"],
        ["stays, to four digits", "0.1235", "0.1235", "same"],
        ["is neither good nor bad", "7", "5", MINUS + "2"],
        ["is not there", "none", "0.5"],
    ]


def test_a_page_about_one_model_has_no_after(path: Path):
    reading = read(path, inspected())
    assert reading.cells[0] == ["figure", "value"]
    assert all(len(cells) == 2 for cells in reading.cells)
    assert reading.cells[1] == ["outlier rate, last block (share of patch tokens)", "0.0625"]
    assert not any("after" in (image["alt"] or "") for image in reading.all("img"))


def test_a_comparison_page_tells_both_outlier_rates(comparison: Comparison, path: Path):
    reading = read(path, comparison_page("a model", comparison, photos(1)))
    (sentence,) = [text for _, text in reading.texts if text.startswith("Artifacts went from 6.2 % to 0.0 %")]
    assert "the global output keeps a cosine of " in sentence
    assert "Measured on 12 images not trained on." in [text for _, text in reading.texts]
    assert reading.cells[1][1:] == ["0.0625", "0", MINUS + "0.0625 better"]


def test_a_page_stays_small_however_many_and_large_the_photos(path: Path):
    # Noise is what compresses worst.
    page = inspection_page(
        "t", outliers(Planted(), [pictures(20)], show=20), photos(20, side=600), torch.randn(20, 8, 8, 16)
    )
    reading = read(path, page)
    assert len(reading.all("img")) == 3 * MAX_SHOWN + 2
    assert path.stat().st_size < 5e6


def test_no_more_images_are_shown_than_there_are_maps_of(path: Path):
    report = outliers(Planted(), [pictures()], show=3)
    page = inspection_page("t", report, photos(6), torch.randn(6, 8, 8, 16))
    assert len(page.images) == 3


def test_tables_name_their_rows_and_columns(path: Path):
    scopes = [cell.get("scope") for cell in read(path, inspected()).all("th")]
    assert scopes.count("col") == 2
    assert scopes.count("row") == len(scopes) - 2


def test_the_page_suits_dark_screens_and_narrow_ones(path: Path):
    reading = read(path, inspected())
    assert "prefers-color-scheme: dark" in path.read_text(encoding="utf-8")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in reading.all("meta")


def test_a_report_replaces_the_one_before_and_leaves_nothing_else(path: Path):
    path.write_text("old")
    write_report(path, inspected())
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(path.parent.iterdir()) == [path]


def test_a_report_shows_itself_in_a_notebook_from_a_frame_that_it_cannot_leave():
    report = Report.of(inspected(title='a "model"'))
    reading = Reading(report._repr_html_())
    (frame,) = reading.all("iframe")
    assert frame["srcdoc"] == report.html
    assert frame["title"] == 'a "model"'
    assert frame["sandbox"] == "allow-scripts"
    assert len(repr(report)) < 100


def test_short_codes_keep_the_cosines_of_features(comparison: Comparison):
    features = comparison.shown[0][0].flatten(0, 1)
    codes = torch.from_numpy(comparison_page("t", comparison, photos(1)).images[0].patches[0].codes)
    kept = torch.nn.functional.normalize(codes.flatten(0, 1).float(), dim=-1)
    truth = torch.nn.functional.normalize(features, dim=-1)
    # As many channels as the features have, each rounded to 1/127 of the largest: half a step in sixteen.
    assert (kept @ kept.T - truth @ truth.T).abs().max() < 0.02
