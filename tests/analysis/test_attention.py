"""What is captured of attention has to be what libraries that spell attention out say it is."""

import copy

import pytest
import torch
from families import FAMILIES
from torch.nn import functional

from phreg.analysis.attention import attention_maps, attention_weights, query_names
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


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("family", ["vit", "clip-vision", "dinov3", "dinov2"])
def test_weights_are_those_of_the_eager_implementation_of_transformers(family, registers):
    model = add_registers(FAMILIES[f"transformers/{family}"](), registers)
    backbone = adapt(copy.deepcopy(model))
    model.set_attn_implementation("eager")
    images = pictures(backbone)
    with torch.no_grad():
        expected = model(pixel_values=images, output_attentions=True).attentions
    assert_same(attention_weights(backbone, images), expected)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("family", ["vit", "vit-qk-norm", "eva02", "dinov3", "vit-rope", "vit-rope-mixed"])
def test_weights_are_those_that_timm_computes_without_fused_attention(family, registers, monkeypatch):
    model = add_registers(FAMILIES[f"timm/{family}"](), registers)
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


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("family", ["transformers/dinov3", "timm/eva02", "timm/dinov2-reg4"])
def test_maps_are_what_cls_and_each_register_pay_to_the_patches_in_the_last_block(family, registers):
    backbone = add_registers(adapt(FAMILIES[family]()), registers)
    (height, width), generator = backbone.spec.input_size, torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, height + backbone.spec.patch_size[0], width, generator=generator)
    layout = backbone.layout(images)
    found = attention_maps(backbone, images)
    special = layout.num_prefix + registers
    names = query_names(backbone)
    assert names == ("CLS", *(f"register {number}" for number in range(1, special)))
    assert found.shape == (2, special, backbone.spec.num_heads, *layout.grid)
    weights = attention_weights(backbone, images)[-1]
    for row, col in ((0, 0), (1, 2), (layout.grid[0] - 1, 0)):
        patch = special + row * layout.grid[1] + col
        # Shares of 1, rounded otherwise where fewer rows are multiplied.
        expected = weights[:, :, :special, patch].transpose(1, 2)
        torch.testing.assert_close(found[..., row, col], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 2])
def test_where_there_is_no_cls_the_patches_look_all_together(registers):
    backbone = add_registers(adapt(FAMILIES["timm/siglip"]()), registers)
    images = pictures(backbone)
    weights = attention_weights(backbone, images)[-1][..., registers:]
    first, *others = attention_maps(backbone, images).flatten(-2).unbind(1)
    assert query_names(backbone) == ("patches", "register 1", "register 2")[: 1 + registers]
    torch.testing.assert_close(first, weights[:, :, registers:].mean(2))  # the same sum
    assert len(others) == registers
    assert all(torch.equal(ours, weights[:, :, index]) for index, ours in enumerate(others))


def test_registers_that_came_without_cls_are_not_called_cls(tiny):
    backbone = adapt(tiny(class_token=False, reg_tokens=2, global_pool="avg"))
    assert backbone.spec.num_prefix == 2
    assert query_names(backbone) == ("patches", "register 1", "register 2")


def test_a_distillation_token_is_called_what_it_is():
    backbone = add_registers(adapt(FAMILIES["transformers/deit"]()), 1)
    assert query_names(backbone) == ("CLS", "distillation", "register 1")


def test_maps_of_attention_that_cannot_be_listened_to_are_refused():
    model = FAMILIES["transformers/vit"]()
    model.set_attn_implementation("eager")
    backbone = adapt(model)
    with pytest.raises(UnsupportedModelError, match="load it with sdpa"):
        attention_maps(backbone, pictures(backbone))
