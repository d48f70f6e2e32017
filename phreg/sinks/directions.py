"""The directions that sinks hold in the residual stream, whatever wrote them.

A sink differs from other patches by one long vector, much the same in every sink (massive activations: Sun et
al. 2024, arXiv 2402.17762). One hidden unit may have written it, many units, or attention: it is read off the
stream in the same way, as the mean of the sinks less the mean of the other patches.

    share of the sink level   0 ──────── ordinary ─────────────────────── 1
                              other      999 of 1000 other patches        sinks,
                              patches    lie below                        on average
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.tokens import ImageBatch, TokenLayout

ORDINARY = 0.999
"""Share of the other patches whose projection counts as ordinary."""

SEPARATE = 0.5
"""Largest ordinary share of a direction that tells sinks from other patches."""

MARGIN = 0.05
"""Share of the sink level beyond what is ordinary that a patch may hold and be no sink."""


@dataclass(frozen=True, eq=False)
class SinkDirection:
    """What the sinks of one cluster hold after one block, and other patches do not.

    Attributes:
        block: Index of the block.
        cluster: The number of their cluster, from 0.
        vector: The direction, of length 1, in fp32 on the CPU.
        baseline: Mean projection of other patches on it.
        sink_level: Mean projection of the sinks, less the baseline; positive.
        ordinary: Share of the sink level that `ORDINARY` of the other patches do not exceed.
        alike: Share of what sinks hold beyond the mean patch that lies along the direction, by energy. It is
            1 where all sinks hold the same vector.
    """

    block: int
    cluster: int
    vector: Float[Tensor, " width"]
    baseline: float
    sink_level: float
    ordinary: float
    alike: float

    def share(self, tokens: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
        """Reads how much of the sink level tokens hold, in fp32; other patches hold 0 on average, sinks 1."""
        return (tokens.float() @ self.vector.to(tokens.device) - self.baseline) / self.sink_level

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold; the vector stays out."""
        return {
            "block": self.block,
            "cluster": self.cluster,
            "baseline": self.baseline,
            "sink_level": self.sink_level,
            "ordinary": self.ordinary,
            "alike": self.alike,
        }


@torch.no_grad()
def sink_directions(
    backbone: Backbone,
    batches: Sequence[ImageBatch],
    clusters: Sequence[Sequence[Bool[Tensor, "_ patches"]]],
    every: Sequence[Bool[Tensor, "_ patches"]],
    blocks: Sequence[int],
    first_cluster: int = 0,
) -> tuple[SinkDirection, ...]:
    """Finds the direction of each cluster of sinks after each of some blocks.

    Args:
        backbone: The model.
        batches: Normalised images, read twice.
        clusters: For each cluster, its sinks among the patches, batch by batch.
        every: The sinks of all clusters.
        blocks: The blocks to read.
        first_cluster: The number of the first cluster.

    Returns:
        The directions that tell sinks from other patches, by cluster and then by block.
    """
    moments: dict[tuple[int, int], _Moments] = {}
    others = {block: _Moments() for block in blocks}
    for number, tokens, layout in _patches(backbone, batches, blocks):
        for block, value in tokens.items():
            patches = layout.patches(value)
            others[block].add(patches[~every[number]])
            for cluster, masks in enumerate(clusters):
                moments.setdefault((cluster, block), _Moments()).add(patches[masks[number]])
    gaps = {key: own.mean - others[key[1]].mean for key, own in moments.items() if own.count}
    units = {key: gap / gap.norm() for key, gap in gaps.items() if gap.any()}
    seen: dict[tuple[int, int], list[np.ndarray]] = {key: [] for key in units}
    for number, tokens, layout in _patches(backbone, batches, blocks):
        for (cluster, block), unit in units.items():
            patches = layout.patches(tokens[block])[~every[number]].double()
            seen[cluster, block].append((patches @ unit.to(patches.device)).cpu().numpy())
    found = []
    for (cluster, block), unit in units.items():
        gap, other, own = gaps[cluster, block], others[block], moments[cluster, block]
        baseline, level = float(other.mean @ unit), float(gap.norm())
        ordinary = float((np.quantile(np.concatenate(seen[cluster, block]), ORDINARY) - baseline) / level)
        # E|x - m|² over sinks, m the mean of other patches.
        energy = own.square - 2 * float(own.mean @ other.mean) + float(other.mean.square().sum())
        direction = SinkDirection(
            block, first_cluster + cluster, unit.float(), baseline, level, ordinary, level**2 / energy
        )
        if ordinary < SEPARATE:
            found.append(direction)
    return tuple(sorted(found, key=lambda each: (each.cluster, each.block)))


class _Moments:
    """Mean token and mean square length, summed in fp64 on the CPU."""

    def __init__(self) -> None:
        self.count, self._sum, self._square = 0, torch.zeros(1, dtype=torch.float64), 0.0

    def add(self, tokens: Float[Tensor, "_ width"]) -> None:
        self.count += len(tokens)
        self._sum = self._sum + tokens.double().sum(0).cpu()
        self._square += float(tokens.double().square().sum())

    @property
    def mean(self) -> Float[Tensor, " width"]:
        return self._sum / self.count

    @property
    def square(self) -> float:
        return self._square / self.count


def _patches(
    backbone: Backbone, batches: Sequence[ImageBatch], blocks: Sequence[int]
) -> Iterator[tuple[int, dict[int, Tensor], TokenLayout]]:
    for number, images in enumerate(batches):
        yield number, backbone.block_tokens(images, blocks), backbone.layout(images)


@contextmanager
def without_sinks(backbone: Backbone, directions: Sequence[SinkDirection]) -> Iterator[None]:
    """Brings patches back to the baseline of some directions while the model runs.

    Patches that hold more of the sink level than is ordinary lose all they have of it, after each block where
    it was found. So what the sinks hide, or keep from appearing, can be seen.
    """
    blocks = backbone.blocks
    with ExitStack() as stack:
        for block in sorted({direction.block for direction in directions}):
            own = [direction for direction in directions if direction.block == block]
            stack.enter_context(
                _edited(blocks[block], _Removal(own, backbone.spec.num_prefix + backbone.num_registers))
            )
        yield


class _Removal:
    """Takes directions away from patches that hold more of them than is ordinary."""

    def __init__(self, directions: Sequence[SinkDirection], start: int) -> None:
        self.directions, self.start = directions, start

    def __call__(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        patches = tokens[:, self.start :]
        for direction in self.directions:
            share = direction.share(patches)
            excess = torch.where(share > direction.ordinary + MARGIN, share * direction.sink_level, 0)
            patches = patches - (excess[..., None] * direction.vector.to(patches.device)).to(patches.dtype)
        return torch.cat([tokens[:, : self.start], patches], dim=1)


@contextmanager
def _edited(block: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Edits what a block puts out, ahead of all its hooks, which a hook of its own could not."""
    forward = block.forward

    def edited(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    kept = vars(block).get("forward")
    block.forward = edited
    try:
        yield
    finally:
        if kept is None:
            del block.forward
        else:
            block.forward = kept
