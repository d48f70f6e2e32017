"""Moves a model's sinks into its registers, by what sinks hold in the residual stream.

Distillation alone leaves the artifacts where they are (benchmarks/methods). Its loss reads tokens after the
final norm, which divides the gradient into a token by the token's norm, and that of a sink is huge. The
residual stream before any norm has no such problem. This loss asks the registers for what sinks hold there,
and patches to hold no more of it than is ordinary, after each block that shows the sinks:

    loss = mean over registers of (s - 1)²  +  sum over patches of max(s - o, 0) / (1 - o) / S

s is a token's projection on the direction of the sinks, as a share of their level
(`phreg.sinks.directions`), and o what patches hold that are no sinks. S is the number of sinks that an image
had, so the second term is the share of them that is left: it counts alike on any grid and in any model (S = 1
counts them by number). Both terms are means over directions and images. The penalty on patches is linear.
Squared, a sink at 10 % of its level would cost only 1 %. At inference only the register tokens remain.

What writes a sink makes no difference: one hidden unit, many of them over several blocks, or attention.

What triggers one cluster of sinks leaves another off. So the clusters are assigned to the registers in turn.
A register starts from a trigger of its cluster and is asked for the directions of that cluster alone. A
cluster gets no more registers than an image has sinks of it. Other registers start at random and are free:
similar tokens take the trigger from each other, and with too many of them none holds the sink in the end
(benchmarks/methods). With fewer registers than clusters, some registers hold several.

    sinks an image        registers
    4                     4:  0 0 0 0           16:  0 0 0 0, 12 free
    4 and 1               4:  0 1 0 0            1:  0 and 1
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.sinks.directions import SinkDirection
from phreg.sinks.locate import Sinks
from phreg.sinks.starting import assign_registers


class Relocation:
    """The relocation loss of a patched model.

    Args:
        backbone: The model, with registers.
        sinks: Its sinks, found before it had any; they have at least one direction.
        counted: How sinks on patches count: by their share of those an image had, or by their number.
    """

    def __init__(
        self, backbone: Backbone, sinks: Sinks, counted: Literal["share", "number"] = "share"
    ) -> None:
        self.backbone = backbone
        self._directions = [
            replace(direction, vector=direction.vector.to(backbone.device)) for direction in sinks.directions
        ]
        an_image = [len(own) for own in sinks.triggers]
        self._whole = an_image if counted == "share" else [1] * len(an_image)
        assigned = assign_registers(backbone.num_registers, an_image)
        self._asked = [
            torch.tensor([cluster in clusters for clusters in assigned], device=backbone.device)
            for cluster in range(len(an_image))
        ]

    def capture(self) -> AbstractContextManager[dict[int, Tensor]]:
        """Collects the residual stream while the model runs; give it to `loss`."""
        return self.backbone.tap(sorted({direction.block for direction in self._directions}))

    def loss(
        self,
        captured: dict[int, Float[Tensor, "batch tokens dim"]],
        images: Float[Tensor, "batch 3 height width"],
    ) -> Float[Tensor, ""]:
        """Computes the loss, in fp32, from what `capture` collected on some images."""
        layout = self.backbone.layout(images)
        terms = []
        for direction in self._directions:
            share = direction.share(captured[direction.block])
            held = self._held(layout.registers(share), direction)
            beyond = (layout.patches(share) - direction.ordinary).clamp_min(0) / (1 - direction.ordinary)
            on_patches = beyond.sum(1).mean() / self._whole[direction.cluster]
            terms.append((held - 1).square().mean() + on_patches)
        return torch.stack(terms).mean()

    @torch.no_grad()
    def lost(self, captured: dict[int, Float[Tensor, "batch tokens dim"]]) -> list[int]:
        """Names the clusters that no register of theirs holds at half the sink level, after some block."""
        start = self.backbone.spec.num_prefix
        registers = slice(start, start + self.backbone.num_registers)
        return sorted(
            {
                direction.cluster
                for direction in self._directions
                if self._held(direction.share(captured[direction.block][:, registers]), direction)
                .mean(0)
                .amax()
                < 0.5
            }
        )

    def _held(
        self, registers: Float[Tensor, "batch registers"], direction: SinkDirection
    ) -> Float[Tensor, "batch asked"]:
        """Takes the registers that are asked for a direction."""
        asked: Bool[Tensor, " registers"] = self._asked[direction.cluster]
        return registers[:, asked]
