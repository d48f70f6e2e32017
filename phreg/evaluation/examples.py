"""What a model made of a few pictures of a task, as data; `phreg.report.examples` draws it.

Example = a row of panels ──► picture with boxes │ map │ map with a marked patch │ …
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor


class LabelledBox(NamedTuple):
    """A box on a picture."""

    sides: Float[Tensor, " 4"]
    """Left, top, right, bottom, in pixels."""
    label: str
    """What it is, for the legend."""
    found: bool
    """Whether the model found it; else it is the truth."""


class Mark(NamedTuple):
    """A patch that the model chose."""

    row: int
    col: int
    label: str
    """What it is, for the legend."""


@dataclass(frozen=True, eq=False)
class Panel:
    """A picture, or a map of patches.

    Attributes:
        image: RGB from 0 to 255, or a map, which is coloured from its least to its greatest value.
        title: What it shows; the first panel of an example has the model's name instead.
        boxes: What is drawn on it, first to last.
        marks: The same of patches.
    """

    image: UInt8[np.ndarray, "height width 3"] | Float[Tensor, "rows cols"]
    title: str = ""
    boxes: Sequence[LabelledBox] = ()
    marks: Sequence[Mark] = ()


Example = Sequence[Panel]
"""What a model made of one picture; of as many panels as every other example of the task."""
