import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from torch import Tensor

from phreg.errors import PhregError
from phreg.evaluation.metrics import scores as metrics

EXACT = 1e-6
"""Both sides count integers and divide once, ours in fp64, theirs in fp32 or fp64."""

with warnings.catch_warnings():
    # torchmetrics imports pkg_resources-era helpers that warn on import.
    warnings.simplefilter("ignore")
    import torchmetrics.functional as reference
    from torchmetrics.functional.detection import intersection_over_union


def labels(seed: int, classes: int, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (7, 9), generator=generator)
    predicted = torch.randint(classes, (7, 9), generator=generator)
    truth[torch.rand(7, 9, generator=generator) < ignored] = metrics.IGNORE
    return predicted, truth


@given(seed=st.integers(0, 10_000), classes=st.integers(2, 6))
def test_iou_and_accuracies_are_those_of_scikit_learn(seed: int, classes: int):
    predicted, truth = labels(seed, classes)
    meter = metrics.ConfusionMeter(classes)
    meter.update(predicted, truth)

    kept = truth != metrics.IGNORE
    true, said = truth[kept].numpy(), predicted[kept].numpy()
    matrix = sk.confusion_matrix(true, said, labels=range(classes))
    np.testing.assert_array_equal(meter.matrix, matrix)
    occurring = sorted(set(true) | set(said))
    theirs = sk.jaccard_score(true, said, labels=occurring, average=None, zero_division=0)
    np.testing.assert_allclose(meter.iou[occurring], theirs, atol=EXACT)
    assert meter.miou == pytest.approx(theirs.mean(), abs=EXACT)
    assert meter.pixel_accuracy == pytest.approx(sk.accuracy_score(true, said), abs=EXACT)
    recalls = sk.recall_score(true, said, labels=sorted(set(true)), average=None, zero_division=0)
    assert meter.mean_accuracy == pytest.approx(recalls.mean(), abs=EXACT)


def test_how_pixels_are_batched_does_not_matter():
    predicted, truth = labels(0, 4)
    whole, parts = metrics.ConfusionMeter(4), metrics.ConfusionMeter(4)
    whole.update(predicted, truth)
    for rows in range(7):
        parts.update(predicted[rows], truth[rows])
    assert torch.equal(whole.matrix, parts.matrix)


def test_a_class_that_occurs_nowhere_has_no_iou_and_does_not_lower_the_mean():
    meter = metrics.ConfusionMeter(3)
    meter.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert meter.iou[2].isnan()
    assert meter.miou == 1


@pytest.mark.parametrize("figure", ["miou", "mean_accuracy", "pixel_accuracy"])
def test_a_figure_over_no_pixel_is_an_error(figure: str):
    meter = metrics.ConfusionMeter(3)
    meter.update(torch.tensor([0, 1]), torch.tensor([metrics.IGNORE, metrics.IGNORE]))
    with pytest.raises(PhregError, match=r"no pixel .*2 .*ignored"):
        getattr(meter, figure)


def test_accuracy_over_no_image_is_an_error():
    with pytest.raises(PhregError, match="no images"):
        metrics.top_k(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), k=1)


@pytest.mark.parametrize("truth", [3, -1])
def test_a_class_out_of_range_is_refused(truth: int):
    with pytest.raises(PhregError, match="0 to 2"):
        metrics.ConfusionMeter(3).update(torch.tensor([0]), torch.tensor([truth]))


@given(seed=st.integers(0, 10_000), k=st.integers(1, 5))
def test_top_k_is_that_of_scikit_learn(seed: int, k: int):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(40, 6, generator=generator)
    truth = torch.randint(6, (40,), generator=generator)
    theirs = sk.top_k_accuracy_score(truth.numpy(), scores.numpy(), k=k, labels=range(6))
    assert metrics.top_k(scores, truth, k) == pytest.approx(theirs, abs=EXACT)


@given(seed=st.integers(0, 10_000))
def test_depth_errors_are_those_of_scikit_learn(seed: int):
    generator = torch.Generator().manual_seed(seed)
    predicted, truth = (0.1 + 10 * torch.rand(2, 50, generator=generator, dtype=torch.float64)).unbind()
    found = metrics.depth_errors(predicted, truth)
    true, said = truth.numpy(), predicted.numpy()
    assert found.rmse == pytest.approx(sk.root_mean_squared_error(true, said), rel=EXACT)
    assert found.abs_rel == pytest.approx(sk.mean_absolute_percentage_error(true, said), rel=EXACT)
    assert found.log10 == pytest.approx(sk.mean_absolute_error(np.log10(true), np.log10(said)), rel=EXACT)
    ratio = np.maximum(true / said, said / true)
    shares = [float((ratio < 1.25**power).mean()) for power in (1, 2, 3)]
    assert [found.delta1, found.delta2, found.delta3] == pytest.approx(shares)


def test_depths_that_are_not_positive_are_refused():
    with pytest.raises(PhregError, match="positive"):
        metrics.depth_errors(torch.tensor([0.0]), torch.tensor([1.0]))


@given(seed=st.integers(0, 10_000))
def test_box_iou_is_that_of_torchmetrics(seed: int):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 20, (2, 5, 4), generator=generator).float()
    boxes = torch.cat([corners[..., :2], corners[..., :2] + 1 + corners[..., 2:]], dim=-1)
    theirs = intersection_over_union(boxes[0], boxes[1], aggregate=False)
    torch.testing.assert_close(metrics.box_iou(boxes[0], boxes[1]), theirs, atol=EXACT, rtol=0)


def test_an_object_is_localised_by_half_of_any_true_box_as_lost_counts():
    box = torch.tensor([0.0, 0, 10, 10])
    exactly_half = torch.tensor([[0.0, 0, 10, 5], [50, 50, 60, 60]])
    assert metrics.is_localised(box, exactly_half)
    assert not metrics.is_localised(box, exactly_half - torch.tensor([0.0, 0, 0, 1]))


@given(seed=st.integers(0, 10_000))
def test_pearson_is_that_of_torchmetrics(seed: int):
    pair = torch.randn(2, 6, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    theirs = reference.pearson_corrcoef(pair[0].flatten(), pair[1].flatten())
    assert metrics.pearson(pair[0], pair[1]) == pytest.approx(float(theirs), abs=EXACT)


def test_a_constant_map_correlates_with_nothing():
    assert math.isnan(metrics.pearson(torch.ones(3), torch.arange(3.0)))


@given(seed=st.integers(0, 10_000))
def test_region_similarity_is_the_jaccard_score(seed: int):
    pair = torch.rand(2, 8, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    theirs = sk.jaccard_score(pair[0].flatten().numpy(), pair[1].flatten().numpy(), zero_division=1)
    assert metrics.region_similarity(pair[0], pair[1]) == pytest.approx(theirs, abs=EXACT)


def square(top: int, left: int, side: int = 10, size: int = 60) -> Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_boundaries_within_the_tolerance_meet_and_those_beyond_do_not():
    # 0.8 % of a diagonal of 84.9 pixels, rounded up: one pixel.
    assert metrics.boundary_accuracy(square(20, 20), square(20, 20)) == 1
    assert metrics.boundary_accuracy(square(20, 20), square(21, 20)) == 1
    assert metrics.boundary_accuracy(square(20, 20), square(40, 40)) == 0
    assert 0 < metrics.boundary_accuracy(square(20, 20), square(23, 20)) < 1


def test_two_masks_without_a_boundary_agree_and_one_alone_does_not():
    nothing = torch.zeros(60, 60, dtype=torch.bool)
    assert metrics.boundary_accuracy(nothing, nothing) == 1
    assert metrics.boundary_accuracy(nothing, square(20, 20)) == 0
    assert metrics.region_similarity(nothing, nothing) == 1
