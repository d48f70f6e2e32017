"""The loss terms, by values computed by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phreg.backbones.base import Features
from phreg.config import LossConfig
from phreg.training.losses import Outputs, cosine_distance, distillation_terms, pooled_loss, total_loss

# One image of one row of two patches, and one pooled output, of two channels each.
STUDENT = Features(torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]]]), torch.tensor([[3.0, 4.0]]))
TARGET = Features(torch.tensor([[[[4.0, 3.0], [0.0, 1.0]]]]), torch.tensor([[0.0, 2.0]]))

COSINE = 1 - (24 / 25 + 0) / 2
MSE = (1 + 1 + 1 + 1) / 4
RELATIVE = MSE / ((16 + 9 + 0 + 1) / 4)  # the target's mean square
# Cosine 8 / (5 * 2); squared error (9 + 4) / 2, over the target's mean square 4 / 2.
POOLED = (1 - 8 / 10) + (13 / 2) / (4 / 2)


def distillation_loss(student, target, config):
    return total_loss(distillation_terms(config), Outputs(torch.zeros(1, 3, 2, 4), student, target))


def only(**weights):
    return LossConfig(**({"cosine": 0, "mse": 0, "pooled": 0} | weights))


def test_every_term_has_the_value_computed_by_hand():
    loss, terms = distillation_loss(STUDENT, TARGET, LossConfig())
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(
        {"cosine": COSINE, "mse": MSE, "pooled": POOLED}
    )
    assert loss.item() == pytest.approx(COSINE + MSE + POOLED)


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_loss_is_the_weighted_sum_of_the_terms_computed_by_hand(cosine, mse, pooled):
    loss, _ = distillation_loss(STUDENT, TARGET, LossConfig(cosine=cosine, mse=mse, pooled=pooled))
    assert loss.item() == pytest.approx(cosine * COSINE + mse * MSE + pooled * POOLED, rel=1e-5)


TERMS = {"cosine": COSINE, "mse": MSE, "relative_mse": RELATIVE, "pooled": POOLED}


@pytest.mark.parametrize(("name", "value"), TERMS.items())
def test_a_term_of_weight_0_is_neither_computed_nor_counted(name, value):
    loss, terms = distillation_loss(STUDENT, TARGET, only(**{name: 2.0}))
    assert terms.keys() == {name}
    assert terms[name].item() == pytest.approx(value), "terms are unweighted"
    assert loss.item() == pytest.approx(2 * value)


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_the_relative_error_is_the_same_for_models_of_any_scale(scale):
    student, target = (
        side._replace(patches=scale * side.patches, pooled=scale * side.pooled) for side in (STUDENT, TARGET)
    )
    loss, _ = distillation_loss(student, target, only(relative_mse=1.0))
    assert loss.item() == pytest.approx(RELATIVE)


def test_without_any_weight_the_loss_is_a_tensor_of_0():
    loss, terms = distillation_loss(STUDENT, TARGET, only())
    assert isinstance(loss, torch.Tensor)
    assert loss.item() == 0
    assert terms == {}


def test_a_perfect_student_has_no_loss():
    # 1e-6: a cosine of 1 in fp32 is right to a few units in the last place.
    assert distillation_loss(TARGET, TARGET, LossConfig())[0].item() == pytest.approx(0, abs=1e-6)


@given(st.floats(1e-2, 1e2))
def test_the_pooled_loss_is_the_same_for_models_of_any_scale(scale):
    assert pooled_loss(scale * STUDENT.pooled, scale * TARGET.pooled).item() == pytest.approx(
        POOLED, rel=1e-5
    )


def test_a_pooled_target_of_zeros_is_measured_against_the_smallest_mean_square():
    # Squared error 1e-8 over the floor of 1e-8, and a cosine of 0.
    assert pooled_loss(torch.full((1, 4), 1e-4), torch.zeros(1, 4)).item() == pytest.approx(1 + 1)


def test_errors_that_bf16_cannot_hold_are_computed_in_fp32():
    # 256 - 1.5 = 254.5 takes 9 bits, and bf16 has 8; its square takes 18.
    student = Features(torch.full((1, 1, 1, 2), 256.0), torch.full((1, 2), 256.0))
    target = Features(torch.full((1, 1, 1, 2), 1.5), torch.full((1, 2), 1.5))
    halves = [Features(*(part.bfloat16() for part in side)) for side in (student, target)]
    _, terms = distillation_loss(*halves, LossConfig())
    assert terms["mse"].item() == 254.5**2
    assert terms["pooled"].item() == pytest.approx(254.5**2 / 1.5**2, rel=1e-6)


def test_cosines_that_bf16_cannot_hold_are_computed_in_fp32():
    # The product 241 * 241 + 15 * 15 and the norms take more than the 8 bits of bf16.
    student, target = torch.tensor([[241.0, 15.0]]), torch.tensor([[15.0, 241.0]])
    expected = 1 - 2 * 241 * 15 / (241**2 + 15**2)
    assert cosine_distance(student.bfloat16(), target.bfloat16()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("side", ["student", "target", "both"])
def test_terms_are_in_fp32_whatever_either_side_is_in(side, dtype):
    student, target = (
        Features(*(part.to(dtype) for part in features)) if side in (name, "both") else features
        for name, features in (("student", STUDENT), ("target", TARGET))
    )
    for weights in ({"cosine": 1}, {"mse": 1}, {"pooled": 1}):
        loss, terms = distillation_loss(student, target, only(**weights))
        assert {loss.dtype, *(term.dtype for term in terms.values())} == {torch.float32}


def test_each_norm_is_raised_by_1e_8():
    # A vector of norm 1e-8 counts as one of norm 2e-8, whichever side it is on.
    short, unit = torch.tensor([[1e-8, 0.0]]), torch.tensor([[1.0, 0.0]])
    assert cosine_distance(short, unit).item() == pytest.approx(0.5)
    assert cosine_distance(unit, short).item() == pytest.approx(0.5)


def test_zero_vectors_give_a_finite_gradient():
    student = torch.zeros(2, 4, requires_grad=True)
    cosine_distance(student, torch.ones(2, 4)).backward()
    assert torch.isfinite(student.grad).all()
