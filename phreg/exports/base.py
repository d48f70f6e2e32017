"""What the module of a stock format offers to `phreg.exports.export`.

A format is three functions that write nothing: why a model cannot take it, what its folder would hold, and
how the stock library alone reads such a folder.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from phreg.backbones.base import Backbone

TOLERANCE = 1e-5
"""Largest difference that counts as equal, relative to the largest value: the rounding of fp32 over a deep
network. Both models run the same kernels on the same weights, so the difference is mostly zero."""

FOLDER = "{folder}"
"""Stands in a setting for the path of the folder that the setting is written to."""


class Contents(NamedTuple):
    """What a stock folder holds."""

    tensors: dict[str, Tensor]
    """The weights, named as the stock class names them on disk: `model.safetensors`."""
    settings: dict[str, dict[str, Any]]
    """Everything else, as JSON, by file name."""
    tolerance: float = TOLERANCE
    """Largest difference that counts as equal; more where the stock class is known to round differently."""
    more_tensors: Mapping[str, dict[str, Tensor]] = MappingProxyType({})
    """Further weights, by file name."""
    files: Mapping[str, bytes] = MappingProxyType({})
    """Files to be copied, such as a tokenizer's, by name."""


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
