import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from phreg.backbones.base import Features
from phreg.config import LossConfig
from phreg.training.losses import cosine_distance, distillation_loss


def features(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(2, 3, 4, 8, generator=generator).to(dtype)
    return Features(patches, torch.randn(2, 8, generator=generator).to(dtype))


def test_the_loss_is_the_papers_formula():
    student, target = features(0), features(1)
    loss, terms = distillation_loss(student, target, LossConfig(pooled=0))
    cosine = F.cosine_similarity(student.patches, target.patches, dim=-1).mean()
    squared = ((student.patches - target.patches) ** 2).mean()
    assert loss.item() == pytest.approx((1 - cosine + squared).item(), rel=1e-6)
    assert set(terms) == {"cosine", "mse"}, "a term of weight 0 is left out"


@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10))
def test_weights_multiply_their_terms(cosine, mse, pooled):
    loss, terms = distillation_loss(
        features(0), features(1), LossConfig(cosine=cosine, mse=mse, pooled=pooled)
    )
    expected = cosine * terms["cosine"] + mse * terms["mse"] + pooled * terms["pooled"]
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)


def test_a_perfect_student_has_no_loss():
    same = features(0)
    # 1e-6: a cosine of 1 in fp32 is right to a few units in the last place.
    assert distillation_loss(same, same, LossConfig())[0].item() == pytest.approx(0, abs=1e-6)


def test_terms_are_computed_in_fp32_even_from_bf16():
    loss, terms = distillation_loss(features(0, torch.bfloat16), features(1, torch.bfloat16), LossConfig())
    assert loss.dtype == torch.float32 or terms["mse"].dtype == torch.float32


def test_zero_vectors_give_a_finite_gradient():
    student = torch.zeros(2, 4, requires_grad=True)
    cosine_distance(student, torch.ones(2, 4)).backward()
    assert torch.isfinite(student.grad).all()
