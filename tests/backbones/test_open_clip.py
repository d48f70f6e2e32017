"""The open_clip adapter, where the conformance suite does not reach: sizes, roles, files and names."""

import copy
import inspect
import json
import pickle

import open_clip
import pytest
import torch
from families_open_clip import FAMILIES, TEXT, VISION, clip, clip_around_timm
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn

from phreg.backbones import open_clip as adapter
from phreg.backbones.open_clip import RegisterVisionTransformer, TimmTower, adapt, hub_file, load
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats.load import open_model
from phreg.registers import add_registers, remove_registers
from phreg.testing import Subject, laws
from phreg.testing.hidden_units import check_mlp

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 sums in another order


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


# -- running -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("tower", "coca")])
def test_run_is_encode_image(family):
    model = FAMILIES[family]()
    expected = model.encode_image(images())
    assert torch.equal(adapt(model).run(images()), expected)


@torch.no_grad()
def test_coca_runs_as_encode_image_does():
    model = FAMILIES["coca"]()
    found = adapt(model).run(images())
    assert torch.equal(nn.functional.normalize(found, dim=-1), model.encode_image(images()))


@torch.no_grad()
def test_a_patched_model_works_through_open_clips_own_methods():
    model = clip()
    text = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(1))
    before = model(images(), text)

    add_registers(model, 3)
    after = model(images(), text)

    assert torch.equal(after[1], before[1])  # the text tower is left alone
    assert not torch.equal(after[0], before[0])
    assert after[0].shape == before[0].shape
    assert isinstance(model.visual, VisionTransformer)


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "no-pre-norm", "average", "coca"])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_intermediates_of_a_patched_tower_are_patches_only(family, output_fmt):
    tower = FAMILIES[family]().visual
    backbone = add_registers(adapt(tower), 3)
    raw = backbone.block_tokens(images(), [0, 2])

    found = tower.forward_intermediates(
        images(), indices=[0, 2], output_fmt=output_fmt, output_extra_tokens=True
    )

    for layer, patches, prefix in zip(
        (0, 2), found["image_intermediates"], found["image_intermediates_prefix"], strict=True
    ):
        expected = raw[layer][:, 4:]
        if output_fmt == "NCHW":
            expected = expected.transpose(1, 2).unflatten(2, (4, 4))
        assert torch.equal(patches, expected)
        assert torch.equal(prefix, raw[layer][:, :1])
    assert torch.equal(
        found["image_features"], tower(images())[0] if tower.output_tokens else tower(images())
    )


@torch.no_grad()
def test_methods_of_a_patched_tower_take_what_those_they_stand_for_take():
    own = {
        name: value
        for name, value in vars(RegisterVisionTransformer).items()
        if inspect.isfunction(value) and hasattr(VisionTransformer, name)
    }
    assert own.keys() >= {"forward_intermediates", "lock"}
    for name, function in own.items():
        expected = inspect.signature(getattr(VisionTransformer, name)).parameters.values()
        found = inspect.signature(function).parameters.values()
        assert [(one.name, one.kind, one.default) for one in found] == [
            (one.name, one.kind, one.default) for one in expected
        ], name


def test_intermediates_take_their_format_by_position_and_refuse_an_unknown_one():
    tower = add_registers(adapt(FAMILIES["tower"]()), 2).tower
    grid = tower.forward_intermediates(images(), [1], False, False, True, "NCHW")["image_intermediates"][0]
    rows = tower.forward_intermediates(images(), [1], False, False, True, "NLC")["image_intermediates"][0]
    assert torch.equal(grid.flatten(2).transpose(1, 2), rows)
    with pytest.raises(AssertionError, match="NCHW or NLC"):
        tower.forward_intermediates(images(), [1], False, False, True, "NHWC")


@pytest.mark.parametrize(("groups", "trains"), [(0, False), (1, False), (3, False), (-1, False), (100, True)])
def test_registers_are_locked_and_unlocked_with_the_class_embedding(groups, trains):
    model = add_registers(adapt(FAMILIES["clip"]()), 2).model
    model.lock_image_tower(unlocked_groups=groups)
    assert model.visual.registers.requires_grad == trains == model.visual.class_embedding.requires_grad


# torch points to torch.compile; what it deprecates is what people have in place.
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of sizes that timm and open_clip compare
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda tower: torch.jit.trace(tower, images())], ids=["script", "trace"]
)
@torch.no_grad()
def test_torchscript_of_a_patched_tower_is_the_tower_and_follows_its_registers(family, make, monkeypatch):
    for name in ("_embeds", "_pool"):  # as users have them, without the check of types
        stated = inspect.unwrap(getattr(RegisterVisionTransformer, name))
        monkeypatch.setattr(RegisterVisionTransformer, name, stated)
    backbone = add_registers(adapt(FAMILIES[family]()), 3)
    tower = backbone.tower
    program, before = make(tower), tower(images())
    torch.testing.assert_close(program(images()), before, **CLOSE)
    backbone.registers.neg_()
    torch.testing.assert_close(program(images()), tower(images()), **CLOSE)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(program(images()), before, **CLOSE)


def test_registers_are_inserted_ahead_of_the_norm_before_the_blocks():
    backbone = add_registers(adapt(clip()), 3)
    received = []
    backbone.blocks[0].register_forward_pre_hook(lambda module, args: received.append(args[0]))

    backbone.run(images())

    expected = backbone.tower.ln_pre(backbone.registers).expand(2, -1, -1)
    torch.testing.assert_close(received[0][:, 1:4], expected, **CLOSE)


# -- sizes ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("num_registers", [0, 2])
def test_another_size_runs_as_open_clip_itself_would_resample(num_registers):
    small = add_registers(adapt(clip()), num_registers)
    state = copy.deepcopy(small.model.state_dict())
    large = add_registers(adapt(clip(image_size=48)), num_registers)
    open_clip.model.resize_pos_embed(
        state, large.model
    )  # what open_clip does to a checkpoint of another size
    large.model.load_state_dict(state)

    found, expected = small(images(48, 48)), large(images(48, 48))

    assert expected.patches.shape[1:3] == (6, 6)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", ["clip", "timm", "tower"])
def test_a_size_set_once_gives_what_a_size_for_one_run_gives(family):
    backbone, resized = adapt(FAMILIES[family]()), adapt(FAMILIES[family]())
    backbone.tower.preprocess_cfg = resized.tower.preprocess_cfg = {"size": (32, 32)}
    assert backbone.spec.input_size == (32, 32)

    resized.set_input_size((48, 24))

    assert resized.spec.input_size == tuple(resized.tower.image_size) == (48, 24)
    assert resized.tower.preprocess_cfg == {"size": (48, 24)}
    assert backbone.tower.preprocess_cfg == {"size": (32, 32)}
    with torch.no_grad():
        found = resized.tower(images(48, 24))  # now open_clip's own call takes it
        torch.testing.assert_close(found, backbone.run(images(48, 24)), **CLOSE)
        assert torch.equal(adapt(resized.model).run(images(48, 24)), found)


def test_a_size_that_is_no_multiple_of_the_patch_is_refused():
    backbone = adapt(clip())
    with pytest.raises(PhregError, match="size 30 asked of CLIP"):
        backbone.set_input_size(30)
    with pytest.raises(PhregError, match="size 30 asked of CLIP"):
        backbone.run(images(30, 32))


def test_the_stored_position_table_trains_through_another_size():
    backbone = adapt(clip())
    backbone(images(16, 24)).patches.sum().backward()
    assert backbone.tower.positional_embedding.grad.abs().sum() > 0


# -- what the adapter tells ----------------------------------------------------------------------------------


def test_all_parameters_of_the_image_tower_have_a_role_and_no_other():
    for family, build in FAMILIES.items():
        backbone = add_registers(adapt(build()), 2)
        named = {name for names in backbone.roles().values() for name in names}
        tower = {id(parameter) for parameter in backbone.tower.parameters()}
        expected = {name for name, parameter in backbone.model.named_parameters() if id(parameter) in tower}
        assert named == expected, family


@torch.no_grad()
@pytest.mark.parametrize("family", ["clip", "timm"])
def test_attention_made_of_its_parts_equals_the_block(family):
    backbone = adapt(FAMILIES[family]())
    tokens, block, parts = torch.randn(2, 17, backbone.spec.width), backbone.blocks[1], backbone.attention(1)
    normed = parts.norm(tokens)
    queries, keys, values = parts.queries(normed), parts.keys(normed), parts.values(normed)
    weights = (queries @ keys.transpose(-2, -1) * parts.scale).softmax(-1)

    found = parts.out((weights @ values).transpose(1, 2).flatten(2))

    norm = block.ln_1 if family == "clip" else block.norm1
    expected = block.attention(norm(tokens)) if family == "clip" else block.attn(norm(tokens))
    assert values.shape == (2, backbone.spec.num_heads, 17, backbone.spec.width // backbone.spec.num_heads)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "joint"), [("clip", True), ("timm", True), ("siglip", False), ("coca", False)]
)
def test_the_projection_takes_cls_to_the_image_features(family, joint):
    backbone = adapt(FAMILIES[family]())
    assert (backbone.projection is not None) == joint
    if joint:
        cls = backbone.final_norm(backbone.block_tokens(images(), [2])[2][:, 0])
        torch.testing.assert_close(cls @ backbone.projection, backbone.run(images()), **CLOSE)


def test_a_projection_with_a_bias_is_no_projection():
    backbone = adapt(FAMILIES["timm-head"]())
    assert backbone.tower.trunk.head.bias.any()
    assert backbone.projection is None


def test_normalisation_is_the_models_own_or_else_openais():
    model = clip()
    assert adapt(model).spec.mean == open_clip.OPENAI_DATASET_MEAN
    assert adapt(model).spec.std == open_clip.OPENAI_DATASET_STD
    model.visual.preprocess_cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    assert adapt(model).spec.mean == (0.5, 0.4, 0.3)
    assert adapt(model).spec.std == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_an_mlp_of_its_own(family):
    backbone = add_registers(adapt(FAMILIES[family]()), 3)
    names = ("fc1", "fc2") if isinstance(backbone, TimmTower) else ("c_fc", "c_proj")
    for index, block in enumerate(backbone.blocks):
        mlp = backbone.mlp(index)
        assert [*mlp.up, mlp.down] == [getattr(block.mlp, name) for name in names]
        assert mlp.norm is None


@pytest.mark.parametrize("settings", [{"scale_fc": True}, {"qk_norm": True}])
def test_the_mlp_of_a_custom_block_is_taken_apart_with_its_inner_norm(settings):
    model = clip(**settings)
    check_mlp(Subject(model, images(), 3))
    backbone = adapt(model)
    inner = backbone.blocks[0].mlp.ln
    assert backbone.mlp(0).norm is (inner if settings == {"scale_fc": True} else None)


def test_a_wrapped_layer_is_not_taken_apart():
    backbone = adapt(clip())
    backbone.blocks[0].mlp.c_fc = nn.Sequential(backbone.blocks[0].mlp.c_fc)
    assert backbone.mlp(0) is None


def test_custom_blocks_are_patched_but_their_attention_is_not_taken_apart():
    model = clip(qk_norm=True, scale_heads=True)
    subject = Subject(model, images(), 3)
    # Not gradient checkpointing, which open_clip's custom blocks do not survive without registers either.
    for check in (
        laws.check_removal,
        laws.check_order,
        laws.check_hidden_outside,
        laws.check_masked,
    ):
        check(subject)
    with pytest.raises(PhregError, match="a CustomResidualAttentionBlock whose attention"):
        adapt(model).attention(0)


def test_towers_that_are_no_transformers_are_refused():
    model = open_clip.CLIP(embed_dim=16, vision_cfg=VISION | {"layers": (1, 1, 1, 1)}, text_cfg=TEXT)
    with pytest.raises(UnsupportedModelError, match="its image tower is a ModifiedResNet; use"):
        adapt(model)


def test_a_timm_tower_that_cannot_be_patched_is_refused():
    model = clip_around_timm(pool="token", proj="linear")
    model.visual.trunk = nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError):
        adapt(model)


# -- life with registers -------------------------------------------------------------------------------------


def test_removal_gives_the_class_back():
    model = clip()
    add_registers(model, 2)
    assert type(model.visual) is RegisterVisionTransformer

    remove_registers(model)

    assert type(model.visual) is VisionTransformer
    assert "registers" not in dict(model.visual.named_parameters())


@torch.no_grad()
def test_a_patched_model_survives_pickle():
    model = add_registers(clip(), 2)
    twin = pickle.loads(pickle.dumps(model))
    assert adapt(twin).num_registers == 2
    assert torch.equal(twin.encode_image(images()), model.encode_image(images()))


# -- files and names -----------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A local folder with the tiny CLIP, as open_clip writes one."""
    model = clip()
    config = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    return tmp_path


@torch.no_grad()
def test_a_local_folder_loads(folder):
    backbone = load(folder)
    assert not backbone.model.training
    assert backbone.spec.std == (0.25, 0.25, 0.25)
    assert torch.equal(backbone.run(images()), clip().encode_image(images()))


@torch.no_grad()
def test_weights_alone_load_as_a_named_architecture(folder, tmp_path_factory):
    architectures = tmp_path_factory.mktemp("architectures")
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (architectures / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(architectures)

    noted = load(folder, "tiny-clip")
    (folder / "open_clip_config.json").unlink()
    (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
    bare = load(folder, "tiny-clip")

    assert noted.spec.mean == (0.5, 0.5, 0.5)
    assert bare.spec.mean == open_clip.OPENAI_DATASET_MEAN
    assert torch.equal(noted.run(images()), bare.run(images()))
    assert torch.equal(noted.run(images()), clip().encode_image(images()))


@pytest.mark.parametrize(
    ("tag", "mean"),
    [("laion2b_s32b_b82k", (0.5, 0.5, 0.5)), ("openai", open_clip.OPENAI_DATASET_MEAN)],
)
def test_the_tag_of_named_weights_tells_how_images_are_normalised(tag, mean, tmp_path):
    # open_clip's weights for ViT-L-14 were trained in two ways.
    noted = adapter._preprocessing(tmp_path, "ViT-L-14", tag)
    assert noted["mean"] == mean


def test_what_is_assumed_of_a_model_that_does_not_say_is_said(folder, caplog):
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["preprocess_cfg"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tower = open_clip.create_model("ViT-B-32", load_weights=False).visual
    open_model(tower)
    assert "assumed" not in caplog.text
    del tower.preprocess_cfg
    for model in (folder, tower):
        caplog.clear()
        open_model(model)
        assert "assumed are mean (0.48145466, 0.4578275, 0.40821073)" in caplog.text


def test_weights_that_are_missing_are_named(folder):
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has no weights; they should be in open_clip_model\.safetensors"):
        load(folder)


def test_weights_of_another_model_are_refused(folder):
    save_file(clip(layers=2).state_dict(), folder / "open_clip_model.safetensors")
    with pytest.raises(LoadError, match="cannot be built from its config and weights"):
        load(folder)


def test_broken_weights_are_refused(folder):
    (folder / "open_clip_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(LoadError, match="cannot be built from its config and weights"):
        load(folder)


def test_pickled_objects_are_never_loaded(folder):
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(clip(), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(LoadError, match="cannot be built from its config and weights"):
        load(folder)


def test_an_architecture_that_does_not_exist_is_refused(folder):
    with pytest.raises(LoadError, match="as ViT-Z-99 cannot be built"):
        load(folder, "ViT-Z-99")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-16/openai", ("ViT-B-16-quickgelu", "timm/vit_base_patch16_clip_224.openai")),
        ("ViT-B-16-quickgelu/openai", ("ViT-B-16-quickgelu", "timm/vit_base_patch16_clip_224.openai")),
        ("ViT-B-16/laion2b_s34b_b88k", ("ViT-B-16", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K")),
        ("ViT-B-16-SigLIP/webli", ("ViT-B-16-SigLIP", "timm/ViT-B-16-SigLIP")),
    ],
)
def test_names_of_open_clip_lead_to_the_hub(name, expected):
    assert hub_file(name) == expected
    assert expected[0] in open_clip.list_models()


def test_every_quick_gelu_form_exists():
    for arch, tag in open_clip.list_pretrained():
        assert hub_file(f"{arch}/{tag}")[0] in open_clip.list_models()


@pytest.mark.parametrize("name", ["ViT-B-16/openia", "VIT-B16/openai"])
def test_a_misspelt_name_is_answered_with_near_ones(name):
    with pytest.raises(LoadError, match=r"unknown to open_clip .* did you mean .*ViT-B-16/openai"):
        hub_file(name)


def test_a_name_like_no_other_is_answered_with_an_example():
    with pytest.raises(LoadError, match=r"did you mean ViT-B-16/openai\?"):
        hub_file("qqqq")
