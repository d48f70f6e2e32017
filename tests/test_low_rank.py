"""Low-rank changes: exact in any order of summing, close to what was asked, in the weight's own precision."""

from fractions import Fraction

import pytest
import torch

from phreg.low_rank import Factors, bits_for, changed


def factors(rank=3, outputs=5, inputs=4, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, inputs, generator=generator)
    return Factors(down, scale * torch.randn(outputs, rank, generator=generator))


def exact(weight, low_rank):
    """The sum in rational numbers, rounded once to a double and then to fp32."""
    rows = []
    for row in range(weight.shape[0]):
        sums = []
        for column in range(weight.shape[1]):
            total = sum(
                Fraction(low_rank.up[row, k].item()) * Fraction(low_rank.down[k, column].item())
                for k in range(low_rank.down.shape[0])
            )
            sums.append(float(Fraction(weight[row, column].item()) + Fraction(float(total))))
        rows.append(sums)
    return torch.tensor(rows, dtype=torch.float64).float()


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("rank", [1, 64, 300])
def test_a_changed_weight_is_the_exact_sum_rounded(rank, scale):
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    added = factors(rank=rank, scale=scale).rounded()
    assert torch.equal(changed(weight, added), exact(weight, added))


def test_the_product_is_the_same_in_any_order_of_the_rank():
    weight, added = torch.zeros(5, 4), factors(rank=64).rounded()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(2))
    turned = Factors(added.down[order], added.up[:, order])
    assert torch.equal(changed(weight, added), changed(weight, turned))


@pytest.mark.parametrize(("rank", "bits"), [(1, 23), (128, 23), (129, 22), (512, 22), (513, 21), (8192, 20)])
def test_values_have_as_many_bits_as_keep_a_sum_of_products_within_a_double(rank, bits):
    assert bits_for(rank) == bits
    assert rank * 2 ** (2 * bits) <= 2**53


@pytest.mark.parametrize("rank", [8, 2000])
def test_rounding_keeps_each_value_to_the_bits_that_it_has(rank):
    asked = factors(rank=rank, scale=0.37)
    for before, after in zip(asked, asked.rounded(), strict=True):
        assert (after - before).abs().max() <= before.abs().max() * 2.0 ** -bits_for(rank)
        assert not torch.equal(after, before)


def test_factors_of_zeros_change_nothing():
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    nothing = Factors(torch.zeros(3, 4), torch.zeros(5, 3)).rounded()
    assert torch.equal(changed(weight, nothing), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_weight_is_rounded_as_one_trained_in_fp32_is(dtype):
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    added = factors().rounded()
    assert torch.equal(changed(weight, added), changed(weight.float(), added).to(dtype))
    assert changed(weight, added).dtype is dtype
