"""Finds out why a model has artifacts: where they emerge, which hidden units make them, what triggers them.

Artifacts are sinks. At some block, a few MLP hidden units respond to a few tokens with activations far beyond
any other and write one huge vector into them (register neurons: Jiang et al. 2025, arXiv 2506.08010). From
there on these tokens attract attention and hold no local content. The search for these units has three steps.
Each of them can find nothing:

    norms of every block ──gap──► outlier tokens, the block where they emerge
    MLP of that block    ──► what it writes into outliers and not into others, divided among its units
    the same images, those units fixed at their baseline ──► are the outliers gone?

The third step is the proof. No threshold is needed before it. While outliers remain, the search continues at
the block where they emerge, so it finds several clusters of sinks, at several blocks. Where fixing the units
does not help, attention or the input makes the sinks; then no unit is named.

Units that respond to the same outliers form one cluster. Each cluster has its own triggers: a token that
triggers one cluster leaves the units of another silent.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.analysis.attention import attention_weights
from phreg.analysis.gap import outlier_mask
from phreg.analysis.norms import NormReport, outliers
from phreg.analysis.positions import fixed_share
from phreg.backbones.base import Backbone
from phreg.deprecated import current_attribute
from phreg.errors import UnsupportedModelError
from phreg.sinks.clusters import sink_clusters
from phreg.sinks.units import Unit, UnitReader, ahead_of, at_baseline, by_block, reading_units
from phreg.tokens import ImageBatch

logger = logging.getLogger(__name__)

COVERED = 0.9
"""Share of the vector written into outliers that the units named in one round have to explain."""

OWN = 0.5
"""Largest activation of a cause on other patches, as a share of its sink level."""

ROUNDS = 8
"""Most rounds of the search. A round takes two passes over the images: one names units, one tests them."""

WORTH_IT = 0.05
"""Smallest share of the outliers that a round has to remove for its units to count as a cause."""

TRACED = 16
"""Images that the upstream chain is traced on; it takes a backward pass."""

CHAIN_SHARE = 0.05
"""Smallest share of the units' excess that an upstream unit has to carry to be named."""


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of a model.

    Attributes:
        norms: The norms that show them.
        block: Index of the block where they emerge.
        units: Hidden units that cause them; none where no unit does.
        explained: Share of the outliers that vanish when those units are fixed at their baseline.
        chain: Units of earlier blocks that activate the causes, by share.
        attention: Share of CLS attention (without CLS, of the patches') that falls on outliers, by block.
        triggers: For each cluster, the tokens that enter the blocks at its outliers, before any norm. There
            are as many as an image has outliers on average: the means at the positions that have most of
            them. With several clusters, a cluster's outliers are those that its units respond to; with one,
            they are all outliers.
    """

    norms: NormReport
    block: int
    units: tuple[Unit, ...]
    explained: float
    chain: tuple[Unit, ...]
    attention: tuple[float, ...] | None
    triggers: tuple[Float[Tensor, "_ width"], ...]

    @property
    def fixed(self) -> bool:
        """Whether position triggers them rather than content: most lie where most images have one."""
        return fixed_share(self.norms.position_histogram) > 0.5

    @property
    def an_image(self) -> int:
        """How many sinks an image has on average, at least one of each cluster."""
        return sum(map(len, self.triggers))

    def by_block(self) -> dict[int, list[Unit]]:
        """The causes, block by block, first to last."""
        return by_block(self.units)

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold; norms have a JSON of their own."""
        return {
            "emergence_block": self.block,
            "units": [unit.to_json() for unit in self.units],
            "explained": self.explained,
            "chain": [unit.to_json() for unit in self.chain],
            "attention_share": list(self.attention) if self.attention else None,
            "triggered_by": "position" if self.fixed else "content",
        }


@torch.no_grad()
def find_sinks(
    backbone: Backbone, batches: Sequence[ImageBatch], norms: NormReport | None = None
) -> Sinks | None:
    """Finds a model's sinks and what causes them.

    The same images give the same answer. The model runs in the mode it is in; put it in eval mode first.

    Args:
        backbone: The model, without registers of phreg.
        batches: Normalised images of one size, a few dozen at least. They are read several times.
        norms: Its norms on these images in every block, if known already.

    Returns:
        The sinks; None where the norms of no block show any: there is nothing to repair.

    Raises:
        DataError: There are no images, or their sizes differ.
    """
    norms = outliers(backbone, batches) if norms is None else norms
    emergence = norms.emergence_block
    if emergence is None:
        return None
    found = every = _remaining(backbone, batches, norms, ())
    for _ in range(ROUNDS):
        named = _name_units(backbone, batches, found)
        logger.info("sinks in block %d: trying whether hidden units cause them (%d)", found.block, len(named))
        tried = _remaining(backbone, batches, norms, (*found.units, *named)) if named else found
        if found.count - tried.count < WORTH_IT * every.count:
            break
        found = tried
        if found.count < WORTH_IT * every.count:  # no further round can remove enough
            break
    units, members = sink_clusters(
        backbone, batches, every.masks, _with_pre_activation(backbone, batches, every, found.units)
    )
    return Sinks(
        norms=norms,
        block=emergence,
        units=units,
        explained=1 - found.count / every.count,
        chain=_chain(backbone, batches, every, units),
        attention=_attention_share(backbone, batches, every),
        triggers=tuple(_triggers(backbone, batches, masks) for masks in members),
    )


# -- the search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outliers:
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
        return sum(int(mask.sum()) for mask in self.masks)


def _remaining(
    backbone: Backbone, batches: Sequence[ImageBatch], norms: NormReport, units: tuple[Unit, ...]
) -> _Outliers:
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
    return _Outliers(units, masks, next((block for block in blocks if beyond[block] > total / 2), focus))


def _name_units(backbone: Backbone, batches: Sequence[ImageBatch], found: _Outliers) -> tuple[Unit, ...]:
    """Names the units that make outliers emerge: those that write most into outliers and not into others.

    The MLP writes W (h - h'); h and h' are the mean hidden units of outliers and of other patches. A unit's
    share is its part of that vector's length. Shares add up to 1. A unit that also responds to other patches
    is no candidate: they need it.
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
    shares = torch.where(means.baseline.abs() < OWN * means.peak.abs(), shares, 0).clamp_min(0)
    if not shares.any():
        return ()
    order = shares.argsort(descending=True)
    needed = 1 + int((shares[order].cumsum(0) < COVERED * shares.sum()).sum())
    return tuple(
        Unit(block, index, float(means.peak[index]), float(means.baseline[index]), float(shares[index]))
        for index in order[:needed].tolist()
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
    backbone: Backbone, batches: Sequence[ImageBatch], found: _Outliers, blocks: Sequence[int]
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


# -- what triggers them, and what they hold ------------------------------------------------------------------


def _with_pre_activation(
    backbone: Backbone, batches: Sequence[ImageBatch], every: _Outliers, units: tuple[Unit, ...]
) -> tuple[Unit, ...]:
    """Adds the pre-activation at the sink level: a mean over outliers, weighted by the unit's activation."""
    if not units:
        return ()
    reader = UnitReader(
        backbone, {block: [unit.index for unit in own] for block, own in by_block(units).items()}
    )
    sums: dict[int, Tensor] = {}
    for images, mask in zip(batches, every.masks, strict=True):
        with reader.capture() as found:
            backbone.run(images)
        patches = backbone.layout(images).patches
        for block, (hidden, pre_activation) in found.items():
            weight = patches(hidden)[mask].unsqueeze(-1).float()
            part = torch.cat([weight * patches(pre_activation)[mask].float(), weight], dim=-1).sum(0)
            sums[block] = sums.get(block, 0) + part.cpu().double()
    means = {block: (total[:, :-1] / total[:, -1:]).tolist() for block, total in sums.items()}
    return tuple(replace(unit, pre_activation=tuple(means[unit.block].pop(0))) for unit in units)


def _triggers(
    backbone: Backbone, batches: Sequence[ImageBatch], masks: Sequence[Bool[Tensor, "_ patches"]]
) -> Float[Tensor, "positions width"]:
    """Averages the tokens that enter the blocks at outliers, position by position.

    Returns:
        As many means as an image has outliers on average, rounded; of the positions that have most.
    """
    entered: list[Tensor] = []
    totals, counts = [], []
    with ahead_of(backbone.first_block_input, lambda _module, args: entered.append(args[0])):
        for images, mask in zip(batches, masks, strict=True):
            backbone.run(images)
            entry = backbone.layout(images).patches(entered.pop()).float()
            totals.append(torch.einsum("bp,bpw->pw", mask.float(), entry).cpu().double())
            counts.append(mask.sum(0).cpu())
    total, count = torch.stack(totals).sum(0), torch.stack(counts).sum(0)
    an_image = max(1, round(int(count.sum()) / sum(map(len, masks))))
    order = count.argsort(descending=True, stable=True)[:an_image]
    return (total[order] / count[order].unsqueeze(-1)).float()


def _attention_share(
    backbone: Backbone, batches: Sequence[ImageBatch], every: _Outliers
) -> tuple[float, ...] | None:
    """Measures the share of attention that falls on outliers, block by block."""
    queries = slice(0, 1) if backbone.class_tokens else slice(None)
    shares = []
    for images, mask in zip(batches, every.masks, strict=True):
        try:
            weights = attention_weights(backbone, images, queries, lambda block: block.mean((1, 2)))
        except UnsupportedModelError as error:
            logger.info("the sinks' share of attention is not known: %s", error)
            return None
        start = backbone.layout(images).num_tokens - mask.shape[1]
        shares.append(torch.stack([(block[:, start:] * mask).sum(1) for block in weights]))
    return tuple(torch.cat(shares, dim=1).mean(1).tolist())


def _chain(
    backbone: Backbone, batches: Sequence[ImageBatch], every: _Outliers, causes: Sequence[Unit]
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


def __getattr__(name: str) -> Any:
    """Finds a function by its old name, with a warning."""
    if (new := current_attribute(__name__, name)) is not None:
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
