"""What the segmentation tasks share: scores of patches laid onto pictures, counted, and put into figures.

Dense ──score──► (classes, rows, cols) ──restored──► classes of pixels ──► confusion matrix
                                                └── where the baseline has artifacts ──► another
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.evaluation.artifacts import artifact_places
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.datasets.layouts import Split, other_layouts
from phreg.evaluation.datasets.masks import MaskIndex, Segmentation, class_shares
from phreg.evaluation.datasets.segmentation import LAYOUTS, open_segmentation
from phreg.evaluation.dense import Dense, Placement
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import IGNORE, ConfusionMeter
from phreg.evaluation.pixel_scores import score_pictures
from phreg.evaluation.protocol import ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec

logger = logging.getLogger(__name__)

SEGMENTATION_TREE = f"""dataset/
  images/train/0001.jpg …  to train on
  images/val/0002.jpg …    to test on
  masks/train/0001.png …   index of each pixel's class; 255 does not count
  masks/val/0002.png …
  classes.txt              names of the classes, one a line, from index 0

{other_layouts(LAYOUTS, "folder")}"""
"""How data lies on disk, for training and testing."""

SEGMENTATION_METRICS = (
    MetricSpec("miou", about="intersection over union of a class, mean of classes"),
    MetricSpec("mean_accuracy", about="share of a class's pixels that are right, mean of classes"),
    MetricSpec("pixel_accuracy", about="share of pixels that are right"),
    MetricSpec(
        "artifact_accuracy", about="share of pixels that are right, of those where the baseline has artifacts"
    ),
    MetricSpec("iou", about="intersection over union of a class"),
    MetricSpec("accuracy", about="share of a class's pixels that are right"),
)
"""What `measure_segmentation` measures, in all and of each class."""


class SegmentationSettings(ProtocolSettings):
    """The dataset of a segmentation task, and how its pictures are read."""

    layout: str = "auto"
    """Layout of the dataset: camvid, voc21, voc20, pascal-context-60 or -59, coco-stuff, coco-object,
    ade20k, cityscapes or folder (images/, masks/ of class indices, 255 uncounted, classes.txt); auto tells it
    by its folders."""
    ignore_index: MaskIndex | None = None
    """Index that is not counted in the masks of a folder; unset means 255, which is refused where it occurs
    and a class of classes.txt does not."""
    reading: FeatureConfig = FeatureConfig(size=448)
    """Canvas of the pictures."""

    def open(self, data: str, split: Split) -> Segmentation:
        """Lists the images and masks of a split.

        Raises:
            DataError: The dataset is of no known layout, or a file of it is wrong.
        """
        return open_segmentation(data, split, layout=self.layout, ignore_index=self.ignore_index)


@torch.no_grad()
def measure_segmentation(
    reader: FeatureReader,
    test: Segmentation,
    reading: FeatureConfig,
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
        artifacts, unless none that counts lies there; IoU and accuracy of each class, and how many pixels
        show it.

    Raises:
        PhregError: No pixel counts.
    """
    places = artifact_places(reader, test.images, reading)
    meter, repaired = ConfusionMeter(len(test.classes)), ConfusionMeter(len(test.classes))
    images = repaired_images = 0
    for number, (scores, placement) in enumerate(score_pictures(reader, test.images, reading, score)):
        truth = placement.cut(test.mask(number, placement.picture_size))
        watch(scores, truth)
        predicted = decide(scores).cpu()
        meter.update(predicted, truth)
        images += bool((truth != IGNORE).any())
        if places is not None:
            there = placement.restore(places[number][None].float(), "nearest")[0] > 0
            repaired.update(predicted[there], truth[there])
            repaired_images += bool((truth[there] != IGNORE).any())
    found = segmentation_metrics(
        meter, images, test.classes, (repaired, repaired_images) if places is not None else None
    )
    notes = {**found.notes, "readout": reader.readout(reading)}
    return replace(found, notes=notes, **_resampled(test, meter, repaired if places is not None else None))


def _resampled(test: Segmentation, meter: ConfusionMeter, repaired: ConfusionMeter | None) -> dict[str, Any]:
    """Computes figures in samples of the pictures, of each of which meters were told once."""
    found, true, taken = (part.numpy().astype(float) for part in torch.stack(meter.pixels_of).unbind(1))
    figures = {
        "miou": PerPicture(found, true + taken - found),
        "mean_accuracy": PerPicture(found, true),
        "pixel_accuracy": PerPicture(found.sum(1, keepdims=True), true.sum(1, keepdims=True)),
    }
    if repaired is not None and repaired.pixels:
        found, true, _ = (part.numpy().astype(float) for part in torch.stack(repaired.pixels_of).unbind(1))
        figures["artifact_accuracy"] = PerPicture(found.sum(1, keepdims=True), true.sum(1, keepdims=True))
    return resample([test.images.name(number) for number in range(len(test))], figures)


def segmentation_metrics(
    meter: ConfusionMeter,
    images: int,
    classes: tuple[str, ...],
    repaired: tuple[ConfusionMeter, int] | None = None,
) -> Metrics:
    """Puts a confusion matrix into figures.

    Args:
        meter: All pixels.
        images: Images with pixels that count.
        classes: Names of the classes.
        repaired: Pixels where the baseline has artifacts alone, and the images with some that count; None
            without a baseline.

    Raises:
        PhregError: No pixel counts.
    """
    figures = {
        "miou": meter.miou,
        "mean_accuracy": meter.mean_accuracy,
        "pixel_accuracy": meter.pixel_accuracy,
    }
    over = {"pixels": meter.pixels, "images": images}
    counts = {
        "miou": over | {"classes": int((~meter.iou.isnan()).sum())},
        "mean_accuracy": over | {"classes": int((~meter.accuracy.isnan()).sum())},
        "pixel_accuracy": over,
    }
    notes: dict[str, Any] = {
        "true_pixels": dict(zip(classes, meter.matrix.sum(1).tolist(), strict=True)),
    }
    if repaired is not None:
        at_artifacts, there = repaired
        notes["pixels_at_artifacts"] = at_artifacts.pixels / meter.pixels
        if at_artifacts.pixels:
            figures["artifact_accuracy"] = at_artifacts.pixel_accuracy
            counts["artifact_accuracy"] = {"pixels": at_artifacts.pixels, "images": there}
        else:
            reason = "no pixel that counts lies at an artifact of the baseline"
            logger.warning("artifact_accuracy is left out: %s", reason)
            notes["left_out"] = {"artifact_accuracy": reason}
    detail = {
        kind: dict(zip(classes, values.tolist(), strict=True))
        for kind, values in (("iou", meter.iou), ("accuracy", meter.accuracy))
    }
    return Metrics(figures, detail, notes, counts=counts)


def patch_shares(
    dataset: Segmentation, number: int, placement: Placement, grid: tuple[int, int]
) -> Float[Tensor, "rows cols classes"]:
    """Reads a mask as the share of each patch that each class covers."""
    mask = dataset.mask(number, placement.picture_size)
    classes = placement.put(mask[None].float(), IGNORE)[0].long()
    return class_shares(classes, grid, len(dataset.classes))
