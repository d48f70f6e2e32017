"""Confidence intervals by the bootstrap over pictures (Efron 1979, doi 10.1214/aos/1176344552).

A figure for which this exists is a mean over parts, such as classes, of a ratio of sums over pictures:

    figure = mean over parts ( sum over pictures of what was reached / sum over pictures of what there was )

A plain mean of one value a picture is one too. Such a figure can be computed of any pictures. It is computed
of `RESAMPLES` samples, each as large as the data set and drawn from it with replacement. The interval lies
between two percentiles of these figures. Every model has the same samples, so that a difference of two models
has an interval too, of the differences in each sample (a paired bootstrap).

It says how far the figure depends on which pictures there were, and nothing of seeds.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
"""Samples of pictures."""

LEVEL = 0.95
"""Share of the samples whose figures an interval holds."""

SEED = 0
"""Seed of the samples, the same for every evaluation."""

AT_ONCE = 2**24
"""Counts of pictures in samples that are held at a time, at most."""

Interval = tuple[float, float]
"""Least and greatest figure."""


class PerPicture(NamedTuple):
    """What each picture adds to a figure."""

    reached: Float[np.ndarray, "pictures parts"]
    """E.g. pixels of each class that were found."""
    there: Float[np.ndarray, "pictures parts"]
    """E.g. pixels that are of the class or were taken for it; 0 where a picture says nothing of a part."""

    @classmethod
    def mean(cls, values: Sequence[float] | np.ndarray) -> "PerPicture":
        """Of a figure that is the mean of one value a picture."""
        reached = np.asarray(values, dtype=np.float64)[:, None]
        return cls(reached, np.ones_like(reached))


def resample(names: Sequence[str], figures: Mapping[str, PerPicture]) -> dict[str, Any]:
    """Computes figures in all samples.

    Args:
        names: Of the pictures, in order.
        figures: What each picture adds to each figure.

    Returns:
        The fields `pictures` and `resampled` of `phreg.evaluation.record.Metrics`; none of fewer than two
        pictures, of which every sample is much the same.
    """
    if len(names) < 2:
        return {}
    told = hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]
    return {"pictures": told, "resampled": {name: _in_samples(of).tolist() for name, of in figures.items()}}


def interval(resampled: Float[np.ndarray, " samples"]) -> Interval | None:
    """Finds the percentiles between which `LEVEL` of the samples lie; None where no sample has a figure."""
    valued = resampled[~np.isnan(resampled)]
    if not len(valued):
        return None
    low, high = np.quantile(valued, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _in_samples(figure: PerPicture) -> Float[np.ndarray, " samples"]:
    """Computes a figure in each sample; NaN where a sample has nothing to compute it over."""
    pictures = len(figure.reached)
    generator = np.random.default_rng(SEED)
    found = []
    # In parts of a size that the number of pictures alone decides, as draws have to be the same.
    step = max(1, AT_ONCE // pictures)
    for first in range(0, RESAMPLES, step):
        count = min(step, RESAMPLES - first)
        times = generator.multinomial(pictures, np.full(pictures, 1 / pictures), size=count).astype(float)
        reached, there = times @ figure.reached, times @ figure.there
        valued = there > 0
        ratios = np.where(valued, reached / np.where(valued, there, 1), 0)
        parts = valued.sum(1)
        found.append(np.where(parts > 0, ratios.sum(1) / np.maximum(1, parts), np.nan))
    return np.concatenate(found)
