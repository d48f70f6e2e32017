"""timm models: patched in timm's own terms, undone to the bit, run at any size, loaded and named."""

import copy
import inspect
import json
import math
import pickle
import re
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from families_timm import ARCHITECTURES, FAMILIES
from families_timm import build as build_tiny
from timm.layers.mlp import GatedMlp, GluMlp, SwiGLU, SwiGLUPacked
from timm.layers.mlp import Mlp as TimmMlp
from timm.models import model_entrypoint, save_for_hf
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

from phreg.backbones.timm import REFUSED, adapt, hub_id, is_name, load
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats.load import open_model
from phreg.registers import add_registers, remove_registers
from phreg.testing import check_backbone

ROPE = {"eva02", "eva02-inner-norm", "dinov3", "vit-rope", "vit-rope-mixed"}
FIXED_SIZE = [name for name in FAMILIES if not name.startswith("naflexvit")]

every_family = pytest.mark.parametrize("family", FAMILIES)


def images_for(backbone, rows=None, cols=None):
    """Draws images of so many patches; of the model's own size where nothing is said."""
    (high, wide), (height, width) = backbone.spec.patch_size, backbone.spec.input_size
    size = (rows * high if rows else height, cols * wide if cols else width)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def relative(found, expected):
    """Largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def native_dense(model, images):
    """The last block's patches after the final norm, as timm gives them: (batch, rows, cols, width)."""
    found = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
    return found[0].permute(0, 2, 3, 1)


@pytest.fixture(autouse=True)
def _no_gradients():
    # Leaf copies and comparisons read more easily so; what needs gradients turns them on.
    with torch.no_grad():
        yield


# -- what every family does ----------------------------------------------------------------------------------


@every_family
def test_it_passes_the_conformance_suite(family):
    with torch.enable_grad():
        check_backbone(FAMILIES[family](), dense=native_dense)


# torch points to torch.compile; what it deprecates is what people have in place.
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("family", FIXED_SIZE)  # timm's NaFlexVit is none that TorchScript compiles
def test_torchscript_of_a_patched_model_is_the_model_and_follows_its_registers(family):
    backbone = add_registers(adapt(FAMILIES[family]()), 3)
    model, images = backbone.model, images_for(backbone)
    program, before = torch.jit.script(model), model(images)
    torch.testing.assert_close(program(images), before, rtol=1e-4, atol=1e-5)  # sums in another order
    backbone.registers.neg_()
    torch.testing.assert_close(program(images), model(images), rtol=1e-4, atol=1e-5)
    assert relative(program(images), before) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["vit", "clip", "siglip", "eva02", "dinov3", "vit-rope-mixed", "naflexvit"]
)
def test_a_patched_model_compiles_in_one_graph_and_exports(family):
    torch._dynamo.reset()  # all families share timm's forward, whose recompilations are counted
    model = add_registers(FAMILIES[family](), 3)
    images = images_for(adapt(model))
    expected = model(images)
    # aot_eager traces everything and generates no code, so results are the same sums.
    assert relative(torch.compile(model, fullgraph=True, backend="aot_eager")(images), expected) < 1e-5
    assert relative(torch.export.export(model, (images,)).module()(images), expected) < 1e-5


@every_family
def test_adapting_a_model_and_adding_nothing_leave_it_as_it_is(family):
    model = FAMILIES[family]()
    state, attributes = copy.deepcopy(model.state_dict()), set(vars(model))
    parameters = list(model.parameters())
    backbone = adapt(model)
    expected = model(images_for(backbone))
    backbone.insert_registers(torch.empty(0, backbone.spec.width))
    backbone.run(images_for(backbone, rows=2, cols=3))
    assert torch.equal(model(images_for(backbone)), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(after is before for after, before in zip(model.parameters(), parameters, strict=True))
    assert set(vars(model)) == attributes


@every_family
def test_a_patched_model_is_one_that_timm_builds_itself(family):
    model = FAMILIES[family]()
    backbone = adapt(add_registers(model, 3))
    stock = timm.create_model(ARCHITECTURES[family][0], **model._model_args).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    images = images_for(backbone)
    assert torch.equal(stock(images), model(images))
    assert adapt(stock).spec.num_prefix == backbone.spec.num_prefix + 3
    assert stock.num_prefix_tokens == model.num_prefix_tokens


@every_family
def test_registers_hidden_by_timms_own_mask_leave_the_output_as_it_was(family):
    model = FAMILIES[family]()
    backbone = adapt(model)
    images = images_for(backbone)
    expected = model.forward_head(model.forward_features(images))
    add_registers(model, 3)
    layout = backbone.layout(images)
    mask = torch.zeros(layout.num_tokens, layout.num_tokens)
    mask[:, layout.num_prefix : layout.num_prefix + 3] = -math.inf
    tokens = model.forward_features(images, attn_mask=mask)
    if family == "vit-headless":  # unpooled, so the output is all tokens
        tokens = torch.cat([layout.prefix(tokens), layout.patches(tokens)], dim=1)
    # The softmax sums zeros in another order: rounding of fp32, a few 1e-7 a block.
    assert relative(model.forward_head(tokens), expected) < 1e-5
    assert relative(model.forward_head(model.forward_features(images))[:, :1], expected[:, :1]) > 1e-4


@every_family
def test_removal_restores_tensors_outputs_counts_and_arguments_to_the_bit(family):
    model, untouched = FAMILIES[family](), FAMILIES[family]()
    images = images_for(adapt(model))
    add_registers(model, 3)
    remove_registers(copy.deepcopy(model))  # a copy's removal is its own affair
    remove_registers(model)
    state, expected = model.state_dict(), untouched.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert torch.equal(model(images), untouched(images))
    assert model._model_args == untouched._model_args
    counts = [vars(module).get("num_prefix_tokens") for module in model.modules()]
    assert counts == [vars(module).get("num_prefix_tokens") for module in untouched.modules()]
    assert vars(model).keys() == vars(untouched).keys()


@pytest.mark.parametrize(
    "family", ["vit", "clip", "dinov2", "vit-native-rows", "eva02", "dinov3", "naflexvit-reg"]
)
def test_removal_keeps_what_cls_and_native_registers_learned(family):
    model, expected = FAMILIES[family](), FAMILIES[family]()
    owner, reference = getattr(model, "embeds", model), getattr(expected, "embeds", expected)
    images = images_for(adapt(model))
    add_registers(model, 3)
    owner.cls_token += 0.5
    reference.cls_token += 0.5
    if reference.reg_token is not None:
        num_native = reference.reg_token.shape[1]
        owner.reg_token[:, :num_native] -= 0.5
        reference.reg_token -= 0.5
    remove_registers(model)
    # Taking the position out of a trained sum rounds once, about 1e-7; the blocks pass it on.
    assert relative(model(images), expected(images)) < 1e-5


@every_family
@pytest.mark.parametrize("count", [0, 3])
def test_every_parameter_has_one_role(family, count):
    model = add_registers(FAMILIES[family](), count)
    names = [name for role in adapt(model).roles().values() for name in role]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_roles_follow_what_parameters_do():
    clip, dinov3 = adapt(FAMILIES["clip"]()), adapt(FAMILIES["dinov3"]())
    mixed, naflex = adapt(FAMILIES["vit-rope-mixed"]()), adapt(FAMILIES["naflexvit-reg"]())
    assert clip.roles()["norm"] == ["norm_pre.weight", "norm_pre.bias", "norm.weight", "norm.bias"]
    assert clip.roles()["head"] == ["head.weight", "head.bias"]
    assert dinov3.roles()["cls"] == ["cls_token", "reg_token"]
    assert dinov3.roles()["pos_embed"] == []
    assert "rope.freqs" in mixed.roles()["pos_embed"]
    assert naflex.roles()["patch_embed"] == ["embeds.proj.weight", "embeds.proj.bias"]
    naflex.insert_registers(torch.zeros(1, 32))
    assert naflex.roles()["registers"] == ["embeds.reg_token"]
    assert naflex.roles()["cls"] == ["embeds.cls_token"]


# -- native registers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "num_native"),
    [("dinov2-reg4", 4), ("dinov3", 4), ("vit-native-rows", 2), ("naflexvit-reg", 2)],
)
def test_added_registers_follow_native_ones_in_one_parameter(family, num_native):
    backbone = adapt(FAMILIES[family]())
    assert (backbone.spec.num_prefix, backbone.num_registers, backbone.registers) == (1 + num_native, 0, None)
    tokens = torch.randn(3, backbone.spec.width)
    backbone.insert_registers(tokens)
    again = adapt(backbone.model)
    assert (again.spec.num_prefix, again.num_registers) == (1 + num_native, 3)
    assert again.registers.shape == (1, num_native + 3, 32)
    assert torch.equal(again.registers[0, num_native:], tokens)


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FIXED_SIZE)
@pytest.mark.parametrize(
    ("rows", "cols"), [(2, 8), (3, 5), (4, 4)]
)  # 2x8 has as many patches as the native 4x4
@pytest.mark.parametrize("count", [0, 3])
def test_other_sizes_give_what_a_model_made_for_any_size_gives(family, rows, cols, count):
    model = add_registers(FAMILIES[family](), count)
    arguments = model._model_args | {"dynamic_img_size": True}
    weights = {"num_classes": model.num_classes}
    dynamic = timm.create_model(ARCHITECTURES[family][0], pretrained_cfg_overlay=weights, **arguments).eval()
    dynamic.load_state_dict(model.state_dict(), strict=True)
    backbone, other = adapt(model), adapt(dynamic)
    images = images_for(backbone, rows, cols)
    found, expected = backbone(images), other(images)
    # A rope computed anew may differ from the one kept since creation in its last bit.
    assert relative(found.patches, expected.patches) < 1e-5
    assert relative(found.pooled, expected.pooled) < 1e-5


def test_a_model_is_as_strict_about_sizes_after_a_run_as_before():
    backbone = adapt(FAMILIES["eva02"]())
    images = images_for(backbone, 3, 5)
    backbone.run(images)
    with (
        mock.patch.object(backbone.model.norm, "forward", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        backbone.run(images)
    with pytest.raises(AssertionError, match="doesn't match model"):
        backbone.model(images)
    assert backbone.model.rope._use_cached_embed


@pytest.mark.parametrize("family", ["vit", "eva02", "vit-rope-mixed"])
def test_a_new_native_size_is_recorded_for_timm_and_survives_removal(family):
    model = add_registers(FAMILIES[family](), 3)
    backbone = adapt(model)
    high, wide = backbone.spec.patch_size
    images = images_for(backbone, 6, 5)
    expected = backbone.run(images)
    backbone.set_input_size((6 * high, 5 * wide))
    assert backbone.spec.input_size == adapt(model).spec.input_size == (6 * high, 5 * wide)
    # Resampled once instead of at every run: the same numbers.
    assert relative(backbone.run(images), expected) < 1e-5
    stock = timm.create_model(ARCHITECTURES[family][0], **model._model_args).eval()
    stock.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(stock(images), model(images))
    remove_registers(model)
    assert model(images).shape == (2, 5)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(PhregError, match="use a multiple, such as 32 or 40"):
        adapt(FAMILIES["vit"]()).set_input_size(33)
    with pytest.raises(PhregError, match="native_size off"):
        adapt(FAMILIES["naflexvit"]()).set_input_size(64)


# -- pooling and projection ----------------------------------------------------------------------------------


@every_family
def test_the_pooled_output_is_what_timms_head_is_given(family):
    model = FAMILIES[family]()
    backbone = adapt(model)
    images = images_for(backbone)
    tokens = model.forward_features(images)
    match family:
        case "clip":
            expected = model(images)
        case "vit-headless":
            expected = tokens[:, 0]
        case _:
            expected = model.forward_head(tokens, pre_logits=True)
    assert torch.equal(backbone.run(images), expected)


def test_a_model_that_timm_says_nothing_of_is_assumed_to_be_normalised_for_imagenet(tiny, saved, caplog):
    said = "which are ImageNet's"
    for model in (saved, timm.create_model("vit_tiny_patch16_224", img_size=32)):
        open_model(model)
    assert said not in caplog.text
    backbone, _ = open_model(tiny())
    assert backbone.spec.mean == (0.485, 0.456, 0.406)
    assert said in caplog.text


def test_a_folder_that_leaves_out_its_normalisation_is_said_to(saved, caplog):
    config = json.loads((saved / "config.json").read_text())
    del config["pretrained_cfg"]["mean"]
    (saved / "config.json").write_text(json.dumps(config))
    open_model(saved)
    assert "assumed are mean (0.485, 0.456, 0.406) and std (0.5, 0.5, 0.5), which are timm's" in caplog.text


CLIP = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}


@pytest.mark.parametrize(
    ("name", "classes", "projects"),
    [
        ("vit_base_patch16_clip_224.openai", None, True),
        ("vit_base_patch16_clip_224.openai", 10, False),
        ("vit_base_patch16_clip_224.openai_ft_in1k", None, False),
        (
            "vit_base_patch16_clip_224",
            None,
            False,
        ),  # timm's default weights for it are fine-tuned to ImageNet
        ("vit_base_patch16_clip_quickgelu_224.metaclip_400m", None, True),
        ("vit_base_patch16_clip_quickgelu_224.metaclip_400m", 1000, False),
    ],
)
def test_a_head_is_a_projection_where_the_pretrained_weights_have_it_so(name, classes, projects):
    # Of a fresh classifier the biases are zero, as those of a projection.
    model = timm.create_model(name, **CLIP, **({} if classes is None else {"num_classes": classes})).eval()
    backbone = adapt(model)
    images = images_for(backbone)

    assert (backbone.projection is not None) == projects
    tokens = model.forward_features(images)[:, 0]
    expected = tokens @ model.head.weight.T if projects else tokens
    torch.testing.assert_close(backbone.run(images), expected)
    if not projects:
        torch.testing.assert_close(backbone.logits(images), model(images))


def test_a_projection_that_is_replaced_by_a_classifier_is_none_any_more():
    model = timm.create_model("vit_base_patch16_clip_224.openai", **CLIP)
    assert adapt(model).projection is not None
    model.reset_classifier(10)
    assert adapt(model).projection is None


def test_only_a_clip_tower_has_a_projection():
    for family, build in FAMILIES.items():
        backbone = adapt(build())
        assert (backbone.projection is not None) == (family == "clip"), family
    clip = adapt(FAMILIES["clip"]())
    images = images_for(clip)
    cls = clip.model.norm(clip.block_tokens(images, [2])[2])[:, 0]
    assert relative(cls @ clip.projection, clip.run(images)) < 1e-6  # one matrix product, rounded otherwise


def test_a_model_without_cls_told_not_to_pool_gives_the_mean_of_its_patches():
    model = FAMILIES["siglip"]()
    model.reset_classifier(0, "")
    backbone = adapt(add_registers(model, 3))
    images = images_for(backbone)
    expected = backbone.layout(images).patches(model.forward_features(images)).mean(1)
    assert torch.equal(backbone.run(images), expected)


@pytest.mark.parametrize("architecture", ["test_vit3", "vit_pe_core_tiny_patch16_384"])
def test_a_model_that_pools_its_prefix_refuses_registers_and_stays_as_it_is(architecture):
    with torch.device("meta"):
        model = timm.create_model(architecture, depth=2)
    names = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match="it pools all its tokens"):
        add_registers(model, 4)
    assert list(model.state_dict()) == names


# -- attention -----------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("wrapped", [False, True])
def test_taken_apart_attention_is_the_models_own(family, wrapped):
    model = add_registers(FAMILIES[family](), 3)
    backbone = adapt(model)
    attention, images, seen = model.blocks[1].attn, images_for(backbone), []
    if wrapped and attention.qkv is not None and getattr(attention, "q_bias", None) is None:
        attention.qkv = nn.Sequential(attention.qkv)  # as PEFT does, with a module of its own
    attention.register_forward_hook(lambda _, args, output: seen.append(output))
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with mock.patch.object(
        nn.functional, "scaled_dot_product_attention", wraps=nn.functional.scaled_dot_product_attention
    ) as called:
        backbone.run(images)
    tokens, output = seen
    queries, keys, values = called.call_args_list[1].args[:3]
    parts = backbone.attention(1)
    normed = parts.norm(tokens)
    # Rope turns patches, never the prefix; the rest is the same product in another order.
    turned = slice(0, model.num_prefix_tokens) if family in ROPE else slice(None)
    torch.testing.assert_close(
        parts.queries(normed)[:, :, turned], queries[:, :, turned], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(parts.keys(normed)[:, :, turned], keys[:, :, turned], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.values(normed), values, rtol=1e-5, atol=1e-5)
    heads = nn.functional.scaled_dot_product_attention(queries, keys, values, scale=parts.scale)
    torch.testing.assert_close(parts.out(heads.transpose(1, 2).flatten(2)), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_biases_that_eva_keeps_apart_and_shared_heads_are_honoured(fused):
    sharing = {} if fused else {"num_kv_heads": 2, "attn_type": "rope"}
    model = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=1, num_heads=4, qkv_fused=fused, **sharing
    )
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    backbone = adapt(model.eval())
    tokens = torch.randn(2, 5, 32)
    with mock.patch.object(
        nn.functional, "scaled_dot_product_attention", wraps=nn.functional.scaled_dot_product_attention
    ) as called:
        model.blocks[0].attn(tokens)
    parts = backbone.attention(0)
    found = (parts.queries(tokens), parts.keys(tokens), parts.values(tokens))
    for ours, theirs in zip(found, called.call_args.args[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_values_cost_no_queries_and_keys():
    model = FAMILIES["vit"]()
    parts = adapt(model).attention(0)
    model.blocks[0].attn.qkv.weight[:64] = math.nan
    assert parts.values(torch.randn(2, 5, 32)).isfinite().all()
    assert parts.keys(torch.randn(2, 5, 32)).isnan().any()


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [("vit_dwee_patch16_reg1_gap_256", {}), ("naflexvit_base_patch16_siglip", {"attn_gated": True})],
)
def test_attention_with_more_to_it_is_not_taken_apart(architecture, extra):
    with torch.device("meta"):
        model = timm.create_model(architecture, depth=1, **extra)
    with pytest.raises(UnsupportedModelError, match="not made of these alone"):
        adapt(model).attention(0)


# -- mlp -----------------------------------------------------------------------------------------------------


@every_family
def test_every_block_has_an_mlp_of_its_own(family):
    backbone = adapt(add_registers(FAMILIES[family](), 3))
    downs = [backbone.mlp(index).down for index in range(len(backbone.blocks))]
    assert downs == [block.mlp.fc2 for block in backbone.blocks]


MLPS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "plain, no biases": ("vit_tiny_patch16_224", {"proj_bias": False}),
    "plain, inner norm": ("vit_tiny_patch16_224", {"scale_mlp_norm": True}),
    "gated, one layer, gate last": ("vit_tiny_patch16_224", {"mlp_layer": GluMlp}),
    "gated, one layer, gate first": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLUPacked}),
    "gated, two layers": ("vit_tiny_patch16_224", {"mlp_layer": SwiGLU}),
    "eva plain": ("eva_giant_patch14_224", {}),
    "eva plain, inner norm": ("eva_giant_patch14_224", {"scale_mlp": True}),
    "eva gated, one layer": ("eva02_tiny_patch14_224", {}),
    "eva gated, two layers": ("eva02_tiny_patch14_224", {"swiglu_align_to": 8}),
    "eva gated, inner norm": ("eva02_tiny_patch14_224", {"scale_mlp": True}),
    "naflex": ("naflexvit_base_patch16_siglip", {}),
    "naflex gated, inner norm": (
        "naflexvit_base_patch16_siglip",
        {"swiglu_mlp": True, "scale_mlp_norm": True},
    ),
}


def model_with_mlp(kind):
    architecture, extra = MLPS[kind]
    size = {} if kind.startswith("naflex") else {"img_size": 28, "patch_size": 14}
    return build_tiny(
        architecture, {"embed_dim": 32, "depth": 1, "num_heads": 4, "mlp_ratio": 2} | size | extra
    )


@pytest.mark.parametrize("kind", MLPS)
def test_only_its_rows_move_a_hidden_unit(kind):
    backbone, hidden, units = adapt(model_with_mlp(kind)), [], torch.tensor([5, 2])
    mlp, module = backbone.mlp(0), backbone.blocks[0].mlp
    (mlp.norm or mlp.down).register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    with torch.enable_grad():
        module(torch.randn(2, 7, 32))
        hidden[0][..., units].sum().backward()
    fed = {parameter: set(rows.tolist()) for parameter, rows in mlp.rows(units)}
    for parameter in module.parameters():
        moves = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        reached = moves.flatten(1).any(1) if moves.ndim > 1 else moves != 0
        assert set(reached.nonzero().flatten().tolist()) == fed.get(parameter, set())


def test_gated_units_have_their_rows_in_both_halves():
    units = torch.tensor([5, 2])
    packed, split = (
        adapt(model_with_mlp(f"gated, {layers}")).mlp(0) for layers in ("one layer, gate first", "two layers")
    )
    # timm counts both halves as hidden features where one layer holds them.
    assert (packed.num_units, split.num_units) == (32, 64)
    assert [rows.tolist() for _, rows in packed.rows(units)] == 2 * [[5, 2, 37, 34]]
    assert [rows.tolist() for _, rows in split.rows(units)] == 4 * [[5, 2]]


@pytest.mark.parametrize("kind", ["plain, inner norm", "eva gated, inner norm", "naflex gated, inner norm"])
def test_behind_an_inner_norm_a_unit_with_zero_rows_still_follows_its_token(kind):
    backbone, ahead, behind = adapt(model_with_mlp(kind)), [], []
    mlp = backbone.mlp(0)
    mlp.norm.register_forward_pre_hook(lambda _, args: ahead.append(args[0]))
    mlp.down.register_forward_pre_hook(lambda _, args: behind.append(args[0]))
    for parameter, rows in mlp.rows(torch.tensor([5])):
        parameter[rows] = 0
    backbone.blocks[0].mlp(torch.randn(2, 7, 32))
    assert (ahead[0][..., 5] == 0).all()
    assert behind[0][..., 5].std() > 1e-3


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("vit_small_patch16_18x2_224", {}),  # two MLPs side by side
        ("vit_dpwee_patch16_reg1_gap_256", {}),  # fused with attention, coming and going
        ("vit_tiny_patch16_224", {"block_fn": ParallelScalingBlock}),  # fused with attention, coming
        ("vit_tiny_patch16_224", {"mlp_layer": GatedMlp}),
        ("vit_tiny_patch16_224", {"mlp_layer": partial(TimmMlp, use_conv=True)}),
    ],
)
def test_other_mlps_are_not_taken_apart(architecture, extra):
    with torch.device("meta"):
        model = timm.create_model(architecture, depth=1, **extra)
    assert adapt(model).mlp(0) is None


def test_a_wrapped_layer_is_not_taken_apart():
    model = FAMILIES["vit"]()
    model.blocks[0].mlp.fc1 = nn.Sequential(model.blocks[0].mlp.fc1)
    backbone = adapt(model)
    assert backbone.mlp(0) is None
    with pytest.raises(PhregError, match=r"hidden units asked of block 0 of VisionTransformer .*wrapped"):
        backbone.require_mlp(0)
    assert backbone.require_mlp(1).down is model.blocks[1].mlp.fc2


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", "VisionTransformerDistilled: its distillation token"),
        ("beit_base_patch16_224", "Beit: its blocks have relative position biases"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos: its blocks have relative position biases"),
        ("vit_tiny_r_s16_p8_224", "convolutional network \\(HybridEmbed\\)"),
        ("swin_tiny_patch4_window7_224", "SwinTransformer: it is not a plain stack"),
        ("hiera_tiny_224", "Hiera: its tokens are merged on the way"),
        ("resnet10t", "ResNet: it is not a plain stack"),
    ],
)
def test_other_architectures_are_refused_with_a_reason(architecture, reason):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        adapt(model)
    assert "Supported are VisionTransformer, Eva and NaFlexVit" in str(caught.value)


class Asked(Exception):
    """Raised in place of building a model."""


def architectures_by_class():
    """Finds the class of each of timm's architectures, without building one."""

    def ask(model_class, *args, **kwargs):
        raise Asked(model_class)

    found = {}
    with ExitStack() as patches:
        for module in [module for name, module in sys.modules.items() if name.startswith("timm.models.")]:
            if hasattr(module, "build_model_with_cfg"):
                patches.enter_context(mock.patch.object(module, "build_model_with_cfg", ask))
        for architecture in timm.list_models():
            with pytest.raises(Asked) as caught:
                model_entrypoint(architecture)()
            found.setdefault(caught.value.args[0], []).append(architecture)
    return found


def test_every_class_of_timm_with_blocks_over_patches_is_supported_or_refused_with_a_reason_of_its_own():
    supported, refused = set(), set()
    for model_class, (architecture, *_) in architectures_by_class().items():
        name = model_class.__name__
        if name not in REFUSED and "self.blocks" not in inspect.getsource(model_class):
            continue
        with torch.device("meta"):
            model = timm.create_model(architecture)
        children = dict(model.named_children())
        if name in REFUSED:
            with pytest.raises(UnsupportedModelError, match=re.escape(REFUSED[name])):
                adapt(model)
            refused.add(name)
        elif "blocks" in children and any("embed" in child for child in children):
            adapt(model)
            supported.add(name)
    assert supported == {"VisionTransformer", "Eva", "NaFlexVit"}
    assert refused == REFUSED.keys() - {"FeatureGetterNet"}  # which wraps any of them


def test_images_of_one_channel_are_refused():
    with pytest.raises(UnsupportedModelError, match="images of 1 channels, not of 3"):
        adapt(timm.create_model("test_vit", in_chans=1))


def test_a_second_insertion_is_refused():
    backbone = adapt(add_registers(FAMILIES["vit"](), 3))
    with pytest.raises(PhregError, match="3 from phreg already"):
        backbone.insert_registers(torch.zeros(1, 32))


def test_features_only_works_patched_and_points_to_the_model_inside():
    wrapper = timm.create_model("test_vit", features_only=True, out_indices=[0, 1]).eval()
    with pytest.raises(UnsupportedModelError, match="pass the model inside, its attribute `model`"):
        adapt(wrapper)
    images = torch.randn(2, 3, 160, 160)
    before = wrapper(images)
    add_registers(wrapper.model, 3)
    after = wrapper(images)
    assert [maps.shape for maps in after] == [maps.shape for maps in before] == [(2, 64, 10, 10)] * 2
    assert not torch.equal(after[1], before[1])


# -- folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A tiny model in timm's folder form, as timm writes it."""
    model = timm.create_model("test_vit", img_size=32, num_classes=3).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    return tmp_path


def edit_config(folder, **changes):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def test_a_folder_gives_the_model_that_was_saved_in_eval_mode_and_fp32(folder):
    edited = json.loads((folder / "config.json").read_text())["pretrained_cfg"] | {"mean": [0.1, 0.2, 0.3]}
    edit_config(folder, pretrained_cfg=edited)
    backbone = load(folder)
    assert not backbone.model.training
    assert {parameter.dtype for parameter in backbone.model.parameters()} == {torch.float32}
    assert (backbone.spec.mean, backbone.spec.std) == ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    assert (backbone.spec.input_size, backbone.spec.patch_size) == ((32, 32), (16, 16))
    assert (backbone.spec.library, backbone.spec.family) == ("timm", "VisionTransformer")


@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "eva02", "dinov3", "naflexvit-reg"])
def test_a_patched_model_saved_by_timm_is_a_stock_model_with_native_registers(family, tmp_path):
    model = add_registers(FAMILIES[family](), 3)
    save_for_hf(model, tmp_path, safe_serialization=True)
    backbone = load(tmp_path)
    images = images_for(adapt(model))
    assert torch.equal(backbone.model(images), model(images))
    assert backbone.num_registers == 0
    assert backbone.spec.num_prefix == model.num_prefix_tokens


def test_tensors_in_a_bin_file_are_read_and_code_in_one_is_not_run(folder, tmp_path):
    weights, marker = load(folder).model.state_dict(), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(load(folder).model.cls_token, weights["cls_token"])

    class Bomb:
        def __reduce__(self):
            return Path.touch, (marker,)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"cls_token": Bomb()}, protocol=2))
    with pytest.raises(LoadError, match="copy or download both again"):
        load(folder)
    assert not marker.exists()


def test_a_folder_without_a_usable_config_is_refused(tmp_path, folder):
    for text, found in [
        (None, "FileNotFoundError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError"),
    ]:
        if text is None:
            with pytest.raises(LoadError, match=found):
                load(tmp_path / "nowhere")
        else:
            (folder / "config.json").write_text(text)
            with pytest.raises(LoadError, match=f"names its architecture, found {found}.*copy it again"):
                load(folder)


def test_an_unknown_architecture_is_refused_with_the_nearest_names(folder):
    edit_config(folder, architecture="vit_tiny_patch16_225")
    with pytest.raises(UnsupportedModelError, match="did you mean vit_tiny_patch16_224"):
        load(folder)


def test_broken_or_foreign_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoadError, match=r"\(test_vit\) cannot be built.*copy or download both again"):
        load(folder)
    weights.unlink()
    with pytest.raises(LoadError, match="No suitable checkpoints"):
        load(folder)
    weights.write_bytes(whole)
    edit_config(folder, architecture="vit_tiny_patch16_224")
    with pytest.raises(LoadError, match="belongs to another model"):
        load(folder)


def test_arguments_that_the_architecture_does_not_take_are_refused(folder):
    edit_config(folder, model_args={"no_such_argument": 1})
    with pytest.raises(LoadError, match="no_such_argument"):
        load(folder)


@pytest.mark.real
def test_a_real_vit_is_patched_and_restored(real_model):
    backbone = load(real_model)
    assert (backbone.spec.width, backbone.spec.num_heads, backbone.spec.num_prefix) == (192, 3, 1)
    assert (backbone.spec.input_size, backbone.spec.mean) == ((224, 224), (0.5, 0.5, 0.5))
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    state, expected = copy.deepcopy(backbone.model.state_dict()), backbone.model(images)
    add_registers(backbone, 4)
    assert backbone(torch.randn(1, 3, 160, 256)).patches.shape == (1, 10, 16, 192)
    assert not torch.equal(backbone.model(images), expected)
    stock = timm.create_model("vit_tiny_patch16_224", reg_tokens=4, no_embed_class=True).eval()
    stock.load_state_dict(backbone.disk_state(), strict=True)
    assert torch.equal(stock(images), backbone.model(images))
    remove_registers(backbone)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.model.state_dict().items())
    assert torch.equal(backbone.model(images), expected)


# -- names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("vit_base_patch16_224.augreg_in21k", "timm/vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"),
        ("vit_base_patch16_clip_224.openai", "timm/vit_base_patch16_clip_224.openai"),
    ],
)
def test_a_name_leads_to_the_repository_with_its_weights(name, repository):
    assert is_name(name)
    assert hub_id(name) == repository


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_225", "knows no such name; did you mean vit_base_patch16_224"),
        (
            "vit_base_patch16_224.augreg_in22k",
            "no weights of that name; did you mean vit_base_patch16_224.augreg_in21k",
        ),
        ("vit_huge_patch14_gap_224.in1k_ijepa", "no weights for it on the hub"),
        ("vit_base_patch16_clip_quickgelu_224.openai", "shares its weights with vit_base_patch16_clip_224"),
    ],
)
def test_a_name_without_weights_of_its_own_is_refused_with_what_to_do(name, message):
    with pytest.raises(LoadError, match=message):
        hub_id(name)


def test_hub_ids_and_other_strings_are_no_timm_names():
    assert not any(
        map(
            is_name, ["timm/vit_base_patch16_224", "facebook/dinov2-base", "photos", "", "open_clip:ViT-B-16"]
        )
    )
    assert is_name("vit_base_patch16_224.no_such_tag")
