"""Moves a model's sinks into its registers, by way of the hidden units that cause them.

Distillation does not do it: its loss reads tokens behind the final norm, whose gradient into a token of huge
norm is scaled down by that norm, and the artifacts stay (benchmarks/methods). A sink's cause has no such
trouble. Its activation is asked to be high on the registers and absent from the patches, ahead of all that
explodes:

    loss = mean over registers of (h - A)² / A²  +  sum over patches of max(h, 0) / A

h is the activation of a hidden unit, A its level on the original outliers (h has the sign of A), and both are
means over units and images. On patches it counts as it is, for squared, a sink of a tenth of the height would
be nearly for nothing. Nothing but register tokens is left of it all at inference.

A unit that is off passes no gradient: a register that lost it, as the same weights silence it on patches,
would never find it again. So the gradient of a register's h is taken as if h stood in proportion to what its
activation is computed from, as it does at A (straight-through; Bengio et al. 2013, arXiv 1308.3432).

What sets off one kind of sink leaves the units of another off. So kinds are dealt out to the registers in
turn: a register starts from a trigger of its kind, and is asked for the units of its kind alone. A kind gets
no more registers than an image has sinks of it. What remains starts at random and is free: tokens that are
alike take from each other what sets the units off, and with too many none holds the sink in the end
(benchmarks/methods). Of fewer registers than kinds, some hold several.

    sinks an image        registers
    4                     4:  0 0 0 0           16:  0 0 0 0, 12 free
    4 and 1               4:  0 1 0 0            1:  0 and 1
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.registers import add_registers, initial_registers
from phreg.sinks.locate import Sinks
from phreg.sinks.units import UnitActivations, UnitReader


def assign_registers(num_registers: int, sinks_an_image: Sequence[int]) -> list[list[int]]:
    """Deals kinds of sink out to registers, each once before any twice, given how many an image has of each.

    Returns:
        Each register's kinds: none where registers are the more, several where kinds are.
    """
    turns = range(max(sinks_an_image))
    order = [kind for turn in turns for kind, count in enumerate(sinks_an_image) if turn < count]
    dealt: list[list[int]] = [[] for _ in range(num_registers)]
    for place, kind in enumerate(order[: max(num_registers, len(sinks_an_image))]):
        dealt[place % num_registers].append(kind)
    return dealt


def starting_tokens(sinks: Sinks, num_registers: int, seed: int) -> Float[Tensor, "registers width"]:
    """Starts registers from triggers of their kinds, the most frequent first, and at random without a kind.

    A register of several kinds starts halfway between their triggers.
    """
    tokens = initial_registers(num_registers, sinks.triggers[0].shape[1], seed=seed)
    unused = [iter(own) for own in sinks.triggers]
    for register, kinds in enumerate(assign_registers(num_registers, [len(own) for own in sinks.triggers])):
        if kinds:
            tokens[register] = torch.stack([next(unused[kind]) for kind in kinds]).mean(0)
    return tokens


def add_starting_registers(
    student: Backbone,
    sinks: Sinks | None,
    count: int,
    init: Literal["triggers", "randn", "trunc-normal", "zeros"],
    seed: int,
) -> None:
    """Adds registers to a model that start as asked; from triggers, at random where no sinks are known."""
    if init != "triggers":
        add_registers(student, count, init, seed)
    elif sinks is None:
        add_registers(student, count, "randn", seed)
    elif count:
        student.insert_registers(starting_tokens(sinks, count, seed))


class Relocation:
    """The relocation loss of a patched model.

    Args:
        backbone: The model, with registers.
        sinks: Its sinks, found before it had any; it names at least one cause.
    """

    def __init__(self, backbone: Backbone, sinks: Sinks) -> None:
        self.backbone = backbone
        causes = sinks.by_block()
        self._reader = UnitReader(
            backbone, {block: [unit.index for unit in units] for block, units in causes.items()}
        )

        def there(values: list[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=backbone.device)

        self._level = {block: there([unit.level for unit in units]) for block, units in causes.items()}
        self._fed = {block: there([unit.fed for unit in units]) for block, units in causes.items()}
        dealt = assign_registers(backbone.num_registers, [len(own) for own in sinks.triggers])
        self._asked = {
            block: there([[unit.kind in kinds for unit in units] for kinds in dealt])
            for block, units in causes.items()
        }

    def capture(self) -> AbstractContextManager[dict[int, UnitActivations]]:
        """Collects hidden units while the model runs; give them to `loss`."""
        return self._reader.capture()

    def loss(
        self, readings: dict[int, UnitActivations], images: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, ""]:
        """Computes the loss, in fp32, from what was collected on some images."""
        layout = self.backbone.layout(images)
        terms = []
        for block, reading in readings.items():
            asked, relative = self._asked[block], self._relative(block, reading)
            # Zero, with a gradient.
            proportional = layout.registers(reading.fed).float() / self._fed[block]
            held = layout.registers(relative).detach() + (proportional - proportional.detach()).sum(-1)
            on_registers = ((held - 1).square() * asked).sum(1).mean(0) / asked.sum(0)
            on_patches = layout.patches(relative).clamp_min(0).sum(1).mean(0)
            terms.append(on_registers + on_patches)
        return torch.cat(terms).mean()

    @torch.no_grad()
    def silenced(self, readings: dict[int, UnitActivations]) -> list[str]:
        """Names the units, as block:unit, that no register asked for them holds at half their level."""
        start = self.backbone.spec.num_prefix
        names = []
        for block, reading in readings.items():
            asked, relative = self._asked[block], self._relative(block, reading)
            held = (relative[:, start : start + len(asked)].mean(0) * asked).amax(0)
            names += [f"{block}:{unit}" for unit in self._reader.units[block][held < 0.5].tolist()]
        return names

    def _relative(self, block: int, reading: UnitActivations) -> Float[Tensor, "batch tokens units"]:
        """Reads the units of a block; 1 is their level on the original outliers."""
        return reading.hidden.float() / self._level[block]
