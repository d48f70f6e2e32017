"""Writes the report page: one file to open by double click, with nothing to fetch.

A page is plain data: strings, numbers and 8-bit arrays. What is drawn and measured is done elsewhere; here it
becomes a file. The page opens with its verdict, then the images, then the table, then the charts. A small
script (viewer.js) moves the slider, switches layers, sorts the table, and works out how similar an image's
patches are to the one pointed at, from short int8 codes of their features. The page's policy allows that
script and its style sheet, by their hashes, the pictures it holds, and nothing else.

    page.html.j2, style.css, viewer.js ──┐
    Page ────────────────────────────────┴──► Report ──► report.html, or a notebook's cell
"""

import base64
import hashlib
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int8, UInt8
from jinja2 import Environment, StrictUndefined
from matplotlib import colormaps
from PIL import Image

from phreg.evaluation.record import versions
from phreg.report.canvas import png
from phreg.storage import write_text, writing

MAX_SHOWN = 12
"""Images on a page, at most, so that it stays small."""

PHOTO_SIDE = 448
"""Pixels of a photo's longer side on the page, at most."""

PALETTE = "viridis"
"""Colours of similarity maps: cosine 0 or less is dark, 1 is bright."""

CHART_SCALE = 2
"""Pixels of a chart for each pixel of the page, for sharp screens."""

Photo = UInt8[np.ndarray, "_height _width 3"]


# --- What a page shows ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        name: What was measured.
        values: The figure of each model; None where it does not exist.
        lower_is_better: None where neither is better.
    """

    name: str
    values: Sequence[float | int | None]
    lower_is_better: bool | None = None

    def change(self, model: int) -> float | int | None:
        """How much a model's figure is above the first model's."""
        first, other = self.values[0], self.values[model]
        return None if first is None or other is None else other - first

    def judgement(self, model: int) -> Literal["better", "worse", "same", ""]:
        """Whether a model's figure is better than the first one's, as far as the table's digits tell."""
        change = self.change(model)
        if change is None:
            return ""
        if _number(self.values[model]) == _number(self.values[0]):
            return "same"
        if self.lower_is_better is None:
            return ""
        return "better" if (change < 0) == self.lower_is_better else "worse"


@dataclass(frozen=True, eq=False)
class Picture:
    """A map of an image's patches, as one model sees them.

    Attributes:
        pixels: The map.
        reading: How to read it, where the layer's caption does not say: "3.2 (dark) to 510 (bright)".
        photographic: Whether the photo shows in it.
    """

    pixels: Photo
    reading: str = ""
    photographic: bool = False


@dataclass(frozen=True, eq=False)
class Patches:
    """What the page can tell of an image's patches in one model.

    Attributes:
        codes: Their features, shortened: the cosine of two codes is about that of the two features.
        norms: Their norms, where known.
        outliers: Whether each is an outlier, where known.
    """

    codes: Int8[np.ndarray, "rows cols channels"]
    norms: Float[np.ndarray, "rows cols"] | None = None
    outliers: Bool[np.ndarray, "rows cols"] | None = None


@dataclass(frozen=True, eq=False)
class ImageCard:
    """An image, and what each model makes of it.

    Attributes:
        photo: The image, as the models see it.
        maps: By name of the layer, the picture of each side of the page; None where a side has none.
        patches: For each side, what pointing at a patch shows; empty where nothing is known.
        name: What the image is called.
    """

    photo: Photo
    maps: Mapping[str, Sequence[Picture | None]]
    patches: Sequence[Patches] = ()
    name: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        png: The file, `CHART_SCALE` pixels for each of the page.
        alt: What there is to see, for those who cannot.
        caption: How to read it.
        name: What its file is called, where it gets one of its own.
    """

    png: bytes = field(repr=False)
    alt: str
    caption: str
    name: str = ""


@dataclass(frozen=True)
class Section:
    """Charts under a heading, and before them a text and a table."""

    title: str
    charts: Sequence[Chart]
    text: str = ""
    lines: Sequence[Line] = ()


@dataclass(frozen=True)
class Origin:
    """Where a report comes from, so that it can be made again.

    Attributes:
        command: What was typed.
        settings: What was set.
        versions: Version of each package.
    """

    command: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, command: str, settings: Mapping[str, Any]) -> "Origin":
        """Describes a command of phreg's, by the settings that are not None and the versions at hand.

        Of paths of this disk the last part is told: a report is there to be shown around.
        """
        given = {name: str(value) for name, value in settings.items() if value is not None}
        given = {name: Path(text).name if Path(text).is_absolute() else text for name, text in given.items()}
        return cls(f"phreg {command}", given, versions())


UNKNOWN = Origin()
"""Of a report that does not say where it comes from."""


@dataclass(frozen=True, eq=False)
class Page:
    """What a report page shows, top to bottom.

    Attributes:
        title: What was looked at.
        verdict: The outcome, in a sentence or two.
        note: What it was measured on.
        models: Names of the models; the first is what the others are compared with.
        sides: What the maps of an image are of, where that is more than the models: the models, and others.
        lines: The table.
        layers: Caption of each layer of maps, by the name that `ImageCard.maps` has it under.
        images: The images.
        sections: The charts.
        origin: Where the report comes from.
    """

    title: str
    verdict: str
    note: str = ""
    models: Sequence[str] = ("model",)
    sides: Sequence[str] = ()
    lines: Sequence[Line] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    images: Sequence[ImageCard] = ()
    sections: Sequence[Section] = ()
    origin: Origin = UNKNOWN


# --- The file ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """A page as it is written; the last value of a notebook's cell, it shows itself there.

    Attributes:
        title: What was looked at.
        html: The whole page.
    """

    title: str
    html: str = field(repr=False)

    @classmethod
    def of(cls, page: Page) -> "Report":
        """Renders a page."""
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters |= {
            "number": _number,
            "signed": _signed,
            "png": lambda picture: _uri(png(picture.pixels), "png"),
            "jpeg": _jpeg,
            "chart": lambda chart: _uri(chart.png, "png"),
            "size": _size,
            "base64": lambda values: base64.b64encode(values.tobytes()).decode(),
        }
        style, script = _part("style.css"), _part("viewer.js")
        text = environment.from_string(_part("page.html.j2")).render(
            page=page, style=style, script=script, policy=_policy(style, script), palette=_palette()
        )
        return cls(page.title, text)

    def save(self, path: str | Path) -> None:
        """Writes the page as one HTML file, atomically.

        Raises:
            PhregError: It cannot be written.
        """
        with writing(Path(path), "free space, or give another path"):
            write_text(Path(path), self.html)

    def _repr_html_(self) -> str:
        """Shows the page in a frame of its own, whose script can reach nothing of the notebook."""
        return (
            f'<iframe sandbox="allow-scripts" title="{html.escape(self.title)}" width="100%" height="800" '
            f'style="border: 0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


def write_report(path: str | Path, page: Page) -> None:
    """Writes a page as one HTML file, atomically.

    Raises:
        OSError: The disk does not take it.
    """
    write_text(Path(path), Report.of(page).html)


def read_pictures(path: Path) -> list[tuple[str, bytes]]:
    """Reads the maps and charts out of a report: what there is to see, and a PNG file, in the page's order.

    Photographs, and maps drawn over them, are left out: they are the user's, and not for passing on.
    """
    reader = _PictureReader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader.found


class _PictureReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bytes]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        settings = dict(attrs)
        kind, _, data = (settings.get("src") or "").partition(",")
        if tag == "img" and kind == "data:image/png;base64" and "data-photograph" not in settings:
            self.found.append((settings.get("alt") or "", base64.b64decode(data)))


def _part(name: str) -> str:
    return resources.files("phreg.report").joinpath(name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy of a page that holds just this style sheet and this script."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; "
        f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
    )


def _palette() -> np.ndarray:
    return (colormaps[PALETTE](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def _jpeg(pixels: Photo) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=85)
    return _uri(buffer.getvalue(), "jpeg")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _size(chart: Chart) -> tuple[int, int]:
    """Width and height on the page, so that it is laid out before the picture is decoded."""
    width, height = Image.open(io.BytesIO(chart.png)).size
    return width // CHART_SCALE, height // CHART_SCALE


def _number(value: float | int | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _signed(value: float | int | None) -> str:
    return "" if value is None else f"{value:+.3g}".replace("-", "\N{MINUS SIGN}")
