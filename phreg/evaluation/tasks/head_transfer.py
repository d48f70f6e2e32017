"""Head transfer: whether a head that was trained on the original still works on a repaired model.

    original ──train──► linear head ──unchanged──► this model      miou
                             │  └─────────────────► the original   miou_original
                             └──1 % of the steps──► this model     miou_again

The head is that of linear segmentation, trained on the baseline's features with the same settings. Whoever
has such heads asks for `miou`, and how far it is from `miou_original`; `miou_again` says what a short
training brings back. Of the baseline itself the first two are one. The baseline has to be given (--baseline).
"""

import copy
import math

import torch
from pydantic import PositiveFloat
from torch import nn

from phreg.errors import PhregError
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.evaluation.tasks import linear_segmentation
from phreg.evaluation.tasks.linear_segmentation import batches, train_head, try_head

DATA = "images with masks of classes, for training and testing: a folder in one of the layouts"
TREE = linear_segmentation.TREE
METRICS = (
    MetricSpec("miou", label="mIoU, head of the original", about="the baseline's head on the model"),
    MetricSpec("miou_original", label="mIoU of the original", about="the baseline's head on the baseline"),
    MetricSpec(
        "miou_again", label="mIoU, head trained on", about="the same head after a few steps on the model"
    ),
    MetricSpec("iou", about="intersection over union of a class"),
)


class Settings(linear_segmentation.Settings):
    """A linear head of the original on another model; its training is that of linear segmentation."""

    again: PositiveFloat = 0.01
    """Training steps on the model itself, as a share of those on the original; one at least."""


def run(reader: FeatureReader, data: str, settings: Settings, seed: int) -> Metrics:
    """Trains a head on the baseline, and tests it on the baseline and on this model.

    Raises:
        DataError: The dataset is of no known layout, or a file of it is wrong.
        PhregError: There is no baseline, or the head takes features of another width than the model's.
    """
    original = reader.baseline
    if original is None:
        raise PhregError(
            "head-transfer asked for without the model that heads were trained on; give it as --baseline, "
            "e.g. the original of a repaired model"
        )
    train, test = settings.open(data, "train"), settings.open(data, "val")
    classes = len(train.classes)
    head = train_head(batches(original, train, settings, seed), classes, settings, seed, original)
    of_original = try_head(head, original, test, settings)
    here, steps = of_original, max(1, math.ceil(settings.again * settings.steps))
    if reader.identity != original.identity:
        _check_width(head, reader, settings)
        here = try_head(head, reader, test, settings)
    short = settings.model_copy(update={"steps": steps})
    longer = train_head(
        batches(reader, train, short, seed), classes, short, seed, reader, copy.deepcopy(head)
    )
    again = try_head(longer, reader, test, settings)
    tested = {"miou": here, "miou_original": of_original, "miou_again": again}
    return Metrics(
        {name: found.figures["miou"] for name, found in tested.items()},
        {"iou": here.detail["iou"]},
        {"readout": here.notes["readout"], "steps_again": steps},
        counts={name: found.counts["miou"] for name, found in tested.items()},
        pictures=here.pictures,
        resampled={name: found.resampled["miou"] for name, found in tested.items() if found.resampled},
    )


def _check_width(head: nn.Module, reader: FeatureReader, settings: Settings) -> None:
    """Refuses a model whose patch features a head cannot take."""
    channels = len(next(head.parameters()))  # the batch norm's weights
    blank = torch.zeros(1, 3, *reader.backbone.spec.input_size, dtype=torch.uint8)
    reading = settings.reading.model_copy(update={"window": None})
    width = reader(reader.normalise(blank), reading).grids.shape[-1]
    if width != channels:
        raise PhregError(
            f"a head of {channels} channels, trained on the baseline, asked of {reader.backbone.describe()}, "
            f"whose patches have {width}; give models of one width, read the same way (reading.readout)"
        )
