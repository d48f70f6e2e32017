import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity

from phreg.errors import PhregError
from phreg.evaluation.metrics.agreement import AgreementMeter, agreement, drift

ROUNDING = 1e-5
"""fp32 cosines are good to about six digits."""


def grids(seed: int = 0, images: int = 3) -> Tensor:
    return torch.randn(images, 5, 6, 8, generator=torch.Generator().manual_seed(seed))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_features_that_point_along_the_reference_agree_fully_at_any_length(scale: float, seed: int):
    found = agreement(grids(seed) * scale, grids(seed))
    assert (found.mean, found.worst_percent) == pytest.approx((1, 1), abs=ROUNDING)


@given(seed=st.integers(0, 100), other=st.integers(101, 200))
def test_agreement_is_the_mean_cosine_and_the_worst_lies_below_it(seed: int, other: int):
    found = agreement(grids(seed), grids(other))
    cosines = cosine_similarity(grids(seed), grids(other), dim=-1).flatten()
    assert found.mean == pytest.approx(float(cosines.mean()), abs=ROUNDING)
    assert float(cosines.min()) - ROUNDING <= found.worst_percent <= found.mean


def test_the_worst_percent_is_the_cosine_that_all_but_one_in_a_hundred_patches_reach():
    reference = torch.zeros(1, 10, 20, 2)
    reference[..., 0] = 1
    angles = torch.linspace(0, 1.5, 200)
    features = torch.stack([angles.cos(), angles.sin()], dim=-1).view(1, 10, 20, 2)
    # Of 200 patches the worst percent are two.
    assert agreement(features, reference).worst_percent == pytest.approx(
        float(angles[-2].cos()), abs=ROUNDING
    )


def test_masked_patches_are_reported_on_their_own():
    features, mask = grids(), torch.zeros(3, 5, 6, dtype=torch.bool)
    mask[:, 0, 0] = True
    features[mask] *= -1

    found = agreement(features, grids(), mask)

    assert found.masked == pytest.approx(-1, abs=ROUNDING)
    assert found.mean == pytest.approx(1 - 2 / 30, abs=ROUNDING)
    assert (found.patches, found.masked_patches) == (90, 3)


def test_without_masked_patches_there_is_no_figure_for_them():
    assert agreement(grids(), grids()).masked is None
    assert agreement(grids(), grids(), torch.zeros(3, 5, 6, dtype=torch.bool)).masked is None


@given(split=st.integers(1, 6))
def test_how_images_are_batched_does_not_matter(split: int):
    features, reference = grids(1, images=6), grids(2, images=6)
    mask = cosine_similarity(features, reference, dim=-1) < 0
    meter = AgreementMeter()
    for batch in zip(features.split(split), reference.split(split), mask.split(split), strict=True):
        meter.update(*batch)
    assert meter.compute() == agreement(features, reference, mask)


def test_half_precision_features_are_compared_in_full():
    half = grids().bfloat16()
    # Eight bits a channel: the direction is off by less than 1e-4, a cosine computed in bf16 by up to 4e-3.
    assert agreement(half, grids()).mean == pytest.approx(1, abs=1e-4)


def test_agreement_of_nothing_is_refused():
    with pytest.raises(PhregError, match="no features"):
        AgreementMeter().compute()


@given(scale=st.floats(1e-3, 1e3))
def test_outputs_that_only_changed_length_did_not_drift(scale: float):
    pooled = grids().flatten(0, 2)
    found = drift(pooled * scale, pooled)
    assert (found.mean, found.min) == pytest.approx((1, 1), abs=ROUNDING)


def test_drift_names_the_mean_and_the_worst_image():
    original = torch.eye(4)
    pooled = original.clone()
    pooled[2] = original[3]
    found = drift(pooled, original)
    assert (found.mean, found.min) == pytest.approx((0.75, 0), abs=ROUNDING)


def test_drift_of_no_images_is_refused():
    with pytest.raises(PhregError, match="no global outputs"):
        drift(torch.zeros(0, 4), torch.zeros(0, 4))
