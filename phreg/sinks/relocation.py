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

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.registers import add_registers, initial_registers
from phreg.sinks.locate import Sinks
from phreg.sinks.units import UnitActivations, UnitReader, ahead_of

BESIDE = 0.1
"""Noise on registers that start at the mean patch token, as a share of a random register."""


def assign_registers(num_registers: int, sinks_an_image: Sequence[int]) -> list[list[int]]:
    """Assigns clusters of sinks to registers, each once before any twice.

    Args:
        num_registers: Registers.
        sinks_an_image: Sinks that an image has of each cluster.

    Returns:
        Each register's clusters: none where there are more registers, several where there are more clusters.
    """
    turns = range(max(sinks_an_image))
    order = [cluster for turn in turns for cluster, count in enumerate(sinks_an_image) if turn < count]
    assigned: list[list[int]] = [[] for _ in range(num_registers)]
    for number, cluster in enumerate(order[: max(num_registers, len(sinks_an_image))]):
        assigned[number % num_registers].append(cluster)
    return assigned


@torch.no_grad()
def mean_patch(backbone: Backbone, batches: Iterable[Float[Tensor, "_ 3 _ _"]]) -> Float[Tensor, " width"]:
    """Returns the mean of all patch tokens that enter the blocks, over images and positions, before any norm.

    Such a token draws the attention of an average patch and adds what an average patch adds. Sixteen near it
    change a real DINOv2 less than four random ones do (tests/sinks/test_relocation.py).
    """
    entered: list[Tensor] = []
    sums = []
    with ahead_of(backbone.first_block_input, lambda _module, args: entered.append(args[0])):
        for images in batches:
            backbone.run(images)
            patches = backbone.layout(images).patches(entered.pop())
            sums.append((patches.double().sum((0, 1)).cpu(), patches.shape[:2].numel()))
    return (torch.stack([total for total, _ in sums]).sum(0) / sum(count for _, count in sums)).float()


def starting_tokens(sinks: Sinks, num_registers: int, seed: int) -> Float[Tensor, "registers width"]:
    """Starts registers from triggers of their clusters, the most frequent first; at random without a cluster.

    A register of several clusters starts at the mean of their triggers.
    """
    return _with_triggers(initial_registers(num_registers, sinks.triggers[0].shape[1], seed=seed), sinks)


def neutral_tokens(
    sinks: Sinks | None, mean: Float[Tensor, " width"], num_registers: int, seed: int
) -> Float[Tensor, "registers width"]:
    """Starts registers as `starting_tokens` does, and those without a cluster at the mean patch token.

    These lie a little beside it, so that no two are alike.
    """
    tokens = mean + BESIDE * initial_registers(num_registers, len(mean), seed=seed)
    return tokens if sinks is None else _with_triggers(tokens, sinks)


def _with_triggers(
    tokens: Float[Tensor, "registers width"], sinks: Sinks
) -> Float[Tensor, "registers width"]:
    """Replaces the tokens of registers that have a cluster by its triggers."""
    unused = [iter(own) for own in sinks.triggers]
    assigned = assign_registers(len(tokens), [len(own) for own in sinks.triggers])
    for register, clusters in enumerate(assigned):
        if clusters:
            tokens[register] = torch.stack([next(unused[cluster]) for cluster in clusters]).mean(0)
    return tokens


def add_starting_registers(
    student: Backbone,
    sinks: Sinks | None,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    count: int,
    init: Literal["triggers", "neutral", "randn", "trunc-normal", "zeros"],
    seed: int,
) -> None:
    """Adds registers that start as `init` says.

    Args:
        student: The model.
        sinks: Its sinks, where they are known.
        batches: Normalised images, for the mean patch token.
        count: Registers.
        init: How they start. From triggers, those without a sink start at random.
        seed: Seed of what is random.
    """
    if init == "triggers" and sinks is None:
        init = "randn"
    if init not in ("triggers", "neutral"):
        add_registers(student, count, init, seed)
    elif count and init == "triggers" and sinks is not None:
        student.insert_registers(starting_tokens(sinks, count, seed))
    elif count:
        student.insert_registers(neutral_tokens(sinks, mean_patch(student, batches), count, seed))


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
