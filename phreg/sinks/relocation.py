"""Moves a model's sinks into its registers, through the hidden units that cause them.

Distillation alone leaves the artifacts where they are (benchmarks/methods). Its loss reads tokens after the
final norm, which divides the gradient into a token by the token's norm, and that of a sink is huge. The cause
of a sink has no such problem. This loss asks its activation to be high on the registers and absent from the
patches, before any norm grows:

    loss = mean over registers of (h - A)² / A²  +  sum over patches of max(h, 0) / A / S

h is the activation of a hidden unit. A is its sink level, the activation on the original outliers; h is taken
with the sign of A. S is the number of sinks that the unit caused in an image, so the second term is the share
of them that is left: it counts alike on any grid and in any model (S = 1 counts them by number). Both terms
are means over units and images. The penalty on patches is linear. Squared, a sink at 10 % activation would
cost only 1 %. At inference only the register tokens remain.

A unit that is off passes no gradient. The same weights silence a unit on patches and on registers, so a
register that lost it would never find it again. So the gradient of a register's h is taken as if h were
proportional to its pre-activation, as it is at A (straight-through; Bengio et al. 2013, arXiv 1308.3432).

What triggers one cluster of sinks leaves the units of another off. So the clusters are assigned to the
registers in turn. A register starts from a trigger of its cluster and is asked for the units of that cluster
alone. A cluster gets no more registers than an image has sinks of it. Other registers start at random and are
free: similar tokens take the trigger from each other, and with too many of them none holds the sink in the
end (benchmarks/methods). With fewer registers than clusters, some registers hold several.

    sinks an image        registers
    4                     4:  0 0 0 0           16:  0 0 0 0, 12 free
    4 and 1               4:  0 1 0 0            1:  0 and 1
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.sinks.locate import Sinks
from phreg.sinks.starting import assign_registers
from phreg.sinks.units import UnitActivations, UnitReader


class Relocation:
    """The relocation loss of a patched model.

    Args:
        backbone: The model, with registers.
        sinks: Its sinks, found before it had any; it names at least one cause.
        counted: How sinks on patches count: by their share of those an image had, or by their number.
    """

    def __init__(
        self, backbone: Backbone, sinks: Sinks, counted: Literal["share", "number"] = "share"
    ) -> None:
        self.backbone = backbone
        causes = sinks.by_block()
        self._reader = UnitReader(
            backbone, {block: [unit.index for unit in units] for block, units in causes.items()}
        )

        def as_tensor(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=backbone.device)

        self._sink_level = {
            block: as_tensor([unit.sink_level for unit in units]) for block, units in causes.items()
        }
        self._pre_activation = {
            block: as_tensor([unit.pre_activation for unit in units]) for block, units in causes.items()
        }
        an_image = [len(own) for own in sinks.triggers]
        number: dict[int | None, int] = dict(enumerate(an_image))
        self._whole = {  # what all sinks of a unit, as an image had them, count together
            block: as_tensor([number[unit.cluster] if counted == "share" else 1 for unit in units])
            for block, units in causes.items()
        }
        assigned = assign_registers(backbone.num_registers, an_image)
        self._asked = {
            block: as_tensor([[unit.cluster in clusters for unit in units] for clusters in assigned])
            for block, units in causes.items()
        }

    def capture(self) -> AbstractContextManager[dict[int, UnitActivations]]:
        """Collects hidden units while the model runs; give them to `loss`."""
        return self._reader.capture()

    def forget(self) -> None:
        """Drops what was read of a block in a pass that did not end."""
        self._reader.forget()

    def loss(
        self, captured: dict[int, UnitActivations], images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Computes the loss, in fp32, from what `capture` collected on some images."""
        layout = self.backbone.layout(images)
        terms = []
        for block, activations in captured.items():
            asked, relative = self._asked[block], self._relative(block, activations)
            # Zero, with a gradient.
            proportional = layout.registers(activations.pre_activation).float() / self._pre_activation[block]
            held = layout.registers(relative).detach() + (proportional - proportional.detach()).sum(-1)
            on_registers = ((held - 1).square() * asked).sum(1).mean(0) / asked.sum(0)
            on_patches = layout.patches(relative).clamp_min(0).sum(1).mean(0) / self._whole[block]
            terms.append(on_registers + on_patches)
        return torch.cat(terms).mean()

    @torch.no_grad()
    def silenced(self, captured: dict[int, UnitActivations]) -> list[str]:
        """Names the units, as block:unit, that no register of their cluster holds at half the sink level."""
        start = self.backbone.spec.num_prefix
        names = []
        for block, activations in captured.items():
            asked, relative = self._asked[block], self._relative(block, activations)
            held = (relative[:, start : start + len(asked)].mean(0) * asked).amax(0)
            names += [f"{block}:{unit}" for unit in self._reader.units[block][held < 0.5].tolist()]
        return names

    def _relative(self, block: int, activations: UnitActivations) -> Float[Tensor, "batch tokens units"]:
        """Divides the units of a block by their sink level."""
        return activations.hidden.float() / self._sink_level[block]
