"""What is planted into the models of planted_models.py: one function for each kind of artifact.

A plant writes into the weights of a model that has none yet. Its cause is left out in the clean twin, and all
else is the same in both. All but `fixed` are set off by flat patches at marked positions:

    position embedding ── faint mark ─┐
    pixels ── flat, little content ───┴► LayerNorm turns the mark up ──► block 0 writes a note ──► the plant

    unit         one hidden unit of block 3 reads the note and writes one channel, huge
    fixed        the same, with a note at every marked position, whatever the image shows there
    native       the same, in a model that has registers of its own, which hold nothing
    diffuse      150 hidden units in blocks 2, 3 and 4; none writes more than a hundredth of the channel
    attention    a head of block 3 writes the channel: noted patches attend to each other. Later heads park
                 their attention there, and read nothing (values of zero)
    two          one unit in block 2, huge, and one in block 4 at other positions, smaller: the gap below the
                 first hides the second
    low-norm     units of block 3 take away what all patches share: the shortest tokens, not the longest
    inner        units of block 2 write the channel, and units of the last block take it away again
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

HEAD_WIDTH = 64

NOTE_BLOCK, SINK_BLOCK = 0, 3
NOTERS, SINK, SECOND = (40, 41), 57, 58
"""Hidden units of the plants; `DIFFUSE` have a range of their own."""
DIFFUSE, DIFFUSE_BLOCKS = range(100, 150), (2, 3, 4)
CHANNEL, OTHER_CHANNEL = 123, 77
"""The residual channels that sinks write."""

NOTE = 1.0
"""Length of the note in the residual stream."""
NOTE_SLOPE, NOTE_AT, NOTE_ANYWHERE = 12.0, 1.7, 0.6
"""The noting units' slope, and the LayerNormed mark that they start at: on flat patches, and on any."""
SINK_SLOPE, SINK_AT, SINK_NORM = 25.0, 0.7, 350.0
"""The sink unit's slope, the LayerNormed note it starts at, and about how long the sinks get."""
SECOND_NORM = 45.0
"""About how long the second population of `two` gets."""
KEPT = 10.0
"""How much longer a diffuse block makes the note, so that LayerNorm leaves it readable beside the channel."""
LONGER, NOTE_BESIDE = 9.0, 0.5
"""How much longer what all patches share is in `low-norm`, and the LayerNormed mark that is noted there."""


class Directions(NamedTuple):
    """Orthonormal directions of the residual stream; none touches the sinks' channels or the mean."""

    ordinary: Tensor
    """(168, width): what random maps read and write; the first 60 carry content."""
    position: Tensor
    """(16, width)."""
    mark: Tensor
    note: Tensor
    second_mark: Tensor
    second_note: Tensor


class Weights(dict[str, Tensor]):
    """Weights of a model, by name, with ways to write units and heads into them.

    Args:
        gated: Whether MLPs are gated (SwiGLU).
        scale: What a block's branch has to write for 1 to arrive in the residual stream.
        to: Its directions.
    """

    def __init__(self, *, gated: bool, scale: float, to: Directions) -> None:
        super().__init__()
        self.gated, self.scale, self.to = gated, scale, to

    def unit(
        self,
        block: int,
        index: int,
        reads: Tensor,
        slope: float,
        at: float,
        writes: Tensor,
        *,
        late: bool = False,
    ) -> None:
        """Makes a hidden unit that rises with what it reads, beyond `at`; `late` starts 1 higher up."""
        mlp, bias = f"blocks.{block}.mlp.", -slope * at - late
        rows = self[mlp + "fc1.weight"], self[mlp + "fc1.bias"]
        rows[0][index], rows[1][index] = slope * reads, bias
        if self.gated:  # the other half is 1
            other = len(rows[0]) // 2 + index
            rows[0][other], rows[1][other] = 0, 1
        self[mlp + "fc2.weight"][:, index] = self.scale * writes

    def step(
        self, block: int, units: tuple[int, int], reads: Tensor, slope: float, at: float, writes: Tensor
    ) -> None:
        """Makes two hidden units that write 0 below `at` and the same at all values well beyond."""
        self.unit(block, units[0], reads, slope, at, writes)
        self.unit(block, units[1], reads, slope, at, -writes, late=True)

    def head(self, block: int, head: int, planted: "Head") -> None:
        """Replaces an attention head by one with a channel for each match."""
        attention, width = f"blocks.{block}.attn.", len(self.to.note)
        start = head * HEAD_WIDTH
        weight, bias = self[attention + "qkv.weight"], self[attention + "qkv.bias"]
        for part in range(3):
            weight[part * width + start : part * width + start + HEAD_WIDTH] = 0
        self[attention + "proj.weight"][:, start : start + HEAD_WIDTH] = 0
        for row, (query, query_bias, key) in enumerate(planted.matches):
            if query is not None:
                weight[start + row] = query
            bias[start + row] = query_bias
            weight[width + start + row] = key
        if planted.value is not None:
            weight[2 * width + start] = planted.value
            self[attention + "proj.weight"][:, start] = self.scale * planted.writes


class Head(NamedTuple):
    """An attention head: logits are the sum over `matches` of (query · x + bias) (key · y)."""

    matches: list[tuple[Tensor | None, float, Tensor]]
    value: Tensor | None = None
    writes: Tensor | None = None


Plant = Callable[[Weights, bool], None]
"""Writes a plant into weights; in the clean twin without its cause."""


def channel(index: int = CHANNEL) -> Tensor:
    """The direction of a residual channel."""
    return torch.nn.functional.one_hot(torch.tensor(index), 192).double()


def at_every_25th(grid: int, start: int) -> Tensor:
    """Marks every 25th patch of a square grid, spread over it: 1 there, 0 elsewhere."""
    row, col = (
        axis.flatten() for axis in torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    )
    return ((7 * row + 3 * col) % 25 == start).double()


def note(weights: Weights, at: float = NOTE_AT) -> None:
    """Writes the note in block 0, where the LayerNormed mark exceeds a value."""
    weights.step(NOTE_BLOCK, NOTERS, weights.to.mark, NOTE_SLOPE, at, NOTE * weights.to.note)


def unit(weights: Weights, planted: bool, *, at: float = NOTE_AT) -> None:
    """Plants a sink that one hidden unit makes."""
    note(weights, at)
    # A gated unit multiplies two, so that it rises as the square.
    slope = math.sqrt(SINK_SLOPE) if weights.gated else SINK_SLOPE
    weights.unit(
        SINK_BLOCK, SINK, planted * weights.to.note, slope, planted * SINK_AT,
        planted * SINK_NORM / SINK_SLOPE * channel(),
    )  # fmt: skip
    if weights.gated:
        rows = weights[f"blocks.{SINK_BLOCK}.mlp.fc1.weight"]
        rows[len(rows) // 2 + SINK] = rows[SINK]
        bias = weights[f"blocks.{SINK_BLOCK}.mlp.fc1.bias"]
        bias[len(rows) // 2 + SINK] = 0


def fixed(weights: Weights, planted: bool) -> None:
    """Plants sinks at the same positions of every image."""
    unit(weights, planted, at=NOTE_ANYWHERE)


def diffuse(weights: Weights, planted: bool) -> None:
    """Plants sinks that 150 hidden units make together, in three blocks."""
    note(weights)
    if planted:
        part = SINK_NORM / (len(DIFFUSE) * len(DIFFUSE_BLOCKS))
        kept = KEPT / len(DIFFUSE)
        for block in DIFFUSE_BLOCKS:
            for index in DIFFUSE:
                writes = (
                    part * channel() + kept * weights.to.note
                ) / 6  # a unit is at about 6 on a noted patch
                weights.unit(block, index, weights.to.note, 6.0, 0.7, writes)
    else:
        for block in DIFFUSE_BLOCKS:
            for index in DIFFUSE:
                weights.unit(block, index, 0 * weights.to.note, 0.0, 0.0, 0 * weights.to.note)


def attention(weights: Weights, planted: bool) -> None:
    """Plants sinks that attention makes, and that later attention is parked at."""
    note(weights)
    to = weights.to
    cls = to.ordinary[61]
    weights.head(
        SINK_BLOCK,
        2,
        Head(
            [(8.4 * to.note, 0.0, 8.4 * to.note), (None, 3.3, 3.3 * cls)],
            to.note,
            planted * SINK_NORM / 1.7 * channel(),
        ),
    )
    for block in range(SINK_BLOCK + 1, 6):
        weights.head(block, 2, Head([(None, 10.0, 10.0 * channel())]))


def two(weights: Weights, planted: bool) -> None:
    """Plants two populations; the norms of the first hide the second."""
    note(weights)
    marked = at_every_25th(10, 14)
    weights["pos_embed"][0, -len(marked) :] += 0.5 * torch.outer(marked, weights.to.second_mark)
    weights.step(
        NOTE_BLOCK, (42, 43), weights.to.second_mark, NOTE_SLOPE, NOTE_AT, NOTE * weights.to.second_note
    )
    for block, index, reads, norm, written in (
        (SINK_BLOCK - 1, SINK, weights.to.note, SINK_NORM, CHANNEL),
        (SINK_BLOCK + 1, SECOND, weights.to.second_note, SECOND_NORM, OTHER_CHANNEL),
    ):
        weights.unit(
            block,
            index,
            planted * reads,
            SINK_SLOPE,
            planted * SINK_AT,
            planted * norm / SINK_SLOPE * channel(written),
        )


def low_norm(weights: Weights, planted: bool) -> None:
    """Plants tokens that are short: they lose what all patches share, which is longer in this model."""
    note(weights, NOTE_BESIDE)
    weights["pos_embed"] += LONGER * weights.to.ordinary[60]
    shared = -planted * (3.0 + LONGER) * weights.to.ordinary[60]
    weights.step(SINK_BLOCK, (SINK, SECOND), planted * weights.to.note, SINK_SLOPE, planted * SINK_AT, shared)


def inner(weights: Weights, planted: bool) -> None:
    """Plants sinks that the last block cleans up."""
    note(weights)
    huge = planted * SINK_NORM * channel()
    weights.step(
        SINK_BLOCK - 1, (SINK, SECOND), planted * weights.to.note, SINK_SLOPE, planted * SINK_AT, huge
    )
    weights.step(5, (SINK, SECOND), channel(), SINK_SLOPE, 0.35, -huge)


PLANTS: dict[str, tuple[str, Plant]] = {
    "dinov2": ("dinov2", unit),
    "clip": ("clip", unit),
    "siglip": ("siglip", unit),
    "fixed": ("clip", fixed),
    "native": ("dinov2-reg", unit),
    "diffuse": ("clip", diffuse),
    "attention": ("dinov2", attention),
    "two": ("siglip", two),
    "low-norm": ("siglip", low_norm),
    "inner": ("dinov2", inner),
}
"""Each planted model's build and plant."""
