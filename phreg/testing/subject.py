"""The model under test."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt
from phreg.registers import add_registers

DenseReader = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A model under test, and what it is tested with.

    Attributes:
        model: The model without registers; only copies of it are touched.
        images: Images of the size to test at.
        num_registers: How many registers to add.
        dense: How the model's library gives dense features, if it does.
    """

    model: nn.Module
    images: Float[Tensor, "batch 3 height width"]
    num_registers: int
    dense: DenseReader | None = None

    def original(self) -> Backbone:
        """Copies the model as it is."""
        return adapt(copy.deepcopy(self.model))

    def patched(self) -> Backbone:
        """Copies the model and adds registers."""
        return add_registers(self.original(), self.num_registers)
