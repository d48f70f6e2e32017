"""What the module of a stock format offers to `phreg.exports.export`.

A format is three functions that write nothing: why a model cannot take it, what its folder would hold, and
how the stock library alone reads such a folder.
"""

from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from phreg.backbones.base import Backbone


class Contents(NamedTuple):
    """What a stock folder holds."""

    tensors: dict[str, Tensor]
    """The weights, named as the stock class names them on disk: `model.safetensors`."""
    settings: dict[str, dict[str, Any]]
    """Everything else, as JSON, by file name."""


@runtime_checkable
class StockFormat(Protocol):
    """The module of a format."""

    def why_not(self, backbone: Backbone) -> str | None:
        """Says why a model cannot take this format; None where it can."""
        ...

    def contents(self, backbone: Backbone) -> Contents:
        """Puts together what the folder of a model that can take this format holds."""
        ...

    def load(self, folder: Path) -> Backbone:
        """Reads such a folder by the stock library's own loader, in eval mode and fp32."""
        ...

    def answer(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Calls the model as its users do, head included, at its own size."""
        ...
