import json
import logging

import pytest
import torch
from families import FAMILIES

from phreg.analysis.complexity import complexity, latency
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.registers import add_registers

WIDTH, DEPTH, PATCH = 32, 3, 8


def vit_flops(patches, prefix):
    """Operations of a plain vision transformer: two for every multiply-add of every matrix product."""
    tokens = patches + prefix
    projections = (
        2 * tokens * (4 * WIDTH**2 + 2 * WIDTH * 4 * WIDTH)
    )  # q, k, v, out; MLP of four times the width
    attention = 2 * 2 * tokens**2 * WIDTH  # queries with keys, weights with values
    return 2 * patches * 3 * PATCH**2 * WIDTH + DEPTH * (projections + attention)


def state(backbone):
    return {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}


def test_operations_are_those_of_the_formula(tiny):
    for cost in complexity(adapt(tiny()), (0, 1, 16)):
        assert cost.flops == vit_flops(16, 1 + cost.registers)


def test_operations_at_another_size_are_those_of_its_grid(tiny):
    (square,) = complexity(adapt(tiny()), (4,), 64)
    (wide,) = complexity(adapt(tiny()), (4,), (32, 64))
    assert square.flops == vit_flops(64, 5)
    assert wide.flops == vit_flops(32, 5)


@pytest.mark.parametrize(
    "family",
    [
        "timm/siglip",  # hands a raw parameter to a module
        "timm/naflexvit-reg",
        "transformers/clip",
        "transformers/siglip2-vision",  # cannot run on the meta device
        "open_clip/clip",  # nn.MultiheadAttention, which has a shortcut
        "open_clip/siglip",
    ],
)
def test_every_kind_of_attention_is_counted(family):
    backbone = adapt(FAMILIES[family]())
    bare, some = complexity(backbone, (0, 3))
    rows, cols = (
        side // patch for side, patch in zip(backbone.spec.input_size, backbone.spec.patch_size, strict=True)
    )
    tokens, width = rows * cols + backbone.spec.num_prefix, backbone.spec.width
    hidden = backbone.mlp(0).num_units
    added = 2 * 3 * (4 * width**2 + 2 * width * hidden) + 4 * width * ((tokens + 3) ** 2 - tokens**2)
    assert some.flops - bare.flops == len(backbone.blocks) * added


def test_a_register_adds_its_width_in_parameters():
    backbone = adapt(FAMILIES["transformers/vit"]())
    bare, *more = complexity(backbone, (0, 1, 16))
    total = sum(parameter.numel() for parameter in backbone.model.parameters())
    assert bare.parameters == total
    for cost in more:
        assert cost.parameters == total + cost.registers * WIDTH
        assert cost.parameters_added == pytest.approx(cost.registers * WIDTH / total)


def test_a_text_tower_is_not_counted():
    (whole,) = complexity(adapt(FAMILIES["open_clip/clip"]()), (4,))
    (tower,) = complexity(adapt(FAMILIES["open_clip/tower"]()), (4,))
    assert whole == tower


def test_shares_are_against_no_registers_even_where_those_are_not_asked_for(tiny):
    (cost,) = complexity(adapt(tiny()), (8,))
    assert cost.registers == 8
    assert cost.flops_added == pytest.approx(vit_flops(16, 9) / vit_flops(16, 1) - 1)


def test_registers_there_already_are_not_counted_and_stay(tiny):
    bare, patched = adapt(tiny()), adapt(add_registers(tiny(), 5))
    assert complexity(patched, (0, 2)) == complexity(bare, (0, 2))
    assert patched.num_registers == 5


@pytest.mark.parametrize("family", ["timm/vit", "transformers/dinov2", "open_clip/clip"])
def test_the_model_is_left_as_it_is(family):
    backbone = adapt(FAMILIES[family]())
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    before, output = state(backbone), backbone(images).patches
    complexity(backbone, (0, 2))
    latency(backbone, images, (0, 2), repeats=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(backbone).items())
    assert all(parameter.requires_grad for parameter in backbone.model.parameters())
    assert torch.equal(backbone(images).patches, output)


def test_a_model_that_cannot_run_without_values_is_counted_on_its_device_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "phreg.analysis.complexity"):
        complexity(adapt(FAMILIES["transformers/siglip-vision"]()), (0,))
        assert not caplog.records
        complexity(adapt(FAMILIES["transformers/siglip2-vision"]()), (0,))
    assert "on cpu" in caplog.text


def test_costs_are_plain_json(tiny):
    read = json.loads(json.dumps([cost.to_json() for cost in complexity(adapt(tiny()))]))
    assert [cost["registers"] for cost in read] == [0, 1, 2, 4, 8, 16]
    assert read[0]["flops_added"] == 0
    assert read[2]["parameters"] > read[0]["parameters"]


def test_sizes_and_numbers_that_cannot_be_are_refused(tiny):
    with pytest.raises(PhregError, match="size 33"):
        complexity(adapt(tiny()), size=33)
    with pytest.raises(PhregError, match="-1 registers"):
        complexity(adapt(tiny()), (-1,))


# -- time


def test_numbers_of_registers_take_turns(tiny):
    backbone, seen = adapt(tiny()), []
    backbone.blocks[0].register_forward_hook(lambda module, args, output: seen.append(output.shape[1] - 17))
    latency(backbone, torch.zeros(1, 3, 32, 32), (2, 4), repeats=3)
    warm_up, *repeats = torch.tensor(seen).view(4, 3).tolist()
    assert warm_up == [0, 2, 4]
    assert repeats == [[0, 2, 4], [2, 4, 0], [4, 0, 2]]


def test_times_are_per_image_and_set_against_no_registers(tiny):
    bare, some = latency(adapt(tiny()), torch.zeros(4, 3, 32, 32), (0, 16), repeats=4)
    assert (bare.registers, some.registers) == (0, 16)
    assert bare.ratio_low == bare.ratio == bare.ratio_high == 1
    for found in (bare, some):
        assert 0 < found.low <= found.median <= found.high
        assert 0 < found.ratio_low <= found.ratio <= found.ratio_high
    assert json.loads(json.dumps(some.to_json()))["ratio"] == some.ratio


def test_copies_share_the_models_weights(tiny):
    model = tiny()
    pointers = []
    model.blocks[0].register_forward_hook(
        lambda module, args, output: pointers.append(module.attn.qkv.weight.data_ptr())
    )
    latency(adapt(model), torch.zeros(1, 3, 32, 32), (0, 2), repeats=2)
    assert set(pointers) == {model.blocks[0].attn.qkv.weight.data_ptr()}


def test_one_repeat_is_refused(tiny):
    with pytest.raises(PhregError, match="1 repeats"):
        latency(adapt(tiny()), torch.zeros(1, 3, 32, 32), repeats=1)
