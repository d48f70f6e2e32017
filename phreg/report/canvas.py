"""The paper that charts are drawn on: one look for all of them, and PNG files of charts and maps.

A chart carries its own canvas, so that no global state (pyplot) is touched and none is needed to save or show
it. It has no background and mid-grey text, and so can be read on a light page and on a dark one.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

INK = "#7a7a7a"
"""Colour of text and axes: mid-grey, readable on white and on black."""

COLOURS = ("#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d")
"""Models, first to last (ColorBrewer Dark2); before and after, the first two, suit the colour-blind too."""

FONT_SIZE = 9
"""Points, of everything but titles."""

PANEL = (4.25, 3.4)
"""Width and height of a model's panel, in inches."""

LINE_LENGTH = 44
"""Letters of a title to a line, so that the long names of checkpoints fit over a panel."""


class ChartFigure(Figure):
    """A figure that shows itself inline in a notebook, whether or not matplotlib was set up there.

    Args:
        width: Inches.
        height: Inches.
    """

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        return png(self)


def panels(
    count: int, *, columns: int | None = None, size: tuple[float, float] = PANEL, **sharing: Any
) -> tuple[ChartFigure, list[Axes]]:
    """Lays out panels of one size, row by row; what is left of the last row stays empty.

    Args:
        count: Panels.
        columns: Panels in a row; None means all.
        size: Width and height of each, in inches.
        sharing: `sharex`, `sharey`, as `Figure.subplots` takes them.
    """
    columns = min(columns or count, count)
    rows = -(-count // columns)
    figure = ChartFigure(size[0] * columns, size[1] * rows)
    every = figure.subplots(rows, columns, squeeze=False, **sharing).ravel()
    for axes in every[count:]:
        axes.remove()
    for axes in every[:count]:
        paint(axes)
    return figure, list(every[:count])


def paint(axes: Axes) -> None:
    """Gives axes the look of all charts."""
    axes.tick_params(colors=INK, which="both", labelsize=FONT_SIZE)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_visible(side in ("left", "bottom"))


def label(axes: Axes, *, title: str = "", x: str = "", y: str = "") -> None:
    """Writes on axes what they show."""
    if title:
        axes.set_title(wrapped(title, LINE_LENGTH), color=INK, fontsize=FONT_SIZE + 1)
    if x:
        axes.set_xlabel(x, color=INK, fontsize=FONT_SIZE)
    if y:
        axes.set_ylabel(y, color=INK, fontsize=FONT_SIZE)


def wrapped(name: str, letters: int) -> str:
    """Breaks a name into lines, after a space or what checkpoints have instead: `/`, `.`, `_` and `-`."""
    lines = [""]
    for part in re.findall(r"[^\s/._-]*[\s/._-]?", name):
        if len(lines[-1] + part.rstrip()) > letters and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)


def legend(axes: Axes, **position: Any) -> None:
    """Explains lines and bars that have a label; nothing where none has."""
    if _labelled(axes):
        axes.legend(frameon=False, labelcolor=INK, fontsize=FONT_SIZE - 1, **position)


def legend_above(figure: ChartFigure, *every: Axes) -> None:
    """Explains above all panels the lines and bars that have a label, each label once."""
    named = {text: handle for axes in every for text, handle in _labelled(axes).items()}
    if named:
        room = int(10 * figure.get_figwidth())  # letters side by side
        columns = len(named) if sum(len(text) + 6 for text in named) < room else 1
        texts = [wrapped(text, room - 6) for text in named]
        look = {"frameon": False, "labelcolor": INK, "fontsize": FONT_SIZE}
        figure.legend(list(named.values()), texts, loc="outside upper center", ncols=columns, **look)


def _labelled(axes: Axes) -> dict[str, Any]:
    handles, labels = axes.get_legend_handles_labels()
    return {text: handle for text, handle in zip(labels, handles, strict=True) if text}


def titles(count: int, names: Sequence[str]) -> Sequence[str]:
    """Names models: as they are called, or else before and after; one alone needs no name."""
    if names:
        return names
    return {1: ("",), 2: ("before", "after")}.get(count) or [f"model {i + 1}" for i in range(count)]


def colour(index: int) -> str:
    """The colour of a model, by its number."""
    return COLOURS[index % len(COLOURS)]


def save_png(path: str | Path, picture: Figure | UInt8[np.ndarray, "height width 3"]) -> None:
    """Writes a map or a chart as a PNG file."""
    Path(path).write_bytes(png(picture))


def png(picture: Figure | UInt8[np.ndarray, "height width 3"]) -> bytes:
    """Encodes a map or a chart as PNG."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=144, transparent=True)
    else:
        Image.fromarray(picture).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
