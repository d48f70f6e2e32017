"""Moves a model's sinks into its registers, by way of the hidden units that cause them.

Distillation does not do it: its loss reads tokens behind the final norm, whose gradient into a token of huge
norm is scaled down by that norm, and the artifacts stay (benchmarks/methods). A sink's cause has no such
trouble. Its activation is asked to be high on the registers and absent from the patches, ahead of all that
explodes:

    loss = mean over registers of (h - A)² / A²  +  sum over patches of max(h, 0)² / A²

h is the activation of a hidden unit, A its level on the original outliers (h has the sign of A), and both are
means over units and images. Nothing but register tokens is left of it at inference.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.sinks import Sinks, reading_units


class Relocation:
    """The relocation loss of a patched model.

    Args:
        backbone: The model, with registers.
        sinks: Its sinks, found before it had any; it names at least one cause.
    """

    def __init__(self, backbone: Backbone, sinks: Sinks) -> None:
        self.backbone = backbone
        self._units = {
            block: (
                torch.tensor([unit.index for unit in units], device=backbone.device),
                torch.tensor([unit.level for unit in units], device=backbone.device),
            )
            for block, units in sinks.by_block().items()
        }

    @contextmanager
    def listening(self) -> Iterator[dict[int, Tensor]]:
        """Collects hidden units while the model runs; give them to `loss`."""
        with reading_units(self.backbone, list(self._units)) as hidden:
            yield hidden

    def loss(
        self, hidden: dict[int, Tensor], images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Computes the loss, in fp32, from what was collected on some images."""
        layout = self.backbone.layout(images)
        terms = []
        for block, (index, level) in self._units.items():
            relative = hidden[block][..., index].float() / level  # 1 on the original outliers
            on_registers = (layout.registers(relative) - 1).square().mean((0, 1))
            on_patches = layout.patches(relative).clamp_min(0).square().sum(1).mean(0)
            terms.append(on_registers + on_patches)
        return torch.cat(terms).mean()
