"""Finds out why a model has artifacts: where they emerge, which hidden units make them, what sets them off.

Artifacts are sinks. At some block, a few MLP hidden units answer to a few tokens with activations far beyond
any other and write one huge vector into them (register neurons: Jiang et al. 2025, arXiv 2506.08010); from
there on these tokens draw attention and hold no local content. Which units they are is asked in three steps,
each of which can come out empty:

    norms of every block ──gap──► outlier tokens, the block where they emerge
    MLP of that block    ──► what it writes into outliers and not into others, shared out among its units
    the same images, those units held at their ordinary level ──► are the outliers gone?

The third step is the proof, and no threshold is needed before it. While outliers remain, the search goes on
where the remaining ones emerge, so that several kinds of sink are found, at several blocks. Where holding
units does not help, attention or the input makes the sinks; then no unit is named.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from phreg.analysis.attention import attention_weights
from phreg.analysis.norms import NormReport, outlier_mask, outliers
from phreg.analysis.positions import fixed_share
from phreg.backbones.base import Backbone
from phreg.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

# Nothing is bound by this shape: the last batch may be smaller than the others.
Images = Float[Tensor, "_ 3 _ _"]

COVERED = 0.9
"""Share of what an MLP writes into outliers alone that a round of the search names units for."""

ROUNDS = 8
"""Most rounds of the search; each is one pass over the images."""

GONE = 0.99
"""Share of the outliers whose end ends the search."""

WORTH_IT = 0.05
"""Smallest share of the outliers that a round has to remove for its units to count as a cause."""

TRACED = 16
"""Images that the upstream chain is traced on; it takes a backward pass."""

CHAIN_SHARE = 0.05
"""Smallest share of the units' excess that an upstream unit has to carry to be named."""


@dataclass(frozen=True)
class Unit:
    """One hidden unit of an MLP.

    Attributes:
        block: Index of its block.
        index: Its index among the block's hidden units.
        level: Its activation on the outliers it answers to.
        ordinary: Its mean activation on all other patches.
        share: For a cause, its share of what the MLP writes into outliers and not into others; for an
            upstream unit, its share of what sets the causes off, to first order. Shares add up to 1 over all
            units, those that work against it being negative, so that one alone can exceed 1.
    """

    block: int
    index: int
    level: float
    ordinary: float
    share: float


@dataclass(frozen=True, eq=False)
class Sinks:
    """The sinks of a model.

    Attributes:
        norms: The norms that show them.
        block: Index of the block where they emerge.
        units: Hidden units that cause them; none where no unit does.
        explained: Share of the outliers that vanish when those units are held at their ordinary level.
        chain: Units of earlier blocks that set the causes off, by share.
        attention: Share of CLS attention (where there is no CLS, of the patches') that falls on outliers,
            block by block.
        triggers: What enters the blocks at outliers, before any norm: the mean at each position, the
            positions with most outliers first.
    """

    norms: NormReport
    block: int
    units: tuple[Unit, ...]
    explained: float
    chain: tuple[Unit, ...]
    attention: tuple[float, ...] | None
    triggers: Float[Tensor, "positions width"]

    @property
    def fixed(self) -> bool:
        """Whether position sets them off rather than content: most lie where most images have one."""
        return fixed_share(self.norms.position_histogram) > 0.5

    def by_block(self) -> dict[int, list[Unit]]:
        """The causes, block by block, first to last."""
        blocks = sorted({unit.block for unit in self.units})
        return {block: [unit for unit in self.units if unit.block == block] for block in blocks}

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold; norms have a JSON of their own."""
        return {
            "emergence_block": self.block,
            "units": [asdict(unit) for unit in self.units],
            "explained": self.explained,
            "chain": [asdict(unit) for unit in self.chain],
            "attention_share": list(self.attention) if self.attention else None,
            "triggered_by": "position" if self.fixed else "content",
        }


@torch.no_grad()
def locate(backbone: Backbone, batches: Sequence[Images], norms: NormReport | None = None) -> Sinks | None:
    """Finds a model's sinks and what causes them.

    The same images give the same answer. The model runs in the mode it is in; put it in eval mode first.

    Args:
        backbone: The model, without registers of phreg.
        batches: Normalised images of one size, a few dozen at least; they are passed over several times.
        norms: Its norms on these images in every block, where they are known already.

    Returns:
        The sinks; None where the norms of no block show any: there is nothing to repair.

    Raises:
        DataError: There are no images, or their sizes differ.
    """
    norms = outliers(backbone, batches) if norms is None else norms
    emergence = norms.emergence_block
    if emergence is None:
        return None
    found = _Found(norms.blocks[norms.focus].block, norms)
    at_first = before = found.count(backbone, batches)
    for _ in range(ROUNDS):
        block = found.emergence(backbone, batches)
        named = _name_units(backbone, batches, found, block)
        after = found.with_units(named).count(backbone, batches) if named else before
        if before - after < WORTH_IT * at_first:
            break
        found, before = found.with_units(named), after
        if after <= (1 - GONE) * at_first:
            break
    plain = replace(found, units=())
    return Sinks(
        norms=norms,
        block=emergence,
        units=found.units,
        explained=1 - before / at_first,
        chain=_chain(backbone, batches, plain, found.units),
        attention=_attention_share(backbone, batches, plain),
        triggers=_triggers(backbone, batches, plain),
    )


@contextmanager
def reading_units(backbone: Backbone, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the hidden units of some blocks' MLPs, (batch, tokens, hidden), while the model runs."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            found[block] = args[0]

        return hook

    with ExitStack() as stack:
        for block in blocks:
            if (mlp := backbone.mlp(block)) is not None:
                stack.enter_context(_hooked(mlp.down, keep(block)))
        yield found


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# -- the search ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """The units named so far, and the outliers that remain while they are held at their ordinary level."""

    focus: int
    norms: NormReport
    units: tuple[Unit, ...] = ()

    def with_units(self, units: Sequence[Unit]) -> "_Found":
        return replace(self, units=(*self.units, *units))

    def run(
        self, backbone: Backbone, images: Tensor, taps: Sequence[int], reads: Sequence[int] = ()
    ) -> tuple[dict[int, Tensor], dict[int, Tensor], Bool[Tensor, "batch patches"]]:
        """Runs the model with the units held: patch tokens of blocks, hidden units of patches, outliers."""
        layout = backbone.layout(images)
        start = layout.num_tokens - layout.num_patches
        with ExitStack() as stack:
            hidden = stack.enter_context(reading_units(backbone, reads))
            for block in {unit.block for unit in self.units}:
                held = [unit for unit in self.units if unit.block == block]
                mlp = backbone.mlp(block)
                assert mlp is not None  # units were found there
                stack.enter_context(_hooked(mlp.down, _Hold(held, start)))
            tokens = backbone.block_tokens(images, sorted({*taps, self.focus}))
        patches = {block: layout.patches(value).float() for block, value in tokens.items()}
        hidden = {block: layout.patches(value) for block, value in hidden.items()}
        return patches, hidden, self.beyond(self.focus, patches[self.focus])

    def beyond(self, block: int, patches: Float[Tensor, "batch patches width"]) -> Tensor:
        """Marks the tokens of a block beyond its gap."""
        return outlier_mask(patches.norm(dim=-1), self.norms.blocks[block].gap)

    def count(self, backbone: Backbone, batches: Sequence[Images]) -> int:
        return sum(int(self.run(backbone, images, ())[2].sum()) for images in batches)

    def emergence(self, backbone: Backbone, batches: Sequence[Images]) -> int:
        """Finds the first block in which most of the remaining outliers are beyond the gap already."""
        blocks = [place for place in range(self.focus + 1) if self.norms.blocks[place].gap is not None]
        beyond = dict.fromkeys(blocks, 0)
        total = 0
        for images in batches:
            patches, _, mask = self.run(backbone, images, blocks)
            total += int(mask.sum())
            for block in blocks:
                beyond[block] += int(self.beyond(block, patches[block])[mask].sum())
        return next((block for block in blocks if beyond[block] > total / 2), self.focus)


class _Hold:
    """A pre-hook that holds units of patches at their ordinary level."""

    def __init__(self, units: Sequence[Unit], start: int) -> None:
        self.index = [unit.index for unit in units]
        self.ordinary = [unit.ordinary for unit in units]
        self.start = start

    def __call__(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0].clone()
        hidden[:, self.start :, self.index] = hidden.new_tensor(self.ordinary)
        return (hidden,)


def _name_units(backbone: Backbone, batches: Sequence[Images], found: _Found, block: int) -> tuple[Unit, ...]:
    """Shares out what a block's MLP writes into the remaining outliers, and not into others, among its units.

    That is W (h - h'), h and h' being the mean hidden units of outliers and of other patches. A unit's share
    is its part of that vector's length; shares add up to 1.
    """
    mlp = backbone.mlp(block)
    if mlp is None:
        return ()
    levels = _levels(backbone, batches, found, [block]).get(block)
    if levels is None:
        return ()
    excess = levels.outlier - levels.ordinary
    down = mlp.down.weight.cpu().double()
    write = down @ excess
    shares = excess * (down.T @ write) / write.square().sum().clamp_min(1e-30)
    order = shares.argsort(descending=True)
    needed = 1 + int((shares[order].cumsum(0) < COVERED).sum())
    return tuple(
        Unit(block, index, float(levels.peak[index]), float(levels.ordinary[index]), float(shares[index]))
        for index in order[:needed].tolist()
    )


class _Levels(NamedTuple):
    """Hidden units of one block, in fp64, on the CPU."""

    outlier: Float[Tensor, " hidden"]
    """Mean over outliers."""
    ordinary: Float[Tensor, " hidden"]
    """Mean over other patches."""
    peak: Float[Tensor, " hidden"]
    """E[h²] / E[h] over outliers: the level where a unit answers to some of them, as if it were to all."""


def _levels(
    backbone: Backbone, batches: Sequence[Images], found: _Found, blocks: Sequence[int]
) -> dict[int, _Levels]:
    """Measures hidden units on the remaining outliers and elsewhere; nothing where there are no outliers."""
    sums: dict[int, Tensor] = {}
    counts = torch.zeros(2, dtype=torch.float64)
    for images in batches:
        _, hidden, mask = found.run(backbone, images, (), blocks)
        counts += torch.tensor([int(mask.sum()), int((~mask).sum())])
        for block, value in hidden.items():
            inside, outside = value[mask].float(), value[~mask].float()
            part = torch.stack([inside.sum(0), outside.sum(0), inside.square().sum(0)])
            sums[block] = sums.get(block, 0) + part.cpu().double()
    if not counts.all():
        return {}
    levels = {}
    for block, (inside, outside, squares) in sums.items():
        safe = torch.where(inside == 0, torch.ones_like(inside), inside)
        levels[block] = _Levels(inside / counts[0].item(), outside / counts[1].item(), squares / safe)
    return levels


# -- what sets them off, and what they hold ------------------------------------------------------------------


def _triggers(
    backbone: Backbone, batches: Sequence[Images], found: _Found
) -> Float[Tensor, "positions width"]:
    """Averages what enters the blocks at outliers, position by position, those with most outliers first."""
    entered: list[Tensor] = []
    totals, counts = [], []
    with _hooked(backbone.entrance, lambda _module, args: entered.append(args[0])):
        for images in batches:
            _, _, mask = found.run(backbone, images, ())
            entry = backbone.layout(images).patches(entered.pop()).float()
            totals.append(torch.einsum("bp,bpw->pw", mask.float(), entry).cpu().double())
            counts.append(mask.sum(0).cpu())
    total, count = torch.stack(totals).sum(0), torch.stack(counts).sum(0)
    order = count.argsort(descending=True, stable=True)
    order = order[count[order] > 0]
    return (total[order] / count[order].unsqueeze(-1)).float()


def _attention_share(
    backbone: Backbone, batches: Sequence[Images], found: _Found
) -> tuple[float, ...] | None:
    """Measures the share of attention that falls on outliers, block by block."""
    queries = slice(0, 1) if backbone.class_tokens else slice(None)
    shares = []
    for images in batches:
        _, _, mask = found.run(backbone, images, ())
        try:
            drawn = attention_weights(backbone, images, queries, lambda weights: weights.mean((1, 2)))
        except UnsupportedModelError as error:
            logger.info("the sinks' share of attention is not known: %s", error)
            return None
        start = backbone.layout(images).num_tokens - mask.shape[1]
        shares.append(torch.stack([(block[:, start:] * mask).sum(1) for block in drawn]))
    return tuple(torch.cat(shares, dim=1).mean(1).tolist())


def _chain(
    backbone: Backbone, batches: Sequence[Images], found: _Found, causes: Sequence[Unit]
) -> tuple[Unit, ...]:
    """Traces what sets off the causes in the first block that has any, to first order.

    An upstream unit's share is its excess on an outlier times the gradient of the causes' activation there,
    over the causes' own excess.
    """
    if not causes or not min(unit.block for unit in causes):
        return ()
    block = min(unit.block for unit in causes)
    causes = [unit for unit in causes if unit.block == block]
    upstream = list(range(block))
    levels = _levels(backbone, batches, found, upstream)
    weights = {unit.index: 1 / unit.level for unit in causes if unit.level}
    shares: dict[int, Tensor] = {}
    count = 0
    for images in _first(batches, TRACED):
        _, _, mask = found.run(backbone, images, ())
        layout = backbone.layout(images)
        with (
            torch.enable_grad(),
            _hooked(backbone.entrance, lambda _m, args: (args[0].detach().requires_grad_(), *args[1:])),
            reading_units(backbone, [*upstream, block]) as hidden,
        ):
            backbone.run(images)
            at_causes = layout.patches(hidden.pop(block))[mask]
            scale = at_causes.new_tensor(list(weights.values()))
            objective = (at_causes[:, list(weights)] * scale).sum()
            gradients = torch.autograd.grad(objective, [hidden[place] for place in hidden])
        for place, gradient in zip(hidden, gradients, strict=True):
            excess = layout.patches(hidden[place]).float()[mask].cpu().double() - levels[place].ordinary
            share = (excess * layout.patches(gradient).float()[mask].cpu().double()).sum(0)
            shares[place] = shares.get(place, 0) + share
        count += int(mask.sum())
    whole = sum(weights[unit.index] * (unit.level - unit.ordinary) for unit in causes if unit.level)
    chain = [
        Unit(
            place, index, float(levels[place].peak[index]), float(levels[place].ordinary[index]), float(part)
        )
        for place, share in shares.items()
        for index, part in enumerate((share / (count * whole)).tolist())
        if part >= CHAIN_SHARE
    ]
    return tuple(sorted(chain, key=lambda unit: -unit.share))


def _first(batches: Sequence[Images], count: int) -> Iterator[Tensor]:
    for images in batches:
        if count <= 0:
            return
        yield images[:count]
        count -= len(images[:count])
