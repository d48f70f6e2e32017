"""Where the baseline has artifacts: the places at which a retrofit has something to repair.

A few per cent of the patches can hardly move a mean over all of them, so that tasks on dense features report
these on their own, beside the total. They depend on the baseline and the pictures alone: they are looked for
once, and kept beside the features for other models and seeds.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from phreg.analysis.gap import outlier_mask, outlier_threshold
from phreg.data.sources import ImageSource
from phreg.evaluation.features import FeatureConfig, FeatureReader


def artifact_places(
    reader: FeatureReader, source: ImageSource, reading: FeatureConfig
) -> Sequence[Bool[Tensor, "rows cols"]] | None:
    """Marks the patches of each picture that are outliers in the baseline's last block.

    Outliers lie beyond the gap in the distribution of norms over all pictures, before the final norm, as
    `phreg inspect` finds them. They are looked for through the windows that features are read through, since
    each window has artifacts of its own. Tokens of overlapping windows are averaged, as features are.

    Args:
        reader: Its reference is the baseline.
        source: The pictures.
        reading: The canvas they are read on, and its windows.

    Returns:
        A mask of each picture's grid; None where there is no baseline, or its norms show no gap.

    Raises:
        DataError: The pictures lie where a change to them would not be noticed.
    """
    baseline = reader.baseline
    if baseline is None:
        return None
    before_norm = reading.model_copy(
        update={
            "source": "tokens",
            "layer": None,
            "readout": "plain",
            "norm": False,
            "unit": False,
            "views": 1,  # an average has hardly any left
            # Patches of windows that begin at any pixel have no grid to be marked on.
            "fit": "keep" if reading.fit == "centred" else reading.fit,
        }
    )

    def find() -> Sequence[Tensor] | None:
        norms = [
            dense.grid.norm(dim=-1)
            for dense in baseline.stream(source, before_norm, "artifacts of the baseline")
        ]
        gap = outlier_threshold(torch.cat([grid.flatten() for grid in norms]))
        return None if gap is None else [outlier_mask(grid, gap) for grid in norms]

    return baseline.cache.masks(baseline.described(before_norm), source, find)
