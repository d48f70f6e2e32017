"""What is heard of attention has to be what libraries that spell attention out say it is."""

import copy

import pytest
import torch
from families import FAMILIES
from torch.nn import functional

from phreg.analysis.attention import attention_weights
from phreg.backbones.resolve import adapt
from phreg.errors import UnsupportedModelError
from phreg.registers import add_registers


def pictures(backbone, count=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *backbone.spec.input_size, generator=generator)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)  # shares of 1, summed in another order


@pytest.mark.parametrize("family", ["vit", "clip-vision", "dinov3", "dinov2"])
def test_weights_are_those_of_the_eager_implementation_of_transformers(family):
    model = FAMILIES[f"transformers/{family}"]()
    backbone = adapt(copy.deepcopy(model))
    model.set_attn_implementation("eager")
    images = pictures(backbone)
    with torch.no_grad():
        expected = model(pixel_values=images, output_attentions=True).attentions
    assert_same(attention_weights(backbone, images), expected)


@pytest.mark.parametrize("family", ["vit", "vit-qk-norm", "eva02", "dinov3", "vit-rope"])
def test_weights_are_those_that_timm_computes_without_fused_attention(family, monkeypatch):
    model = FAMILIES[f"timm/{family}"]()
    backbone = adapt(copy.deepcopy(model))
    images = pictures(backbone)
    expected = []
    real = torch.Tensor.softmax

    def softmax(tensor, *arguments, **settings):
        expected.append(real(tensor, *arguments, **settings))
        return expected[-1]

    for block in model.blocks:
        block.attn.fused_attn = False
    monkeypatch.setattr(torch.Tensor, "softmax", softmax)
    with torch.no_grad():
        model.forward_features(images)
    monkeypatch.undo()
    assert_same(attention_weights(backbone, images), expected)


def test_weights_are_those_that_multihead_attention_returns_in_open_clip(monkeypatch):
    backbone = adapt(FAMILIES["open_clip/clip"]())
    images = pictures(backbone)
    found = attention_weights(backbone, images)
    expected = []
    real = torch.nn.MultiheadAttention.forward

    def forward(self, *arguments, **settings):
        asked = settings | {"need_weights": True, "average_attn_weights": False}
        output, weights = real(self, *arguments, **asked)
        expected.append(weights)
        return output, weights

    monkeypatch.setattr(torch.nn.MultiheadAttention, "forward", forward)
    with torch.no_grad():
        backbone.run(images)
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["transformers/clip", "timm/siglip", "open_clip/coca", "open_clip/siglip"])
def test_there_is_one_map_a_block_over_the_tokens_inside_whatever_pools_behind(family):
    backbone = add_registers(adapt(FAMILIES[family]()), 3)
    images = pictures(backbone)
    tokens = backbone.layout(images).num_tokens
    found = attention_weights(backbone, images)
    shape = (2, backbone.spec.num_heads, tokens, tokens)
    assert [tuple(weights.shape) for weights in found] == [shape] * len(backbone.blocks)
    # A softmax adds up to 1, but for rounding.
    torch.testing.assert_close(found[0].sum(-1), torch.ones(shape[:-1]), atol=1e-5, rtol=0)


def test_only_the_queries_asked_for_come_back_and_only_what_is_kept_of_them():
    backbone = adapt(FAMILIES["timm/vit"]())
    images = pictures(backbone)
    whole = attention_weights(backbone, images)
    assert_same(attention_weights(backbone, images, slice(0, 1)), [weights[:, :, :1] for weights in whole])
    means = attention_weights(backbone, images, slice(1, 5), lambda weights: weights.mean((1, 2)))
    assert_same(means, [weights[:, :, 1:5].mean((1, 2)) for weights in whole])


def test_listening_changes_no_output_and_ends():
    backbone = adapt(FAMILIES["open_clip/clip"]())
    images = pictures(backbone)
    original, fast = functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        before = backbone.run(images)
    attention_weights(backbone, images)
    assert functional.scaled_dot_product_attention is original
    assert torch.backends.mha.get_fastpath_enabled() == fast
    with torch.no_grad():
        assert torch.equal(backbone.run(images), before)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_attention_that_goes_past_the_function_is_refused_with_what_to_load(library):
    model = FAMILIES[f"{library}/vit"]()
    if library == "timm":
        for block in model.blocks:
            block.attn.fused_attn = False
    else:
        model.set_attn_implementation("eager")
    backbone = adapt(model)
    with pytest.raises(UnsupportedModelError, match=r"3 blocks called .* 0 times; load it with sdpa"):
        attention_weights(backbone, pictures(backbone))
