"""What the segmentation tasks share: scores of patches laid onto pictures, counted, and put into figures.

Dense ──score──► (classes, rows, cols) ──Placement.restore──► classes of pixels ──► confusion matrix
                                                    └── where the baseline has artifacts ──► another
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.evaluation.artifacts import artifact_places
from phreg.evaluation.datasets.labelled import IGNORE, Segmentation, class_shares
from phreg.evaluation.dense import Dense, Placement
from phreg.evaluation.features import FeatureReader, Reading
from phreg.evaluation.metrics.scores import ConfusionMeter
from phreg.evaluation.results import Metrics


@torch.no_grad()
def measure_segmentation(
    reader: FeatureReader,
    test: Segmentation,
    reading: Reading,
    score: Callable[[Dense], Float[Tensor, "classes rows cols"]],
    *,
    decide: Callable[[Tensor], Tensor] = lambda scores: scores.argmax(0),
    watch: Callable[[Tensor, Tensor], None] = lambda _scores, _truth: None,
) -> Metrics:
    """Segments every picture and compares with its mask at the picture's own resolution.

    Args:
        reader: The model.
        test: Pictures and masks.
        reading: How pictures are read.
        score: Scores the classes of each patch of a picture.
        decide: Makes classes of the scores of pixels; the best scored, if not given.
        watch: Shown the scores of each picture's pixels, and their true classes.

    Returns:
        `miou`, `mean_accuracy` and `pixel_accuracy`, and the accuracy of pixels where the baseline has
        artifacts; IoU and accuracy of each class.
    """
    places = artifact_places(reader, test.images, reading)
    meter, repaired = ConfusionMeter(len(test.classes)), ConfusionMeter(len(test.classes))
    for number, dense in enumerate(reader.stream(test.images, reading, "test images")):
        truth = dense.placement.cut(test.mask(number, dense.placement.picture_size))
        scores = dense.placement.restore(score(dense))
        watch(scores, truth)
        predicted = decide(scores).cpu()
        meter.update(predicted, truth)
        if places is not None:
            there = dense.placement.restore(places[number][None].float(), "nearest")[0] > 0
            repaired.update(predicted[there], truth[there])
    found = segmentation_metrics(meter, test.classes, repaired if places is not None else None)
    return Metrics(found.figures, found.detail, {**found.notes, "readout": reader.readout(reading)})


def segmentation_metrics(
    meter: ConfusionMeter, classes: tuple[str, ...], repaired: ConfusionMeter | None = None
) -> Metrics:
    """Puts a confusion matrix into figures.

    Args:
        meter: All pixels.
        classes: Names of the classes.
        repaired: Pixels where the baseline has artifacts alone; None without a baseline.
    """
    figures = {
        "miou": meter.miou,
        "mean_accuracy": meter.mean_accuracy,
        "pixel_accuracy": meter.pixel_accuracy,
    }
    notes = {}
    if repaired is not None:
        total = int(repaired.matrix.sum())
        figures["artifact_accuracy"] = repaired.pixel_accuracy if total else math.nan
        notes["pixels_at_artifacts"] = total / max(1, int(meter.matrix.sum()))
    detail = {
        kind: dict(zip(classes, values.tolist(), strict=True))
        for kind, values in (("iou", meter.iou), ("accuracy", meter.accuracy))
    }
    return Metrics(figures, detail, notes)


def patch_shares(
    dataset: Segmentation, number: int, placement: Placement, grid: tuple[int, int]
) -> Float[Tensor, "rows cols classes"]:
    """Reads a mask as the share of each patch that each class covers."""
    mask = dataset.mask(number, placement.picture_size)
    classes = placement.put(mask[None].float(), IGNORE)[0].long()
    return class_shares(classes, grid, len(dataset.classes))
