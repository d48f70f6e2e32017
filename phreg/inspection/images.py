"""Reads the images that a model is looked at with: at its size, larger, and with their classes."""

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.analysis.inspection import LabelledImages
from phreg.backbones.base import Backbone
from phreg.data.crops import MEASURED_AT_ONCE, Crops, as_input, centre_crops, subsample, subsample_indices
from phreg.data.sources import ImageSource
from phreg.errors import DataError
from phreg.evaluation.datasets.labelled import open_labelled

LABELLED = 1000
"""Images with classes that are read at most, spread evenly over those there are."""

LARGER = 1.5
"""How much larger than a model's own size images are, to see what resampling its positions does."""


def larger(backbone: Backbone, source: ImageSource) -> list[Float[Tensor, "_ 3 _ _"]]:
    """Reads a few images at a size that is not the model's own; none where it takes no other."""
    if not backbone.spec.any_size:
        return []
    rows, cols = (round(LARGER * count) for count in backbone.spec.grid)
    size = (rows * backbone.spec.patch_size[0], cols * backbone.spec.patch_size[1])
    return list(centre_crops(backbone, subsample(source, MEASURED_AT_ONCE), size))


def labelled(backbone: Backbone, data: str, size: int | tuple[int, int]) -> LabelledImages:
    """Reads images with classes: see `phreg.evaluation.datasets.labelled.open_labelled`.

    An unreadable image is replaced by the next one, with that one's class.

    Raises:
        DataError: There are none, or labels and images do not match.
    """
    found = open_labelled(data)
    if found is None or not len(found.images):
        raise DataError(f"labelled images asked for in {data}, found none; give a folder of class folders")
    numbers = subsample_indices(len(found.images), LABELLED)
    crops = Crops(found.images, size, crop="centre")
    batches, classes = [], []
    for start in range(0, len(numbers), MEASURED_AT_ONCE):
        batch = crops.batch([(0, number) for number in numbers[start : start + MEASURED_AT_ONCE]])
        batches.append(as_input(backbone, batch.images))
        classes.append(found.labels[batch.indices])
    return LabelledImages(batches, torch.cat(classes))
