"""Figures of maps of anomaly scores: areas under curves over all thresholds, exactly.

Pixels are sorted by their score once, and equal scores are one threshold, so that no bins are needed. What is
held is some 70 bytes a pixel. Checked against scikit-learn and torchmetrics, and the overlap of regions
against the definition, in `tests/official`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import label

from phreg.errors import PhregError

FlatScores = Float[np.ndarray, " _"]


def auroc(scores: FlatScores, positive: Bool[np.ndarray, " _"]) -> float:
    """Computes the area under the ROC curve: how often something positive has the higher score, ties half.

    Raises:
        PhregError: There is nothing positive, or nothing else.
    """
    hits, misses = positive.sum(), (~positive).sum()
    if not hits or not misses:
        raise PhregError(
            f"AUROC asked for of {hits} positive and {misses} negative scores, and some of each are needed; "
            "give data with both"
        )
    order = np.argsort(-scores, kind="stable")
    ends = _thresholds(scores[order])
    found = np.cumsum(positive[order])[ends]
    return _area((ends + 1 - found) / misses, found / hits, 1.0)


def region_overlap(
    maps: Sequence[Float[np.ndarray, "_ _"]], masks: Sequence[Bool[np.ndarray, "_ _"]], limit: float = 0.3
) -> tuple[float, int]:
    """Computes the area under the curve of per-region overlap (PRO; Bergmann et al. 2020, arXiv 1911.02357).

    At each threshold, the share found of each connected region (8 neighbours), averaged over all regions of
    all pictures, stands over the share of normal pixels that are found too; the area up to a share of `limit`
    is divided by it.

    Args:
        maps: Anomaly scores of the pixels of each picture.
        masks: Pixels of defects.
        limit: Share of normal pixels up to which the area is taken.

    Returns:
        The figure, and the number of regions.

    Raises:
        PhregError: There is no region, or no normal pixel.
    """
    shares, regions = [], 0
    for mask in masks:
        numbers = np.zeros(mask.shape, dtype=np.int32)  # of regions, from 1 on
        label(mask, np.ones((3, 3)), output=numbers)
        sizes = np.bincount(numbers.ravel())
        shares.append(np.where(mask, 1 / np.maximum(1, sizes[numbers]), 0.0).ravel())
        regions += len(sizes) - 1
    normal = ~np.concatenate([mask.ravel() for mask in masks])
    if not regions or not normal.any():
        raise PhregError(
            f"overlap of regions asked for of {regions} regions and {normal.sum()} normal pixels, and some "
            "of each are needed; give masks of defects"
        )
    scores = np.concatenate([scores.ravel() for scores in maps])
    order = np.argsort(-scores, kind="stable")
    ends = _thresholds(scores[order])
    overlap = np.cumsum(np.concatenate(shares)[order])[ends] / regions
    false = np.cumsum(normal[order])[ends] / normal.sum()
    return _area(false, overlap, limit) / limit, regions


def _thresholds(descending: FlatScores) -> np.ndarray:
    """Finds the last place of each run of equal scores."""
    return np.flatnonzero(np.append(np.diff(descending) != 0, True))


def _area(across: np.ndarray, up: np.ndarray, limit: float) -> float:
    """Integrates a curve from (0, 0) by trapezoids up to a limit, where it is interpolated."""
    across, up = np.concatenate([[0.0], across]), np.concatenate([[0.0], up])
    inside = int(np.searchsorted(across, limit, side="right"))
    if inside < len(across):
        share = (limit - across[inside - 1]) / (across[inside] - across[inside - 1])
        last = up[inside - 1] + share * (up[inside] - up[inside - 1])
        across, up = np.append(across[:inside], limit), np.append(up[:inside], last)
    return float(np.trapezoid(up, across))
