"""Finds artifact tokens by their norms: in which blocks, how many, and where.

Artifacts stand apart: a vision transformer's patch tokens have norms of one size, a few per cent of them
another, and hardly any lie between (Darcet et al. 2024, arXiv 2309.16588, section 2). So the model's own gap
(`phreg.analysis.gap`) separates the two, and no norm is set by hand. Every block is looked at, since
artifacts can hide inside and be gone at the end, and both before and after the final norm, since that norm
can turn the longest tokens into the shortest.

    batches ──backbone──► tokens of each block ──┬──────────────► norms ──► gap? ──► rate, positions, maps
              (dropped once measured)            └─► final norm ► norms ──► gap? ──► rate

Norms are kept, one float a token; tokens are not. CLS and registers are longer or shorter by nature, so they
are measured apart and never counted. What a norm cannot show, such as an artifact that only points elsewhere,
is not found here.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from phreg.analysis.gap import Gap, bimodality, outlier_mask, outlier_threshold, wider_of
from phreg.backbones.base import Backbone
from phreg.errors import DataError

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Quantiles of the norms that a report keeps for each block."""

BINS = 50
"""Bins of a histogram."""

SHORTEST = 1e-6
"""Norm, as a share of the longest, below which a log-spaced histogram tells tokens no longer apart."""


@dataclass(frozen=True)
class Histogram:
    """How many values fall into each of `BINS` bins.

    Attributes:
        scale: Whether bins are equally wide (`linear`), or equally wide in the logarithm (`log`).
        low: Where the first bin begins.
        high: Where the last bin ends.
        counts: Values in each bin, first to last.
    """

    scale: Literal["linear", "log"]
    low: float
    high: float
    counts: tuple[int, ...]

    @classmethod
    def of(
        cls, values: np.ndarray, scale: Literal["linear", "log"], limits: tuple[float, float] | None = None
    ) -> "Histogram":
        """Counts values, in log scale positive ones; limits of None are the smallest and the largest."""
        to, back = (np.log, np.exp) if scale == "log" else (np.asarray, np.asarray)
        ends = to(np.array(limits or (values.min(), values.max())))
        counts, edges = np.histogram(to(values), BINS, (ends[0], ends[1]))
        low, high = back(edges[[0, -1]])
        return cls(scale, float(low), float(high), tuple(counts.tolist()))

    @property
    def edges(self) -> tuple[float, ...]:
        """Where the bins begin and end, one more than there are bins."""
        spaced = np.geomspace if self.scale == "log" else np.linspace
        return tuple(spaced(self.low, self.high, len(self.counts) + 1).tolist())


@dataclass(frozen=True)
class BlockNorms:
    """Norms of the patch tokens that one block puts out.

    Attributes:
        block: Index of the block.
        quantiles: Norms at `QUANTILES`.
        gap: The gap, or None where the norms show none. Of a model compared with its original it is the
            original's, where that has more tokens beyond it.
        outlier_rate: Share of patch tokens beyond the gap.
        outlier_norm: Median norm of those; None where there are none.
        bimodality: Bimodality of log norms; see `phreg.analysis.gap.bimodality`.
        linear: How many tokens have which norm.
        log: The same in log norm.
    """

    block: int
    quantiles: tuple[float, ...]
    gap: Gap | None
    outlier_rate: float
    outlier_norm: float | None
    bimodality: float
    linear: Histogram
    log: Histogram

    @property
    def median(self) -> float:
        """Median norm of all patch tokens."""
        return self.quantiles[QUANTILES.index(0.5)]


@dataclass(frozen=True)
class TokenNorms:
    """Norms of one token that is no patch, block by block.

    Attributes:
        name: `CLS`, `register 1`, …: see `Backbone.special_tokens`.
        quantiles: Norms over images at `QUANTILES`, for each block, before the final norm.
        normed: The same after the final norm.
    """

    name: str
    quantiles: tuple[tuple[float, ...], ...]
    normed: tuple[tuple[float, ...], ...]


class Norms(NamedTuple):
    """Norms of the tokens of some images, before and after the final norm, on the CPU."""

    patches: Float[Tensor, "2 blocks images rows cols"]
    special: Float[Tensor, "2 blocks images special"]


@dataclass(frozen=True, eq=False)
class NormReport:
    """What the norms of a model's patch tokens say about artifacts.

    Attributes:
        images: Number of images measured.
        blocks: Every measured block, first to last, before the final norm.
        normed: The same blocks, their tokens passed through the final norm.
        tokens: CLS and registers, each by itself, in the same blocks.
        positions: Share of images whose patch is an outlier there, block by block, before the final norm.
        maps: Norms before the final norm of the first few images, block by block.
    """

    images: int
    blocks: tuple[BlockNorms, ...]
    normed: tuple[BlockNorms, ...]
    tokens: tuple[TokenNorms, ...]
    positions: Float[Tensor, "blocks rows cols"]
    maps: Float[Tensor, "shown blocks rows cols"]

    @property
    def outlier_rate(self) -> float:
        """Share of patch tokens that are outliers in the last block, before the final norm."""
        return self.blocks[-1].outlier_rate

    @property
    def focus(self) -> int:
        """Place in `blocks` of the one to look at: the last, or where only others have a gap, the widest."""
        widths = [block.gap.width if block.gap else 0.0 for block in self.blocks]
        return len(widths) - 1 if widths[-1] or not any(widths) else int(np.argmax(widths))

    @property
    def emergence_block(self) -> int | None:
        """Index of the block where the gap opens, followed back from `focus`; None where there is no gap."""
        index = self.focus
        gap = self.blocks[index].gap
        if gap is None:
            return None
        while index and (before := self.blocks[index - 1].gap) and before.side == gap.side:
            index -= 1
        return self.blocks[index].block

    @property
    def side(self) -> Literal["high", "low"] | None:
        """Whether outliers are longer or shorter than others, in the block of `focus`; None without any."""
        gap = self.blocks[self.focus].gap
        return None if gap is None else gap.side

    @property
    def position_histogram(self) -> Float[Tensor, "rows cols"]:
        """Share of images whose patch at each position is an outlier in the block that `focus` names."""
        return self.positions[self.focus]

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the maps as JSON can hold it."""
        return {
            "images": self.images,
            "outlier_rate": self.outlier_rate,
            "emergence_block": self.emergence_block,
            "quantiles": list(QUANTILES),
            "blocks": [asdict(block) for block in self.blocks],
            "blocks_after_norm": [asdict(block) for block in self.normed],
            "tokens": [asdict(token) for token in self.tokens],
            "position_histogram": self.position_histogram.tolist(),
        }


@torch.no_grad()
def outliers(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    *,
    layers: Sequence[int] | None = None,
    show: int = 8,
    original: NormReport | None = None,
) -> NormReport:
    """Measures the norms of a model's patch tokens, and which of them are outliers.

    The model runs in the mode it is in; put it in eval mode first.

    Args:
        backbone: The model.
        batches: Normalised images, all of one size.
        layers: Blocks to measure, negative from the end; None means all.
        show: Images, from the first on, whose norm maps are kept.
        original: What the same images and blocks gave in the model before it was changed. Its gaps count too.

    Raises:
        DataError: There are no images, or their sizes differ.
        PhregError: There is no such block, or a norm is not finite.
    """
    wanted = (
        range(len(backbone.blocks))
        if layers is None
        else sorted({backbone.block_index(layer) for layer in layers})
    )
    measured = [
        token_norms(backbone, images, backbone.block_tokens(images, wanted))
        for images in of_one_size(backbone, batches)
    ]
    return norm_report(backbone, join(measured), wanted, show, original)


def of_one_size(
    backbone: Backbone, batches: Iterable[Float[Tensor, "_ 3 _ _"]]
) -> Iterator[Float[Tensor, "_ 3 _ _"]]:
    """Moves batches to the model's device, one at a time.

    Raises:
        DataError: There are no images, or their sizes differ.
    """
    first: tuple[int, int] | None = None
    for images in batches:
        grid = backbone.layout(images).grid
        first = first or grid
        if grid != first:
            grids = [f"{rows}x{cols}" for rows, cols in (first, grid)]
            raise DataError(
                f"norms asked for of images of one size, found patch grids of {' and '.join(grids)}; "
                "resize the images to one size"
            )
        yield images.to(backbone.device)
    if first is None:
        raise DataError(f"norms asked for of {backbone.describe()}, found no images; give at least one")


@torch.no_grad()
def token_norms(backbone: Backbone, images: Float[Tensor, "_ 3 _ _"], tokens: Mapping[int, Tensor]) -> Norms:
    """Measures what blocks put out for a batch of images, before and after the final norm.

    Args:
        backbone: The model.
        images: The images.
        tokens: Raw output of each block, as `Backbone.tap` collects it.
    """
    layout = backbone.layout(images)
    patches, special = [], []
    for _, block in sorted(tokens.items()):
        stages = (block, backbone.final_norm(block))
        patches.append(torch.stack([layout.to_grid(stage).float().norm(dim=-1) for stage in stages]))
        special.append(
            torch.stack([stage[:, : -layout.num_patches].float().norm(dim=-1) for stage in stages])
        )
    return Norms(torch.stack(patches, dim=1).cpu(), torch.stack(special, dim=1).cpu())


def join(batches: Sequence[Norms]) -> Norms:
    """Puts the norms of batches together."""
    return Norms(*(torch.cat(parts, dim=2) for parts in zip(*batches, strict=True)))


def norm_report(
    backbone: Backbone, norms: Norms, layers: Sequence[int], show: int, original: NormReport | None = None
) -> NormReport:
    """Finds the outliers among norms, and sums all up.

    Args:
        backbone: The model that was measured.
        norms: What was measured.
        layers: Indices of the blocks that were.
        show: Images, from the first on, whose norm maps are kept.
        original: The report of the model before it was changed; see `outliers`.
    """
    nothing = [None] * len(layers)
    theirs = (original.blocks, original.normed) if original else (nothing, nothing)
    before, after = (
        tuple(map(_block_norms, layers, stage, blocks))
        for stage, blocks in zip(norms.patches, theirs, strict=True)
    )
    masks = [outlier_mask(block, found.gap) for block, found in zip(norms.patches[0], before, strict=True)]
    quantiles = np.quantile(norms.special.numpy(), QUANTILES, axis=2).transpose(3, 1, 2, 0).tolist()
    return NormReport(
        images=norms.patches.shape[2],
        blocks=before,
        normed=after,
        tokens=tuple(
            TokenNorms(name, *(tuple(map(tuple, stage)) for stage in stages))
            for name, stages in zip(backbone.special_tokens, quantiles, strict=True)
        ),
        positions=torch.stack([mask.float().mean(dim=0) for mask in masks]),
        maps=norms.patches[0, :, :show].transpose(0, 1).clone(),
    )


def _block_norms(block: int, norms: Tensor, original: BlockNorms | None) -> BlockNorms:
    gap = wider_of(norms, outlier_threshold(norms), original and original.gap)
    mask = outlier_mask(norms, gap)
    values = norms.double().numpy().ravel()
    longest = max(values.max(), np.finfo(np.float32).tiny)
    return BlockNorms(
        block=block,
        quantiles=tuple(float(value) for value in np.quantile(norms.numpy(), QUANTILES)),
        gap=gap,
        outlier_rate=float(mask.float().mean()),
        outlier_norm=float(norms[mask].median()) if mask.any() else None,
        bimodality=bimodality(norms),
        linear=Histogram.of(values, "linear"),
        log=Histogram.of(values.clip(min=SHORTEST * longest), "log"),
    )
