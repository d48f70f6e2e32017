"""Finds out why a model has artifacts: where they emerge, what makes them, and what triggers them.

Artifacts are sinks. At some block a few tokens get one huge vector, from hidden units or from attention. From
there on they attract attention and hold no local content:

    norms of every block ──gap──► outlier tokens, the block where they emerge
                                       ├──► what they hold and others do not, block by block  (`directions`)
                                       ├──► hidden units that write it, if any does           (`causes`)
                                       └──► tokens that trigger it
    the same images, what the sinks hold taken away ──► are there others behind them? once more

The last step finds what sinks hide. Some lie below the gap that longer ones make, and some appear only where
others are gone. Each turn finds one population.

Units that respond to the same outliers form one cluster. Each cluster has its own triggers: a token that
triggers one cluster leaves another silent.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.analysis.attention import attention_weights
from phreg.analysis.norms import NormReport, outliers
from phreg.analysis.positions import fixed_share
from phreg.backbones.base import Backbone
from phreg.deprecated import current_attribute
from phreg.errors import UnsupportedModelError
from phreg.short_table import ShortTable, shown_as_table
from phreg.sinks.causes import Outliers, find_causes, remaining_outliers, upstream_chain
from phreg.sinks.clusters import sink_clusters
from phreg.sinks.directions import SinkDirection, sink_directions, without_sinks
from phreg.sinks.kinds import Kind, kind_of
from phreg.sinks.units import Unit, ahead_of, by_block
from phreg.tokens import ImageBatch

logger = logging.getLogger(__name__)

POPULATIONS = 4
"""Most populations of sinks that the search looks for, one behind the other."""

NEW = 0.5
"""Share of the outliers behind a population that have to be other tokens, for them to be a population."""


@dataclass(frozen=True, eq=False)
class Population:
    """Sinks that one turn of the search finds.

    Attributes:
        block: Index of the block where they emerge.
        last_block: Index of the last block that shows them.
        side: Whether they are longer (`high`) or shorter (`low`) than other tokens.
        rate: Share of all patches.
        units: Hidden units that cause them; none where no unit does.
        explained: Share of them that vanish when those units are fixed at their baseline.
        kind: What writes them, and what attention does with them.
        triggers: For each of their clusters, the tokens that enter the blocks there: see `Sinks`.
        directions: What they hold and other patches do not, by cluster and block.
    """

    block: int
    last_block: int
    side: Literal["high", "low"] | None
    rate: float
    units: tuple[Unit, ...]
    explained: float
    kind: Kind
    triggers: tuple[Float[Tensor, "_ width"], ...]
    directions: tuple[SinkDirection, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold; the units are listed for all populations together."""
        return {
            "emergence_block": self.block,
            "last_block": self.last_block,
            "side": self.side,
            "rate": self.rate,
            "units": len(self.units),
            "explained": self.explained,
            "kind": self.kind.to_json(),
            "sinks_an_image": [len(own) for own in self.triggers],
            "directions": [direction.to_json() for direction in self.directions],
        }


@shown_as_table
@dataclass(frozen=True, eq=False, repr=False)
class Sinks:
    """The sinks of a model.

    Attributes:
        norms: The norms that show them.
        block: Index of the block where they emerge.
        units: Hidden units that cause them; none where no unit does.
        explained: Share of the outliers of all populations that vanish when those units are fixed at their
            baseline.
        chain: Units of earlier blocks that activate the causes, by share.
        attention: Share of CLS attention (without CLS, of the patches') that falls on outliers, by block.
        triggers: For each cluster, the tokens that enter the blocks at its outliers, before any norm. There
            are as many as an image has outliers on average: the means at the positions that have most of
            them. With several clusters, a cluster's outliers are those that its units respond to; with one,
            they are all outliers.
        directions: What the sinks of each cluster hold and other patches do not, after each block that shows
            them; none where sinks have nothing in common.
        populations: What each turn of the search found, first to last. `block`, `chain` and `attention` are
            those of the largest.
    """

    norms: NormReport
    block: int
    units: tuple[Unit, ...]
    explained: float
    chain: tuple[Unit, ...]
    attention: tuple[float, ...] | None
    triggers: tuple[Float[Tensor, "_ width"], ...]
    directions: tuple[SinkDirection, ...] = ()
    populations: tuple[Population, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether position triggers them rather than content: most lie where most images have one."""
        return fixed_share(self.norms.position_histogram) > 0.5

    @property
    def an_image(self) -> int:
        """How many sinks an image has on average, at least one of each cluster."""
        return sum(map(len, self.triggers))

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show: a row a population."""
        rows = [
            (
                f"{each.block} to {each.last_block}",
                f"{100 * each.rate:.2f} %",
                each.kind.writer or "unknown",
                f"{len(each.units)} explain {100 * each.explained:.0f} %",
                each.kind.role or "unknown",
            )
            for each in self.populations
        ]
        heading = ("blocks", "patches", "written by", "hidden units", "attention")
        return ShortTable(f"Sinks, triggered by {'position' if self.fixed else 'content'}", rows, heading)

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
            "populations": [population.to_json() for population in self.populations],
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
    if norms.emergence_block is None:
        return None
    found: list[Population] = []
    outlying: list[Outliers] = []
    behind = norms
    with ExitStack() as removed:
        while (emergence := behind.emergence_block) is not None and len(found) < POPULATIONS:
            every = remaining_outliers(backbone, batches, behind, ())
            if found and _new(every, outlying) < NEW:
                break
            clusters = sum(len(each.triggers) for each in found)
            found.append(_population(backbone, batches, behind, every, emergence, clusters))
            outlying.append(every)
            if not found[-1].directions:
                break
            removed.enter_context(without_sinks(backbone, found[-1].directions))
            behind = outliers(backbone, batches, show=0)
    total = sum(each.rate for each in found)
    largest = max(range(len(found)), key=lambda turn: found[turn].rate)
    return Sinks(
        norms=norms,
        block=found[largest].block,
        units=tuple(unit for each in found for unit in each.units),
        explained=sum(each.explained * each.rate for each in found) / total,
        chain=upstream_chain(backbone, batches, outlying[largest], found[largest].units),
        attention=_attention_share(backbone, batches, outlying[largest]),
        triggers=tuple(trigger for each in found for trigger in each.triggers),
        directions=tuple(direction for each in found for direction in each.directions),
        populations=tuple(found),
    )


def _population(
    backbone: Backbone,
    batches: Sequence[ImageBatch],
    norms: NormReport,
    every: Outliers,
    emergence: int,
    first_cluster: int,
) -> Population:
    """Describes the sinks that norms show, their clusters numbered from `first_cluster` on."""
    focus = norms.blocks[norms.focus]
    left = find_causes(backbone, batches, norms, every)
    units, members = sink_clusters(backbone, batches, every.masks, left.units)
    directions = sink_directions(
        backbone, batches, members, every.masks, range(emergence, focus.block + 1), first_cluster
    )
    emerging = next((each for each in directions if each.block == emergence), None)
    of = emerging.cluster - first_cluster if emerging else 0
    return Population(
        block=emergence,
        last_block=focus.block,
        side=norms.side,
        rate=focus.outlier_rate,
        units=tuple(replace(unit, cluster=first_cluster + (unit.cluster or 0)) for unit in units),
        explained=1 - left.count / every.count,
        kind=kind_of(backbone, batches, members[of], emerging, emergence, len(units)),
        triggers=tuple(_triggers(backbone, batches, masks) for masks in members),
        directions=directions,
    )


def _new(every: Outliers, known: Sequence[Outliers]) -> float:
    """Measures the share of outliers that are no tokens of earlier populations."""
    fresh = 0
    for number, mask in enumerate(every.masks):
        fresh += int((mask & ~torch.stack([old.masks[number] for old in known]).any(dim=0)).sum())
    return fresh / max(every.count, 1)


# -- what triggers them, and what they draw ------------------------------------------------------------------


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
    backbone: Backbone, batches: Sequence[ImageBatch], every: Outliers
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


def __getattr__(name: str) -> Any:
    """Finds a function by its old name, with a warning."""
    if (new := current_attribute(__name__, name)) is not None:
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
