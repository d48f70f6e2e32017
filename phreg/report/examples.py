"""What several models made of a few pictures of a task, side by side.

    Example of each picture ──► a row: panels of the first model │ panels of the second │ …

What a panel shows is the task's (`phreg.evaluation.examples`); here is how it looks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from phreg.evaluation.examples import Example, LabelledBox, Panel
from phreg.evaluation.results import ADVICE
from phreg.report.canvas import COLOURS, FONT_SIZE, INK, legend_above, panels, save_png, wrapped
from phreg.storage import writing

PANEL = (1.9, 1.7)
"""Width and height of a picture or a map, in inches."""

LINE_LENGTH = 22
"""Letters of a model's name to a line, so that it fits over a picture."""

FOUND, TRUE = COLOURS[:2]
"""Colours of what the model found or chose, and of the truth."""


def write_examples(path: Path, models: Mapping[str, Sequence[Example]]) -> None:
    """Draws examples into a PNG file; none are no file.

    Args:
        path: The file.
        models: As in `examples_figure`.

    Raises:
        PhregError: The file cannot be written.
    """
    if models:
        with writing(path, ADVICE):
            save_png(path, examples_figure(models))


def examples_figure(models: Mapping[str, Sequence[Example]]) -> Figure:
    """Draws a row for each picture, the models side by side.

    Args:
        models: What each model, by its name, made of the same pictures; as many panels of each.
    """
    pictures = list(zip(*models.values(), strict=True))
    columns = len(models) * len(pictures[0][0])
    figure, every = panels(len(pictures) * columns, columns=columns, size=PANEL)
    left = iter(every)
    for row, examples in enumerate(pictures):
        for name, example in zip(models, examples, strict=True):
            for place, panel in enumerate(example):
                title = panel.title if place else name
                _draw(next(left), panel, "" if row else title)
    legend_above(figure, *every)
    return figure


def _draw(axes: Axes, panel: Panel, title: str) -> None:
    if isinstance(panel.image, Tensor):
        axes.imshow(panel.image.numpy(), cmap="inferno")
    else:
        axes.imshow(panel.image)
    for box in panel.boxes:
        _draw_box(axes, box)
    for mark in panel.marks:
        axes.plot(mark.col, mark.row, marker="x", linestyle="none", color=FOUND, label=mark.label)
    axes.set_axis_off()
    axes.set_title(wrapped(title, LINE_LENGTH), color=INK, fontsize=FONT_SIZE)


def _draw_box(axes: Axes, box: LabelledBox) -> None:
    left, top, right, bottom = box.sides.tolist()
    place = (left - 0.5, top - 0.5)  # the middle of a pixel is at a whole number
    look = {"fill": False, "color": FOUND if box.found else TRUE, "lw": 2, "label": box.label}
    axes.add_patch(Rectangle(place, right - left, bottom - top, **look))
