"""Figures of anomaly maps against scikit-learn and torchmetrics, and against the definition of PRO."""

from itertools import pairwise

import numpy as np
import pytest

from phreg.evaluation.metrics.anomaly import auroc, region_overlap

sklearn_metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
classification = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
torch = pytest.importorskip("torch")


def drawn(seed, levels):
    """Scores on some levels, so that many are equal, and what is positive: higher ones more often."""
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, levels, 500) / levels
    return scores, generator.random(500) < 0.1 + 0.5 * scores


@pytest.mark.parametrize("levels", [2, 10, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_is_that_of_scikit_learn_and_torchmetrics(seed, levels):
    scores, positive = drawn(seed, levels)
    found = auroc(scores, positive)
    assert found == pytest.approx(sklearn_metrics.roc_auc_score(positive, scores), abs=1e-6)
    metric = classification.BinaryAUROC()
    assert found == pytest.approx(float(metric(torch.tensor(scores), torch.tensor(positive).int())), abs=1e-6)


def regions_of(mask):
    """Flood fill over eight neighbours, pixel by pixel."""
    left = {(int(row), int(col)) for row, col in np.argwhere(mask)}
    while left:
        region, reached = [], [left.pop()]
        while reached:
            row, col = reached.pop()
            region.append((row, col))
            near = {(row + up, col + right) for up in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            reached += near
        yield region


def by_definition(maps, masks, limit):
    """Thresholds one by one, each a comparison of all pixels; trapezoids in plain arithmetic."""
    pairs = list(zip(maps, masks, strict=True))
    regions = [[scores[at] for at in region] for scores, mask in pairs for region in regions_of(mask)]
    normal = np.concatenate([scores[~mask] for scores, mask in pairs])
    curve = [(0.0, 0.0)]
    for threshold in sorted({float(score) for scores in maps for score in scores.ravel()}, reverse=True):
        found = np.mean([np.mean(np.array(region) >= threshold) for region in regions])
        curve.append(((normal >= threshold).mean(), found))
    area = 0.0
    for (left, low), (right, high) in pairwise(curve):
        if left < min(right, limit):
            end = min(right, limit)
            area += (end - left) * (low + (high - low) * (end - left) / (right - left) / 2)
    return area / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [7, 10_000])
def test_the_overlap_of_regions_is_that_of_its_definition(limit, levels):
    generator = np.random.default_rng(levels)
    masks = [generator.random((12, 15)) < 0.15 for _ in range(3)] + [np.zeros((9, 9), dtype=bool)]
    maps = [np.floor(levels * (generator.random(mask.shape) + 0.3 * mask)) / levels for mask in masks]
    figure, regions = region_overlap(maps, masks, limit)
    assert figure == pytest.approx(by_definition(maps, masks, limit), abs=1e-6)
    assert regions == sum(len(list(regions_of(mask))) for mask in masks)
