"""The figures by which dense features are judged, each a small pure function or a meter that adds up batches.

All shares are fractions of 1. The IoU of a class that occurs nowhere is NaN, and means leave it out; a figure
over nothing at all is an error. Checked against scikit-learn and torchmetrics in the tests.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from phreg.errors import PhregError

IGNORE = 255
"""Index of pixels that no figure counts."""


# --- Segmentation ---------------------------------------------------------------------------------------


class ConfusionMeter:
    """Counts which class was taken for which.

    Args:
        num_classes: Classes, numbered from 0.
        ignore: Index in the truth that is not counted.
    """

    def __init__(self, num_classes: int, ignore: int = IGNORE) -> None:
        self.num_classes = num_classes
        self.ignore = ignore
        self.ignored = 0
        self.pixels_of: list[Int64[Tensor, "3 classes"]] = []
        """Pixels of each class that were found, that are of it, and that were taken for it, by update."""
        self.matrix: Int64[Tensor, "truth predicted"] = torch.zeros(
            num_classes, num_classes, dtype=torch.long
        )

    def update(self, predicted: Int64[Tensor, "*places"], truth: Int64[Tensor, "*places"]) -> None:
        """Adds predictions.

        Raises:
            PhregError: A class is out of range.
        """
        counted = truth != self.ignore
        self.ignored += int((~counted).sum())
        predicted, truth = predicted[counted], truth[counted]
        for name, labels in (("predicted", predicted), ("true", truth)):
            if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise PhregError(
                    f"found {name} classes {int(labels.min())} to {int(labels.max())} where there are "
                    f"{self.num_classes}, 0 to {self.num_classes - 1}; lengthen the class list, or correct "
                    f"the labels (ignored is {self.ignore})"
                )
        pairs = torch.bincount(truth * self.num_classes + predicted, minlength=self.num_classes**2)
        found = pairs.view_as(self.matrix).cpu()
        self.matrix += found
        self.pixels_of.append(torch.stack([found.diag(), found.sum(1), found.sum(0)]))

    @property
    def pixels(self) -> int:
        """Counts the pixels that figures are computed over."""
        return int(self.matrix.sum())

    @property
    def iou(self) -> Float[Tensor, " classes"]:
        """Intersection over union of each class; NaN where a class is neither true nor predicted."""
        hits = self.matrix.diag().double()
        return hits / (self.matrix.sum(0) + self.matrix.sum(1) - hits)

    @property
    def accuracy(self) -> Float[Tensor, " classes"]:
        """Share of each class's pixels that were found; NaN where there are none."""
        return self.matrix.diag().double() / self.matrix.sum(1)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur.

        Raises:
            PhregError: No pixel counts.
        """
        self._check()
        return float(self.iou.nanmean())

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes that are true somewhere of the share that was found.

        Raises:
            PhregError: No pixel counts.
        """
        self._check()
        return float(self.accuracy.nanmean())

    @property
    def pixel_accuracy(self) -> float:
        """Share of counted pixels whose class is right.

        Raises:
            PhregError: No pixel counts.
        """
        self._check()
        return float(self.matrix.diag().sum() / self.matrix.sum())

    def _check(self) -> None:
        if not self.pixels:
            raise PhregError(
                f"a figure asked for over no pixel that counts, found {self.ignored} that are ignored (class "
                f"{self.ignore}); give masks that show a class"
            )


# --- Classification -------------------------------------------------------------------------------------


def is_in_top_k(
    scores: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"], k: int
) -> Bool[Tensor, " images"]:
    """Tells of each image whether its class is among the k best scored."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(dim=1)


def top_k(scores: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"], k: int) -> float:
    """Computes the share of images whose class is among the k best scored.

    Raises:
        PhregError: There are no images.
    """
    if not len(labels):
        raise PhregError(f"top-{k} accuracy asked for over no images; give scores of at least one")
    return float(is_in_top_k(scores, labels, k).double().mean())


# --- Depth ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthErrors:
    """Errors of predicted depths (Eigen et al. 2014, arXiv 1406.2283).

    Attributes:
        rmse: Root mean square error, in the unit of the depths.
        abs_rel: Mean of |error| / true depth.
        log10: Mean |log10 predicted - log10 true|.
        delta1: Share of pixels where the ratio, the larger over the smaller, is below 1.25.
        delta2: The same below 1.25².
        delta3: The same below 1.25³.
    """

    rmse: float
    abs_rel: float
    log10: float
    delta1: float
    delta2: float
    delta3: float


def depth_errors(predicted: Float[Tensor, " pixels"], truth: Float[Tensor, " pixels"]) -> DepthErrors:
    """Compares depths of one image's valid pixels; both positive.

    Raises:
        PhregError: There are no pixels, or a depth is not positive.
    """
    predicted, truth = predicted.double(), truth.double()
    if not truth.numel() or not (predicted.min() > 0 and truth.min() > 0):
        raise PhregError(
            f"depth errors asked for of {truth.numel()} pixels, which must be some, and positive; pass valid "
            "pixels alone, and clamp predictions to the range of depths"
        )
    ratio = torch.maximum(predicted / truth, truth / predicted)
    return DepthErrors(
        rmse=float((predicted - truth).square().mean().sqrt()),
        abs_rel=float(((predicted - truth).abs() / truth).mean()),
        log10=float((predicted.log10() - truth.log10()).abs().mean()),
        delta1=float((ratio < 1.25).double().mean()),
        delta2=float((ratio < 1.25**2).double().mean()),
        delta3=float((ratio < 1.25**3).double().mean()),
    )


# --- Boxes ----------------------------------------------------------------------------------------------


def box_iou(
    boxes: Float[Tensor, "boxes 4"], others: Float[Tensor, "others 4"]
) -> Float[Tensor, "boxes others"]:
    """Computes the IoU of each pair of boxes (left, top, right, bottom), ends exclusive."""
    first, second = boxes[:, None].double(), others[None].double()
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    shared = overlap.clamp(min=0).prod(-1)
    areas = [(side[..., 2:] - side[..., :2]).prod(-1) for side in (first, second)]
    return (shared / (areas[0] + areas[1] - shared)).to(boxes.dtype)


def is_localised(box: Float[Tensor, " 4"], truths: Float[Tensor, "boxes 4"], threshold: float = 0.5) -> bool:
    """Tells whether a box hits any true one, i.e. has at least that IoU; CorLoc is the mean over images.

    At the threshold counts, as in the evaluation of LOST (Siméoni et al. 2021); PASCAL VOC asks for more.
    """
    return bool((box_iou(box[None], truths) >= threshold).any())


# --- Maps -----------------------------------------------------------------------------------------------


def pearson(map: Float[Tensor, "*places"], other: Float[Tensor, "*places"]) -> float:
    """Computes the correlation of two maps; NaN where one is constant."""
    pair = torch.stack([map.flatten(), other.flatten()]).double()
    centred = pair - pair.mean(dim=1, keepdim=True)
    lengths = centred.norm(dim=1)
    return float(centred[0] @ centred[1] / lengths.prod()) if lengths.prod() > 0 else math.nan


# --- Video ----------------------------------------------------------------------------------------------

BOUNDARY_TOLERANCE = 0.008
"""Distance within which boundaries meet, as a fraction of the image diagonal (DAVIS)."""


def region_similarity(predicted: Bool[Tensor, "rows cols"], truth: Bool[Tensor, "rows cols"]) -> float:
    """Computes J of Perazzi et al. 2016: the IoU of two masks; 1 where both are empty."""
    union = (predicted | truth).sum()
    return float((predicted & truth).sum() / union) if union else 1.0


def boundary_accuracy(predicted: Bool[Tensor, "rows cols"], truth: Bool[Tensor, "rows cols"]) -> float:
    """Computes F of Perazzi et al. 2016: how far the boundaries of two masks meet.

    The harmonic mean of the share of predicted boundary within `BOUNDARY_TOLERANCE` of the true one, and the
    other way round; 1 where neither mask has a boundary.
    """
    lines = [_boundary(mask.cpu().numpy()) for mask in (predicted, truth)]
    if not (lines[0].any() or lines[1].any()):
        return 1.0
    if not (lines[0].any() and lines[1].any()):
        return 0.0
    reach = math.ceil(BOUNDARY_TOLERANCE * math.hypot(*predicted.shape))
    near = [np.asarray(distance_transform_edt(~line)) <= reach for line in lines]
    precision, recall = near[1][lines[0]].mean(), near[0][lines[1]].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """Marks the pixels that differ from the one to the right, below, or both."""
    right, below = np.pad(mask, ((0, 0), (0, 1)), "edge")[:, 1:], np.pad(mask, ((0, 1), (0, 0)), "edge")[1:]
    both = np.pad(mask, ((0, 1), (0, 1)), "edge")[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ both)
