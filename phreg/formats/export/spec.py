"""What the module of a format offers to `phreg.formats.export.export`.

A format is four functions that write nothing: why a model cannot take it, what its folder would hold, how
the format's own loader alone reads such a folder, and how its users call what comes of that.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from phreg.backbones.base import Backbone, Features
from phreg.record import RunRecord

TOLERANCE = 1e-5
"""Largest difference that counts as equal, relative to the largest value: the rounding of fp32 over a deep
network. Both models run the same kernels on the same weights, so the difference is mostly zero."""

FOLDER = "{folder}"
"""Stands in a setting for the path of the folder that the setting is written to."""

WEIGHTS = "model.safetensors"
"""The file that stock libraries look for weights in."""

Write = Callable[[Path], Any]
"""Writes a file, given its path."""


class Contents(NamedTuple):
    """What a folder holds, by file name."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    """Weights, named as the class that loads them names them on disk."""
    settings: Mapping[str, Mapping[str, Any]]
    """What is written as JSON."""
    files: Mapping[str, Write] = MappingProxyType({})
    """Everything else."""
    tolerance: float = TOLERANCE
    """Largest difference that counts as equal; more where the stock class is known to round differently."""
    record: RunRecord | None = None
    """What a format of phreg's own tells of itself, which goes into `phreg.json` with the rest."""


@runtime_checkable
class Graph(Protocol):
    """A model that is no backbone any more, and still gives its features.

    Attributes:
        any_size: Whether it takes other sizes than the model's own.
    """

    any_size: bool

    def __call__(self, images: Tensor) -> Features:
        """Reads dense and pooled features of normalised images."""
        ...


@runtime_checkable
class StockFormat(Protocol):
    """The module of a format."""

    def unsupported_reason(self, backbone: Backbone) -> str | None:
        """Says why a model cannot take this format; None where it can."""
        ...

    def contents(self, backbone: Backbone) -> Contents:
        """Puts together what the folder of a model that can take this format holds."""
        ...

    def load(self, folder: Path) -> Backbone | Graph:
        """Reads such a folder by its format's own loader, in eval mode and fp32."""
        ...

    def answer(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Calls the model as its users do, head included, at its own size."""
        ...
