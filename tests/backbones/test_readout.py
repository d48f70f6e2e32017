"""Dense read-outs of CLIP: NACLIP and value-only against slow references, in a CLIP of each library."""

import copy
import math
import pickle
from dataclasses import dataclass

import families_open_clip
import families_transformers
import jaxtyping
import pytest
import timm
import torch
from torch import Tensor, nn

import phreg
from phreg.backbones.base import Backbone
from phreg.backbones.readout import (
    DenseForward,
    GridForward,
    gaussian_bias,
    read_as,
    set_readout,
    use_readout,
)
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.registers import add_registers

HEADS, GRID = 4, (3, 2)  # a grid that is not square, and not the model's own
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order, through one block


@dataclass
class Block:
    """The weights that a dense read-out uses, dug out of one library's last block."""

    norm: nn.Module
    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    out: nn.Module
    mlp: nn.Module
    mlp_norm: nn.Module


def open_clip_block(model: nn.Module) -> Block:
    block = model.visual.transformer.resblocks[-1]
    (query, key, value), (query_bias, key_bias, value_bias) = (
        block.attn.in_proj_weight.chunk(3),
        block.attn.in_proj_bias.chunk(3),
    )
    weights = (query, query_bias), (key, key_bias), (value, value_bias)
    return Block(block.ln_1, *weights, block.attn.out_proj, block.mlp, block.ln_2)


def timm_block(model: nn.Module) -> Block:
    block = model.blocks[-1]
    weights = zip(block.attn.qkv.weight.chunk(3), block.attn.qkv.bias.chunk(3), strict=True)
    return Block(block.norm1, *weights, block.attn.proj, block.mlp, block.norm2)


def transformers_block(model: nn.Module) -> Block:
    block = model.vision_model.encoder.layers[-1]
    attention = block.self_attn
    weights = ((part.weight, part.bias) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    return Block(block.layer_norm1, *weights, attention.out_proj, block.mlp, block.layer_norm2)


def timm_clip() -> nn.Module:
    torch.manual_seed(0)
    settings = families_open_clip.TRUNK | {"num_classes": 16, "pre_norm": True}
    model = families_open_clip.shaken(
        timm.create_model(
            "vit_base_patch16_clip_224.openai",
            global_pool="token",
            pretrained_cfg_overlay={"num_classes": 16},  # the weights' own head
            **settings,
        )
    )
    nn.init.zeros_(model.head.bias)  # as timm converts CLIP projections, which have none
    return model


CLIPS = {
    "open_clip": (families_open_clip.FAMILIES["clip"], open_clip_block),
    "timm": (timm_clip, timm_block),
    "transformers": (families_transformers.FAMILIES["clip"], transformers_block),
}


@pytest.fixture(params=CLIPS)
def library(request) -> str:
    return request.param


def build(library: str, num_registers: int = 0) -> Backbone:
    return add_registers(adapt(CLIPS[library][0]()), num_registers)


def images(grid: tuple[int, int] = GRID, patch: int = 8) -> Tensor:
    return torch.randn(2, 3, grid[0] * patch, grid[1] * patch, generator=torch.Generator().manual_seed(1))


def reference(block: Block, tokens: Tensor, ahead: int, grid: tuple[int, int] | None) -> Tensor:
    """Computes the last block token by token and head by head; without a grid, values alone."""
    normed = block.norm(tokens)
    keys, values = (normed @ weight.T + bias for weight, bias in (block.keys, block.values))
    width = tokens.shape[-1] // HEADS
    mixed = values.clone()
    for image in range(len(tokens)):
        for head in range(HEADS if grid else 0):
            part = slice(head * width, (head + 1) * width)
            for i in range(tokens.shape[1]):
                scores = torch.tensor(
                    [
                        float(keys[image, i, part] @ keys[image, j, part]) / math.sqrt(width)
                        + omega(i - ahead, j - ahead, grid)
                        for j in range(tokens.shape[1])
                    ]
                )
                mixed[image, i, part] = scores.softmax(0) @ values[image, :, part]
    return block.out(mixed)


def correlated(block: Block, tokens: Tensor, *projections: tuple[Tensor, Tensor]) -> Tensor:
    """Computes out(sum of softmax(p·p / sqrt(width)) · values), head by head."""
    normed = block.norm(tokens)
    values = (normed @ block.values[0].T + block.values[1]).chunk(HEADS, dim=-1)
    mixed = [torch.zeros_like(part) for part in values]
    for weight, bias in projections:
        for head, part in enumerate((normed @ weight.T + bias).chunk(HEADS, dim=-1)):
            likeness = part @ part.transpose(1, 2) / math.sqrt(part.shape[-1])
            mixed[head] = mixed[head] + likeness.softmax(-1) @ values[head]
    return block.out(torch.cat(mixed, dim=-1))


def omega(i: int, j: int, grid: tuple[int, int]) -> float:
    if i < 0 or j < 0:
        return 0.0
    (row, col), (other_row, other_col) = divmod(i, grid[1]), divmod(j, grid[1])
    return math.exp(-((row - other_row) ** 2 + (col - other_col) ** 2) / (2 * 5**2))


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 3])
@pytest.mark.parametrize("readout", ["clearclip", "sclip"])
def test_self_self_attention_equals_the_definition(library, readout, num_registers):
    backbone = build(library, num_registers)
    block, before_last = CLIPS[library][1](backbone.model), backbone.block_tokens(images(), [1])[1]
    if readout == "clearclip":
        tokens = correlated(block, before_last, block.queries)
    else:
        after = before_last + correlated(block, before_last, block.queries, block.keys)
        tokens = after + block.mlp(block.mlp_norm(after))
    expected = backbone.final_norm(tokens[:, 1 + num_registers :]) @ backbone.projection
    plain = backbone(images())

    set_readout(backbone, readout)

    torch.testing.assert_close(backbone(images()).patches, expected.unflatten(1, GRID), **CLOSE)
    torch.testing.assert_close(copy.deepcopy(backbone)(images()).patches, backbone(images()).patches)
    set_readout(backbone, "plain")
    torch.testing.assert_close(backbone(images()), plain, rtol=0, atol=0)  # undone exactly


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 3])
@pytest.mark.parametrize("readout", ["naclip", "value-only"])
def test_dense_features_equal_the_definition(library, readout, num_registers):
    backbone = build(library, num_registers)
    before_last = backbone.block_tokens(images(), [1])[1]
    grid = GRID if readout == "naclip" else None
    tokens = reference(CLIPS[library][1](backbone.model), before_last, 1 + num_registers, grid)
    expected = backbone.final_norm(tokens[:, 1 + num_registers :]) @ backbone.projection

    set_readout(backbone, readout)

    torch.testing.assert_close(backbone(images()).patches, expected.unflatten(1, GRID), **CLOSE)


@torch.no_grad()
def test_the_model_itself_gives_the_read_out():
    backbone = build("open_clip", 2)
    square = images((4, 4))
    set_readout(backbone, "naclip")

    native = backbone.model.visual.forward_intermediates(square, indices=1, normalize_intermediates=True)

    expected = native["image_intermediates"][0].permute(0, 2, 3, 1) @ backbone.model.visual.proj
    torch.testing.assert_close(backbone(square).patches, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("readout", ["naclip", "value-only"])
def test_plain_undoes_a_read_out_exactly(library, readout):
    backbone = build(library, 2)
    expected = backbone(images())
    set_readout(backbone, readout)
    changed = backbone(images())

    set_readout(backbone, "plain")

    found = backbone(images())
    assert backbone.readout == "plain"
    assert changed.patches.shape[-1] == 16
    assert torch.equal(found.patches, expected.patches)
    assert torch.equal(found.pooled, expected.pooled)
    assert not any("forward" in vars(module) for module in backbone.model.modules())


@torch.no_grad()
def test_a_read_out_replaces_the_one_before_even_through_another_backbone(library):
    backbone, expected = build(library), build(library)
    set_readout(expected, "value-only")
    set_readout(backbone, "naclip")

    again = adapt(backbone.model)
    set_readout(again, "value-only")

    assert torch.equal(again(images()).patches, expected(images()).patches)
    assert not any(
        isinstance(vars(module).get("forward"), GridForward) for module in backbone.model.modules()
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_a_read_out_of_its_own(library, duplicate):
    backbone = build(library, 2)
    set_readout(backbone, "naclip")
    expected = backbone(images()).pooled
    twin = adapt(duplicate(backbone.model))
    assert torch.equal(twin.run(images()), expected)

    for parameter in twin.model.parameters():
        parameter.add_(torch.randn_like(parameter))
    twin.run(images((4, 4)))

    assert not torch.equal(twin.run(images()), expected)
    assert torch.equal(backbone.run(images()), expected)
    shapes = {
        vars(module)["forward"].grid.shape
        for model in (backbone.model, twin.model)
        for module in model.modules()
        if isinstance(vars(module).get("forward"), DenseForward)
    }
    assert shapes == {GRID}


def test_gradients_flow_after_a_run_in_inference_mode(library):
    backbone = build(library, 2)
    set_readout(backbone, "naclip")
    with torch.inference_mode():
        backbone(images())

    backbone(images()).patches.sum().backward()

    assert backbone.registers.grad.abs().sum() > 0


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(library):
    backbone = build(library)
    set_readout(backbone, "naclip")
    expected = backbone(images()).patches
    with torch.autocast("cpu", torch.bfloat16):
        found = backbone(images()).patches.float()
    assert (found - expected).norm() < 0.05 * expected.norm()  # 8 bits of mantissa through three blocks


@pytest.fixture
def unchecked(monkeypatch):
    """Turns the checking of shapes off: compilers cannot trace it, and outside of tests there is none."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@torch.no_grad()
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("readout", ["naclip", "value-only"])
def test_a_read_out_compiles_without_a_graph_break(readout):
    backbone = build("open_clip", 2)
    set_readout(backbone, readout)
    expected = backbone.run(images((4, 4)))
    compiled = torch.compile(backbone.model.visual, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images((4, 4))), expected, **CLOSE)


@pytest.mark.parametrize("readout", ["naclip", "value-only"])
def test_models_without_a_joint_token_space_are_refused_and_left_alone(readout):
    backbone = adapt(families_open_clip.FAMILIES["siglip"]())
    with pytest.raises(PhregError, match=r"asked of CustomTextCLIP .* no projection .* plain"):
        set_readout(backbone, readout)
    assert backbone.readout == "plain"
    assert not any("forward" in vars(module) for module in backbone.model.modules())


@torch.no_grad()
def test_a_model_is_read_otherwise_for_a_while_only(library):
    backbone = build(library, 2)
    expected = backbone(images()).patches
    with use_readout(backbone, "naclip"):
        assert backbone(images()).patches.shape[-1] == 16
    with pytest.raises(PhregError), use_readout(backbone, "naclip"):
        backbone(torch.zeros(1, 3, 30, 30))
    assert backbone.readout == "plain"
    assert torch.equal(backbone(images()).patches, expected)


def test_unless_told_how_a_model_is_read_as_it_is_set_or_else_as_phreg_trained_it(library):
    backbone = build(library)
    with use_readout(backbone):
        assert backbone.readout == "plain"
    backbone.trained_readout = "value-only"
    with use_readout(backbone):
        assert backbone.readout == "value-only"
    set_readout(backbone, "sclip")
    with use_readout(backbone):
        assert backbone.readout == "sclip"


def test_the_model_itself_says_how_it_is_read_and_was_trained(library):
    backbone = build(library)
    backbone.trained_readout = "value-only"
    set_readout(backbone, "sclip")
    again = adapt(copy.deepcopy(backbone.model))
    assert (again.readout, again.trained_readout) == ("sclip", "value-only")
    set_readout(again, "plain")
    again.trained_readout = "plain"
    assert vars(again.model).keys() == vars(build(library).model).keys()


def test_a_trained_model_saved_by_its_own_library_comes_back_as_trained(tmp_path):
    backbone = build("transformers", 2)
    backbone.trained_readout = "value-only"
    backbone.model.save_pretrained(tmp_path / "saved")
    assert adapt(phreg.load(tmp_path / "saved")).trained_readout == "value-only"


def test_omega_is_one_on_the_diagonal_of_patches_and_zero_ahead_of_them():
    bias = gaussian_bias((3, 4), 14, torch.device("cpu"), torch.float32)
    assert torch.equal(bias, bias.T)
    assert torch.equal(bias.diagonal(), torch.tensor([0.0, 0.0] + [1.0] * 12))
    assert not bias[:2].any()
    # Patch 0 lies at (0, 0) and patch 6 at (1, 2): squared distance 5.
    torch.testing.assert_close(bias[2, 8], torch.tensor(math.exp(-0.1)))


def test_the_old_name_still_reads_and_says_the_new_one(tiny):
    backbone = adapt(tiny())
    with pytest.deprecated_call(match="use_readout"), read_as(backbone):
        assert backbone.readout == "plain"
