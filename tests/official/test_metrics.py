"""Metrics against torchmetrics: of a split of segmentation, of depths, of images and of boxes."""

import warnings

import pytest
import torch

from phreg.evaluation.metrics.scores import (
    IGNORE,
    ConfusionMeter,
    box_iou,
    depth_errors,
    is_localised,
    pearson,
    top_k,
)
from phreg.evaluation.tasks.retrieval import ranks

CLOSE = 1e-6


@pytest.fixture(scope="module")
def torchmetrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of its own dependencies on import
        found = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
        import torchmetrics.detection
        import torchmetrics.functional.detection  # noqa: F401
    return found


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def split(classes=7, pictures=5):
    """Predictions that are half right on pictures of several sizes, a fifth of whose pixels do not count."""
    generator = seeded()
    for number in range(pictures):
        size = (11 + number, 17 - number)
        truth = torch.randint(classes - 1, size, generator=generator)  # the last class is never true
        guess = torch.randint(classes, size, generator=generator)
        predicted = torch.where(torch.rand(size, generator=generator) < 0.5, truth, guess)
        truth[torch.rand(size, generator=generator) < 0.2] = IGNORE
        yield predicted, truth


def test_segmentation_over_a_split(torchmetrics):
    known = {"num_classes": 7, "ignore_index": IGNORE}
    iou = torchmetrics.classification.MulticlassJaccardIndex(**known, average="none")
    pixels = torchmetrics.classification.MulticlassAccuracy(**known, average="micro")
    recall = torchmetrics.classification.MulticlassAccuracy(**known, average="none")
    meter = ConfusionMeter(7)
    for predicted, truth in split():
        meter.update(predicted, truth)
        for theirs in (iou, pixels, recall):
            theirs.update(predicted.flatten(), truth.flatten())
    torch.testing.assert_close(meter.iou.float(), iou.compute(), atol=CLOSE, rtol=0)
    assert meter.miou == pytest.approx(float(iou.compute().mean()), abs=CLOSE)
    assert meter.pixel_accuracy == pytest.approx(float(pixels.compute()), abs=CLOSE)
    # Theirs gives a class that is never true 0; the mean here is over those that are.
    assert meter.mean_accuracy == pytest.approx(float(recall.compute()[:6].mean()), abs=CLOSE)


@pytest.mark.parametrize("k", [1, 5])
def test_classification(torchmetrics, k):
    scores = torch.randn(200, 12, generator=seeded(1))
    labels = torch.randint(12, (200,), generator=seeded(2))
    theirs = torchmetrics.functional.classification.multiclass_accuracy(
        scores, labels, num_classes=12, top_k=k, average="micro"
    )
    assert top_k(scores, labels, k) == pytest.approx(float(theirs), abs=CLOSE)


def test_depths(torchmetrics):
    truth = 0.1 + 9 * torch.rand(5000, generator=seeded(3), dtype=torch.float64)
    predicted = truth * (0.5 + torch.rand(5000, generator=seeded(4), dtype=torch.float64))
    theirs, ours = torchmetrics.functional, depth_errors(predicted, truth)
    assert ours.rmse == pytest.approx(float(theirs.mean_squared_error(predicted, truth, squared=False)))
    relative = theirs.mean_absolute_percentage_error(predicted, truth)
    assert ours.abs_rel == pytest.approx(float(relative), abs=CLOSE)
    logarithms = theirs.mean_absolute_error(predicted.log10(), truth.log10())
    assert ours.log10 == pytest.approx(float(logarithms), abs=CLOSE)
    ratio = torch.maximum(predicted / truth, truth / predicted)
    for power, share in enumerate((ours.delta1, ours.delta2, ours.delta3), start=1):
        within = (ratio < 1.25**power).long()
        accuracy = theirs.classification.binary_accuracy(within, torch.ones_like(within))
        assert share == pytest.approx(float(accuracy), abs=CLOSE)


def test_boxes_and_corloc(torchmetrics):
    corners = 50 * torch.rand(40, 4, generator=seeded(5))
    boxes = torch.cat([corners[:, :2], corners[:, :2] + 1 + corners[:, 2:]], dim=1)
    theirs = torchmetrics.functional.detection.intersection_over_union(
        boxes[:20], boxes[20:], aggregate=False
    )
    torch.testing.assert_close(box_iou(boxes[:20], boxes[20:]), theirs, atol=CLOSE, rtol=0)
    hits = [is_localised(box, boxes[20:]) for box in boxes[:20]]
    assert hits == (theirs >= 0.5).any(dim=1).tolist()
    assert any(hits)
    assert not all(hits)


def test_correlation_of_maps(torchmetrics):
    maps = torch.randn(2, 19, 23, generator=seeded(6), dtype=torch.float64)
    maps[1] += maps[0]
    theirs = torchmetrics.functional.pearson_corrcoef(maps[0].flatten(), maps[1].flatten())
    assert pearson(maps[0], maps[1]) == pytest.approx(float(theirs), abs=CLOSE)


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_of_retrieval_is_torchmetrics_hit_rate_both_ways(k):
    hit_rate = pytest.importorskip("torchmetrics.retrieval").RetrievalHitRate(top_k=k)
    generator = torch.Generator().manual_seed(k)
    images, texts = torch.randn(20, 6, generator=generator), torch.randn(60, 6, generator=generator)
    owners = torch.arange(60) // 3
    texts += images[owners]
    of_texts, of_images = ranks(images, texts, owners)
    cosines = torch.nn.functional.normalize(texts, dim=1) @ torch.nn.functional.normalize(images, dim=1).T
    right = owners[:, None] == torch.arange(20)
    for scores, truth, found in ((cosines, right, of_texts), (cosines.T, right.T, of_images)):
        queries = torch.arange(len(scores))[:, None].expand_as(scores)
        theirs = hit_rate(scores.flatten(), truth.flatten(), indexes=queries.flatten())
        assert float((found < k).double().mean()) == pytest.approx(float(theirs), abs=CLOSE)
        hit_rate.reset()
