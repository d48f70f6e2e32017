"""Finds the hidden units that make outliers emerge, and the earlier units that activate those.

At some block, MLP hidden units respond to a few tokens with activations far beyond any other and write one
huge vector into them (register neurons: Jiang et al. 2025, arXiv 2506.08010): one unit, or a hundred and more
over several blocks. The search adds the units that write most, round by round:

    MLP of the block where outliers emerge ──► what it writes into them alone, divided among its units
    the same images, all units so far fixed at their baseline ──► fewer outliers, or they emerge later?

The second step is the proof. No threshold is needed before it. Where fixing units does not help, attention or
the input makes the outliers; then no unit is named.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.analysis.gap import outlier_mask
from phreg.analysis.norms import NormReport
from phreg.backbones.base import Backbone
from phreg.sinks.units import Unit, ahead_of, at_baseline, reading_units
from phreg.tokens import ImageBatch

logger = logging.getLogger(__name__)

COVERED = 0.9
"""Share of the vector written into outliers that the units named in one round have to explain."""

OWN = 0.5
"""Largest activation of a cause on other patches, as a share of its sink level."""

COUNTERACTS = 0.1
"""Share of that vector that a unit has to take away to be named with those that write it."""

ROUNDS = 8
"""Most rounds of the search. A round takes two passes over the images: one names units, one tests them."""

WORTH_IT = 0.05
"""Smallest share of the outliers that a round has to remove for its units to count as a cause."""

TRACED = 16
"""Images that the upstream chain is traced on; it takes a backward pass."""

CHAIN_SHARE = 0.05
"""Smallest share of the units' excess that an upstream unit has to carry to be named."""


@dataclass(frozen=True)
class Outliers:
    """The outliers that remain while some units are fixed at their baseline.

    Attributes:
        units: Those units.
        masks: The outliers among the patches, batch by batch.
        block: The first block in which most of them are beyond the gap.
    """

    units: tuple[Unit, ...]
    masks: list[Bool[Tensor, "_ patches"]]
    block: int

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(int(mask.sum()) for mask in self.masks)


def find_causes(
    backbone: Backbone, batches: Sequence[ImageBatch], norms: NormReport, every: Outliers
) -> Outliers:
    """Finds the units that cause a model's outliers.

    A round may remove no outlier and still be right: what many units write together in several blocks is gone
    when all of them are fixed. So the search goes on as long as outliers get fewer, or emerge later.

    Args:
        backbone: The model.
        batches: Normalised images, read twice a round.
        norms: Its norms on them.
        every: Its outliers as they are.

    Returns:
        Those that remain while the causes are fixed at their baseline.
    """
    best = found = every
    for _ in range(ROUNDS):
        named = _name_units(backbone, batches, found)
        logger.info("sinks in block %d: trying whether hidden units cause them (%d)", found.block, len(named))
        if not named:
            break
        tried = remaining_outliers(backbone, batches, norms, (*found.units, *named))
        fewer = found.count - tried.count >= WORTH_IT * every.count
        if not fewer and tried.block <= found.block:
            break
        found = tried
        if best.count - found.count >= WORTH_IT * every.count:
            best = found
        if found.count < WORTH_IT * every.count:  # no further round can remove enough
            break
    return best


def remaining_outliers(
    backbone: Backbone, batches: Sequence[ImageBatch], norms: NormReport, units: tuple[Unit, ...]
) -> Outliers:
    """Finds the outliers that remain while units are fixed, and the block where they emerge."""
    focus = norms.blocks[norms.focus].block
    blocks = [block for block in range(focus + 1) if norms.blocks[block].gap is not None]
    beyond = dict.fromkeys(blocks, 0)
    masks = []
    for images in batches:
        layout = backbone.layout(images)
        with at_baseline(backbone, units):
            tokens = backbone.block_tokens(images, blocks)
        found = {
            block: outlier_mask(layout.patches(value).float().norm(dim=-1), norms.blocks[block].gap)
            for block, value in tokens.items()
        }
        masks.append(found[focus])
        for block in blocks:
            beyond[block] += int(found[block][found[focus]].sum())
    total = beyond[focus]
    return Outliers(units, masks, next((block for block in blocks if beyond[block] > total / 2), focus))


def _name_units(backbone: Backbone, batches: Sequence[ImageBatch], found: Outliers) -> tuple[Unit, ...]:
    """Names the units that make outliers emerge: those that write most into outliers and not into others.

    The MLP writes W (h - h'); h and h' are the mean hidden units of outliers and of other patches. A unit's
    share is its part of that vector's length. Shares add up to 1. A unit that also responds to other patches
    is no candidate: they need it. A unit that takes much of it away again is named too: alone, it would write
    the opposite.
    """
    block, mlp = found.block, backbone.mlp(found.block)
    if mlp is None:
        return ()
    means = _mean_activations(backbone, batches, found, [block]).get(block)
    if means is None:
        return ()
    excess = means.outlier - means.baseline
    down = mlp.down.weight.cpu().double()
    write = down @ excess
    if not write.any():  # the MLP writes into outliers what it writes elsewhere
        return ()
    shares = excess * (down.T @ write) / write.square().sum()
    shares = torch.where(means.baseline.abs() < OWN * means.peak.abs(), shares, 0)
    writing = shares.clamp_min(0)
    if not writing.any():
        return ()
    order = writing.argsort(descending=True)
    needed = 1 + int((writing[order].cumsum(0) < COVERED * writing.sum()).sum())
    named = order[:needed].tolist() + (shares < -COUNTERACTS).nonzero().flatten().tolist()
    return tuple(
        Unit(block, index, float(means.peak[index]), float(means.baseline[index]), float(shares[index]))
        for index in named
    )


class _MeanActivations(NamedTuple):
    """Hidden units of one block, in fp64, on the CPU."""

    outlier: Float[Tensor, " hidden"]
    """Mean over outliers."""
    baseline: Float[Tensor, " hidden"]
    """Mean over other patches."""
    peak: Float[Tensor, " hidden"]
    """E[h²] / E[h] over outliers: the sink level, also of a unit that responds to only some of them."""


def _mean_activations(
    backbone: Backbone, batches: Sequence[ImageBatch], found: Outliers, blocks: Sequence[int]
) -> dict[int, _MeanActivations]:
    """Measures hidden units on the remaining outliers and elsewhere; empty where there are no outliers."""
    sums: dict[int, Tensor] = {}
    counts = torch.zeros(2, dtype=torch.float64)
    for images, mask in zip(batches, found.masks, strict=True):
        # Read first: a fixed unit is measured as it would be.
        with reading_units(backbone, blocks) as hidden, at_baseline(backbone, found.units):
            backbone.run(images)
        counts += torch.tensor([int(mask.sum()), int((~mask).sum())])
        for block, value in hidden.items():
            patches = backbone.layout(images).patches(value)
            inside, outside = patches[mask].float(), patches[~mask].float()
            part = torch.stack([inside.sum(0), outside.sum(0), inside.square().sum(0)])
            sums[block] = sums.get(block, 0) + part.cpu().double()
    if not counts.all():
        return {}
    means = {}
    for block, (inside, outside, squares) in sums.items():
        safe = torch.where(inside == 0, torch.ones_like(inside), inside)
        means[block] = _MeanActivations(inside / counts[0].item(), outside / counts[1].item(), squares / safe)
    return means


def upstream_chain(
    backbone: Backbone, batches: Sequence[ImageBatch], every: Outliers, causes: Sequence[Unit]
) -> tuple[Unit, ...]:
    """Finds the units that activate the causes in the first block that has any, to first order.

    An upstream unit's share is its excess on an outlier, times the gradient of the causes' activation there,
    divided by the causes' own excess.
    """
    if not causes or not min(unit.block for unit in causes):
        return ()
    block = min(unit.block for unit in causes)
    causes = [unit for unit in causes if unit.block == block]
    upstream = list(range(block))
    means = _mean_activations(backbone, batches, every, upstream)
    weights = {unit.index: 1 / unit.sink_level for unit in causes if unit.sink_level}
    shares: dict[int, Tensor] = {}
    count = 0
    for images, mask in _first(zip(batches, every.masks, strict=True), TRACED):
        layout = backbone.layout(images)
        with (
            torch.enable_grad(),
            ahead_of(
                backbone.first_block_input, lambda _m, args: (args[0].detach().requires_grad_(), *args[1:])
            ),
            reading_units(backbone, [*upstream, block]) as hidden,
        ):
            backbone.run(images)
            at_causes = layout.patches(hidden.pop(block))[mask]
            scale = at_causes.new_tensor(list(weights.values()))
            objective = (at_causes[:, list(weights)] * scale).sum()
            gradients = torch.autograd.grad(objective, list(hidden.values()))
        for index, gradient in zip(hidden, gradients, strict=True):
            excess = layout.patches(hidden[index])[mask].cpu().double() - means[index].baseline
            share = (excess * layout.patches(gradient)[mask].cpu().double()).sum(0)
            shares[index] = shares.get(index, 0) + share
        count += int(mask.sum())
    whole = sum(weights[unit.index] * (unit.sink_level - unit.baseline) for unit in causes if unit.sink_level)
    chain = [
        Unit(
            block=upstream_block,
            index=index,
            sink_level=float(means[upstream_block].peak[index]),
            baseline=float(means[upstream_block].baseline[index]),
            share=part,
            cluster=None,
        )
        for upstream_block, share in shares.items()
        for index, part in enumerate((share / (count * whole)).tolist())
        if part >= CHAIN_SHARE
    ]
    return tuple(sorted(chain, key=lambda unit: -unit.share))


def _first(batches: Iterable[tuple[ImageBatch, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Takes images, and their masks, up to a count."""
    for images, mask in batches:
        if count <= 0:
            return
        yield images[:count], mask[:count]
        count -= len(images[:count])
