"""Finds artifact tokens by their norms: in which blocks, how many, and where.

Artifacts stand apart: a vision transformer's patch tokens have norms of one size, a few per cent of them
another, and hardly any lie between (Darcet et al. 2024, arXiv 2309.16588, section 2). So the model's own gap
separates the two, and no norm is set by hand. Every block is looked at, since artifacts can hide inside and
be gone at the end, and both before and after the final norm, since that norm can turn the longest tokens into
the shortest.

    batches ──backbone──► tokens of each block ──┬──────────────► norms ──► gap? ──► rate, positions, maps
              (dropped once measured)            └─► final norm ► norms ──► gap? ──► rate

Norms are kept, one float a patch; tokens are not. What a norm cannot show, such as an artifact that only
points elsewhere, is not found here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.errors import DataError, PhregError

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Quantiles of the norms that a report keeps for each block."""

MAX_SHARE = 0.2
"""Largest share of tokens that can be outliers; beyond it a model has two kinds of tokens, not artifacts."""

STRAGGLERS = 0.1
"""Tokens that may lie inside the gap, as a share of the tokens beyond it."""

MIN_WIDTH = 2.5
"""Narrowest credible gap, in spreads of the ordinary tokens; see `outlier_threshold`."""

MIN_SPREAD = 0.01
"""Smallest spread of the ordinary tokens, in log norm: norms within a per cent of each other are the same."""


@dataclass(frozen=True)
class Gap:
    """The nearly empty stretch between ordinary and outlying norms.

    Attributes:
        side: Whether outliers are longer (`high`) or shorter (`low`) than ordinary tokens.
        low: Norm where the stretch begins.
        high: Norm where it ends.
        width: Its width in spreads of the ordinary tokens, in log norm.
    """

    side: Literal["high", "low"]
    low: float
    high: float
    width: float

    @property
    def threshold(self) -> float:
        """Norm that separates outliers from ordinary tokens: the middle of the stretch, in log norm."""
        return (self.low * self.high) ** 0.5


@dataclass(frozen=True)
class BlockNorms:
    """Norms of the patch tokens that one block puts out.

    Attributes:
        block: Index of the block.
        quantiles: Norms at `QUANTILES`.
        gap: The gap, or None where the norms show none.
        outlier_rate: Share of patch tokens beyond the gap.
        outlier_norm: Median norm of those; None where there are none.
    """

    block: int
    quantiles: tuple[float, ...]
    gap: Gap | None
    outlier_rate: float
    outlier_norm: float | None

    @property
    def median(self) -> float:
        """Median norm of all patch tokens."""
        return self.quantiles[QUANTILES.index(0.5)]


@dataclass(frozen=True, eq=False)
class NormReport:
    """What the norms of a model's patch tokens say about artifacts.

    Attributes:
        images: Number of images measured.
        blocks: Every measured block, first to last, before the final norm.
        normed: The same blocks, their tokens passed through the final norm.
        positions: Share of images whose patch is an outlier there, block by block, before the final norm.
        maps: Norms before the final norm of the first few images, block by block.
    """

    images: int
    blocks: tuple[BlockNorms, ...]
    normed: tuple[BlockNorms, ...]
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
        place = self.focus
        gap = self.blocks[place].gap
        if gap is None:
            return None
        while place and (before := self.blocks[place - 1].gap) and before.side == gap.side:
            place -= 1
        return self.blocks[place].block

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
            "position_histogram": self.position_histogram.tolist(),
        }


def outliers(
    backbone: Backbone,
    batches: Iterable[Float[Tensor, "_ 3 _ _"]],
    *,
    layers: Sequence[int] | None = None,
    show: int = 8,
) -> NormReport:
    """Measures the norms of a model's patch tokens, and which of them are outliers.

    The model runs in the mode it is in; put it in eval mode first.

    Args:
        backbone: The model.
        batches: Normalised images, all of one size.
        layers: Blocks to measure, negative from the end; None means all.
        show: Images, from the first on, whose norm maps are kept.

    Raises:
        DataError: There are no images, or their sizes differ.
        PhregError: There is no such block, or a norm is not finite.
    """
    wanted = (
        range(len(backbone.blocks))
        if layers is None
        else sorted({backbone.block_index(layer) for layer in layers})
    )
    measured: list[Tensor] = []
    for images in batches:
        norms = _norms(backbone, images.to(backbone.device), wanted)
        if measured and norms.shape[-2:] != measured[0].shape[-2:]:
            grids = [f"{rows}x{cols}" for rows, cols in (measured[0].shape[-2:], norms.shape[-2:])]
            raise DataError(
                f"norms asked for of images of one size, found patch grids of {' and '.join(grids)}; "
                "resize the images to one size"
            )
        measured.append(norms)
    if not measured:
        raise DataError(f"norms asked for of {backbone.describe()}, found no images; give at least one")
    norms = torch.cat(measured, dim=2)  # (reading, block, image, rows, cols)
    before, after = (tuple(map(_block_norms, wanted, reading)) for reading in norms)
    masks = [outlier_mask(block, found.gap) for block, found in zip(norms[0], before, strict=True)]
    return NormReport(
        images=norms.shape[2],
        blocks=before,
        normed=after,
        positions=torch.stack([mask.float().mean(dim=0) for mask in masks]),
        maps=norms[0, :, :show].transpose(0, 1).clone(),
    )


def outlier_threshold(norms: Float[Tensor, "*tokens"]) -> Gap | None:
    """Finds the gap that sets a few tokens apart from the rest, if there is one.

    The gap is the widest stretch of log norm with next to no tokens inside and at most `MAX_SHARE` of them
    beyond. Two safeguards tell a gap from a tail:

    * Next to none, not none: given enough images a few tokens lie anywhere, so the widest gap between two
      neighbours closes as images are added. Inside may lie `STRAGGLERS` times as many tokens as beyond. A
      second mode that overlaps the first has no such stretch: there artifacts begin, but cannot be told token
      by token yet.
    * Any tail has gaps far out, where tokens are few. In an exponential tail of log norm (a Pareto tail of
      the norm) spacings are independent and memoryless (Rényi 1953): b tokens lie g scales beyond the next
      with probability exp(-b g). So a gap must be `MIN_WIDTH` * (1 + 5 / b) spreads wide. Pareto norms then
      show a false gap about once in 10 000 samples, and normal, log-normal and gamma ones practically never.
      A single token has to stand out six times as far as many do.

    The spread is 1.4826 times the median absolute deviation of log norms (a normal distribution's standard
    deviation), which a fifth of outliers hardly moves.

    Args:
        norms: Norms of one block's patch tokens, at least a few dozen, in any shape.

    Returns:
        The gap, on the side where it is the wider, or None where tokens are of one kind.

    Raises:
        PhregError: A norm is not finite.
    """
    logs = np.log(norms.double().cpu().numpy().ravel().clip(min=np.finfo(np.float32).tiny))
    if not np.isfinite(logs).all():
        count = int((~np.isfinite(logs)).sum())
        raise PhregError(
            f"gap asked for in the norms of {logs.size} tokens, {count} of which are not finite; "
            "check the model's weights and precision"
        )
    spread = max(1.4826 * float(np.median(np.abs(logs - np.median(logs)))), MIN_SPREAD)
    upper, lower = _widest_stretch(np.sort(logs) / spread), _widest_stretch(np.sort(-logs) / spread)
    (credit, start, end), sign = (upper, 1) if upper >= lower else (lower, -1)
    if credit < MIN_WIDTH:
        return None
    low, high = sorted(np.exp(np.array([start, end]) * sign * spread).tolist())
    return Gap("high" if sign == 1 else "low", low, high, end - start)


def outlier_mask(norms: Float[Tensor, "*tokens"], gap: Gap | None) -> Bool[Tensor, "*tokens"]:
    """Marks the tokens beyond a gap; none where there is no gap."""
    if gap is None:
        return torch.zeros_like(norms, dtype=torch.bool)
    return norms > gap.threshold if gap.side == "high" else norms < gap.threshold


def _widest_stretch(values: np.ndarray) -> tuple[float, float, float]:
    """Finds the most credible gap in the upper tail of sorted values.

    Returns:
        The gap's width, discounted where few tokens lie beyond, and the values where it begins and ends;
        zeros where there are too few tokens to hold outliers.
    """
    beyond = np.arange(1, int(MAX_SHARE * values.size) + 1)
    if not beyond.size:
        return 0.0, 0.0, 0.0
    inside = (STRAGGLERS * beyond).astype(int)
    ends = values[values.size - beyond]
    starts = values[values.size - beyond - inside - 1]
    credits = (ends - starts) / (1 + 5 / beyond)
    best = int(np.argmax(credits))
    return float(credits[best]), float(starts[best]), float(ends[best])


@torch.no_grad()
def _norms(backbone: Backbone, images: Tensor, layers: Sequence[int]) -> Tensor:
    """Norms of patch tokens, before and after the final norm: (2, blocks, batch, rows, cols), on the CPU."""
    layout = backbone.layout(images)
    tokens = backbone.block_tokens(images, layers)
    readings = []
    for layer in layers:
        patches = layout.to_grid(tokens.pop(layer))
        pair = (patches, backbone.final_norm(patches))
        readings.append(torch.stack([reading.float().norm(dim=-1) for reading in pair]))
    return torch.stack(readings, dim=1).cpu()


def _block_norms(block: int, norms: Tensor) -> BlockNorms:
    gap = outlier_threshold(norms)
    mask = outlier_mask(norms, gap)
    return BlockNorms(
        block=block,
        quantiles=tuple(float(value) for value in np.quantile(norms.numpy(), QUANTILES)),
        gap=gap,
        outlier_rate=float(mask.float().mean()),
        outlier_norm=float(norms[mask].median()) if mask.any() else None,
    )
