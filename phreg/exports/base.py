"""What the module of a stock format offers to `phreg.exports.export`.

A format is three functions that write nothing: why a model cannot take it, what its folder would hold, and
how the stock library alone reads such a folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from phreg.backbones.base import Backbone, Features


@runtime_checkable
class Reader(Protocol):
    """A model that is no backbone any more, and still gives its features.

    Attributes:
        any_size: Whether it takes other sizes than the model's own.
    """

    any_size: bool

    def __call__(self, images: Tensor) -> Features:
        """Reads dense and pooled features of normalised images."""
        ...


class Contents(NamedTuple):
    """What a folder holds."""

    tensors: Mapping[str, Tensor]
    """The weights, named as the class names them on disk; none where they are in a file of another kind."""
    settings: Mapping[str, dict[str, Any]]
    """What is written as JSON, by file name."""
    files: Mapping[str, Callable[[Path], Any]] = MappingProxyType({})
    """Everything else: by file name, what writes it, given its path."""
    weights: str = "model.safetensors"
    """The file of the weights."""


@runtime_checkable
class StockFormat(Protocol):
    """The module of a format."""

    def why_not(self, backbone: Backbone) -> str | None:
        """Says why a model cannot take this format; None where it can."""
        ...

    def contents(self, backbone: Backbone) -> Contents:
        """Puts together what the folder of a model that can take this format holds."""
        ...

    def load(self, folder: Path) -> Backbone | Reader:
        """Reads such a folder by its format's own loader, in eval mode and fp32."""
        ...

    def answer(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Calls the model as its users do, head included, at its own size."""
        ...
