"""Writes one small page about a model, alone or before and after: one file, nothing to fetch, no scripts.

A page opens with its verdict in a sentence, then the figures, then pictures: for each image the photo beside
its norm maps and PCA maps, and for the model its norms from block to block and the positions of its
artifacts.

    NormReport, features ──inspection_page──┐
                                            ├──► Page ──write_report──► report.html
    Comparison ───────────comparison_page───┘
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

from phreg.analysis.norms import NormReport
from phreg.checkpoint import write_text
from phreg.evaluation.retrofit import Comparison, Row
from phreg.report.canvas import png
from phreg.report.charts import norm_quantiles, position_map
from phreg.report.maps import norm_map, pca_maps
from phreg.report.verdict import outcome, verdict

MAX_SHOWN = 12
"""Images on a page, at most, so that it stays small."""

PHOTO_SIDE = 320
"""Pixels of a photo's longer side on the page, at most."""

Photo = UInt8[np.ndarray, "_height _width 3"]
Grids = Float[Tensor, "images rows cols dim"]


@dataclass(frozen=True)
class Picture:
    """A picture, as the page holds it.

    Attributes:
        source: Data URI.
        alt: What there is to see, for those who cannot.
        caption: Line below the picture.
        pixelated: Whether it is a map whose squares must stay sharp.
    """

    source: str
    alt: str
    caption: str
    pixelated: bool = False


@dataclass(frozen=True)
class Page:
    """What a report page shows, top to bottom.

    Attributes:
        title: What was looked at.
        verdict: The outcome, in a sentence.
        note: What it was measured on.
        rows: The table; where no row has an `after`, it shows one model.
        images: The pictures of each image.
        charts: The pictures of the model as a whole.
    """

    title: str
    verdict: str
    note: str
    rows: Sequence[Row]
    images: Sequence[Sequence[Picture]]
    charts: Sequence[Picture]

    @property
    def compares(self) -> bool:
        """Whether it shows a model before and after."""
        return any(row.after is not None for row in self.rows)


def inspection_page(title: str, report: NormReport, photos: Sequence[Photo], features: Grids) -> Page:
    """Builds the page about one model.

    Args:
        title: What was looked at.
        report: Its norms.
        photos: The first images that were measured, as they look.
        features: Their patch features.
    """
    found = report.blocks[report.focus]
    rows = [
        Row("outlier rate, last block (share of patch tokens)", report.outlier_rate, None, True),
        Row("block where outliers emerge, from 0", report.emergence_block, None, True),
        Row(f"median norm, block {found.block}", found.median, None, True),
        Row(f"median norm of outliers, block {found.block}", found.outlier_norm, None, True),
        Row(f"norm that separates them, block {found.block}", found.gap and found.gap.threshold, None, True),
    ]
    note = f"Measured on {report.images} images."
    return Page(
        title, verdict(report), note, rows, _image_rows(photos, [report], [features]), _charts([report])
    )


def comparison_page(title: str, comparison: Comparison, photos: Sequence[Photo]) -> Page:
    """Builds the page about a model before and after.

    Args:
        title: What was patched.
        comparison: Its figures.
        photos: The first images that were measured, as they look.
    """
    apart = "not trained on" if comparison.held_out else "that were trained on too"
    return Page(
        title=title,
        verdict=outcome(comparison),
        note=f"Measured on {comparison.images} images {apart}.",
        rows=comparison.rows(),
        images=_image_rows(photos, comparison.norms, comparison.shown),
        charts=_charts(comparison.norms),
    )


def write_report(path: str | Path, page: Page) -> None:
    """Writes a page as one HTML file, atomically."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": _figure, "change": _change}
    template = resources.files("phreg.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    write_text(Path(path), environment.from_string(template).render(page=page))


def read_pictures(path: Path) -> list[tuple[str, bytes]]:
    """Reads the maps and charts out of a report: what there is to see, and a PNG file, in the page's order.

    Photographs are left out: they are the user's, and not for passing on.
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
        if tag == "img" and kind == "data:image/png;base64":
            self.found.append((settings.get("alt") or "", base64.b64decode(data)))


def _image_rows(
    photos: Sequence[Photo], reports: Sequence[NormReport], features: Sequence[Grids]
) -> list[list[Picture]]:
    """Each image's photo, norm maps and PCA maps; the maps of an image share one scale and one basis."""
    place = reports[0].focus
    block = reports[0].blocks[place].block
    low = min(report.blocks[place].quantiles[0] for report in reports)
    high = max(report.blocks[place].quantiles[-1] for report in reports)
    sides = ("before", "after") if len(reports) > 1 else ("",)
    rows = []
    shown = min(MAX_SHOWN, *(len(report.maps) for report in reports), *map(len, features))
    for index, pixels in enumerate(photos[:shown]):
        row = [Picture(_jpeg(pixels), f"Image {index + 1}, as the model sees it", f"image {index + 1}")]
        for report, side in zip(reports, sides, strict=True):
            norms = report.maps[index, place]
            extent = f"{norms.min():.3g} (dark) to {norms.max():.3g} (bright)"
            alt = f"Norms of the patch tokens of image {index + 1} {side}: {extent}"
            row.append(_map(norm_map(norms, low, high), alt, f"norms, block {block} {side}"))
        for colours, side in zip(pca_maps(*(grids[index] for grids in features)), sides, strict=True):
            alt = f"Patch features of image {index + 1} {side}, first three principal components as colours"
            row.append(_map(colours, alt, f"features {side}"))
        rows.append(row)
    return rows


def _charts(reports: Sequence[NormReport]) -> list[Picture]:
    block = reports[0].blocks[reports[0].focus].block
    words = " before and after" if len(reports) > 1 else ""
    norms = (
        "Norms of patch tokens from block to block: bands hold 50, 90 and 98 % of them, the line is the "
        "median, dots are the extremes, crosses separate outliers from the rest."
    )
    positions = f"Share of images with an outlier at each patch, block {block}."
    return [
        Picture(_uri(png(norm_quantiles(*reports)), "png"), f"Chart of norms per block{words}", norms),
        Picture(_uri(_positions(reports), "png"), f"Map of the positions of outliers{words}", positions),
    ]


def _positions(reports: Sequence[NormReport]) -> bytes:
    place = reports[0].focus
    return png(position_map(*(report.positions[place] for report in reports)))


def _map(pixels: Photo, alt: str, caption: str) -> Picture:
    return Picture(_uri(png(pixels), "png"), alt, caption.strip(), pixelated=True)


def _jpeg(pixels: Photo) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="jpeg", quality=85)
    return _uri(buffer.getvalue(), "jpeg")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _figure(value: float | int | None) -> str:
    return "none" if value is None else f"{value:.4g}"


def _change(row: Row) -> str:
    """Says whether a figure became better or worse, as far as the table's digits tell."""
    if row.before is None or row.after is None or _figure(row.before) == _figure(row.after):
        return ""
    return "better" if (row.after < row.before) == row.lower_is_better else "worse"
