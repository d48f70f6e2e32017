"""What object discovery found in a few pictures, and the maps that led to it, of several models side by side.

    Example of each picture ──► picture, true and found box │ degree │ expansion │ similarity      of LOST
                                                            │ eigenvector │ partition              of TokenCut

The patch that an object was grown from is marked in each map: where it lies in the background at a patch that
resembles nothing, an artifact was taken for the object.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from phreg.evaluation.tasks.object_discovery import Example
from phreg.report.canvas import COLOURS, FONT_SIZE, INK, legend_above, panels, wrapped

PANEL = (1.9, 1.7)
"""Width and height of a picture or a map, in inches."""

LINE_LENGTH = 22
"""Letters of a model's name to a line, so that it fits over a picture."""

FOUND, TRUE = COLOURS[:2]
"""Colours of the box that was found, and of the seed, and of true boxes."""


def discovery_figure(models: Mapping[str, Sequence[Example]]) -> Figure:
    """Draws a row for each picture, the models side by side.

    Args:
        models: What each model, by its name, found in the same pictures, by the same algorithm.
    """
    pictures = list(zip(*models.values(), strict=True))
    steps = list(pictures[0][0].discovery.maps)
    figure, every = panels(
        len(pictures) * len(models) * (1 + len(steps)),
        columns=len(models) * (1 + len(steps)),
        size=PANEL,
    )
    left = iter(every)
    for row, found in enumerate(pictures):
        for name, example in zip(models, found, strict=True):
            _draw_boxes(next(left), example, name if row == 0 else "")
            for step in steps:
                _draw_map(next(left), example, step, step if row == 0 else "")
    legend_above(figure, every[0], every[1])
    return figure


def _draw_boxes(axes: Axes, example: Example, title: str) -> None:
    axes.imshow(example.picture)
    for box in example.truth:
        _draw_box(axes, box, TRUE, "true box")
    _draw_box(axes, example.box, FOUND, "box found")
    _finish(axes, title)


def _draw_box(axes: Axes, box: Tensor, colour: str, text: str) -> None:
    left, top, right, bottom = box.tolist()
    corner = (left - 0.5, top - 0.5)  # the center of a pixel is at a whole number
    axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, color=colour, lw=2, label=text))


def _draw_map(axes: Axes, example: Example, step: str, title: str) -> None:
    axes.imshow(example.discovery.maps[step].numpy(), cmap="inferno")
    row, col = example.discovery.seed
    axes.plot(col, row, marker="x", linestyle="none", color=FOUND, label="patch it was grown from")
    _finish(axes, title)


def _finish(axes: Axes, title: str) -> None:
    axes.set_axis_off()
    axes.set_title(wrapped(title, LINE_LENGTH), color=INK, fontsize=FONT_SIZE)
