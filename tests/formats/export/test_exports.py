"""Exports: equal to the patched model in the hands of the stock library, or not there at all."""

import copy
import json
from functools import partial

import numpy as np
import pytest
import timm
import torch
import transformers as hf
from families_timm import FAMILIES as TIMM
from families_transformers import FAMILIES as TRANSFORMERS
from families_transformers import STAGES, TINY, WIDE, build
from safetensors.torch import load_file
from torch import nn

from phreg.backbones import resolve
from phreg.backbones.readout import set_readout
from phreg.errors import LoadError, PhregError
from phreg.formats.adapter import read_adapter
from phreg.formats.export import export
from phreg.formats.load import open_model
from phreg.registers import add_registers
from phreg.run_summary import RunSummary
from phreg.storage import EXPORT_FILE

DINOV2 = [name for name in TRANSFORMERS if name.startswith("dinov2")]
COUNT = 3

each_format = pytest.mark.parametrize(
    ("format", "builder"), [("timm", TIMM["vit"]), ("transformers", TRANSFORMERS["dinov2-swiglu"])]
)


def patched(builder):
    """A model with registers, its backbone and what it was made from."""
    backbone, base = resolve.load(builder())
    add_registers(backbone, COUNT)
    return backbone, base


def pictures(backbone, rows=None, cols=None):
    (high, wide), (height, width) = backbone.spec.patch_size, backbone.spec.input_size
    size = (rows * high if rows else height, cols * wide if cols else width)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def settings(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def vit():
    """The smallest case: a timm ViT with registers."""
    return patched(TIMM["vit"])


OBLONG_DINOV2 = hf.Dinov2WithRegistersConfig(**TINY | {"image_size": (16, 64)})


def oblong(model_class, config_class, size, **changes):
    """A builder of a model of transformers for images that are not square."""
    return lambda: build(model_class, config_class(**WIDE | {"image_size": size} | changes))


@pytest.mark.parametrize("format", ["timm", "remote-code", "merged"])
@pytest.mark.parametrize(
    "builder",
    [
        oblong(hf.ViTModel, hf.ViTConfig, (16, 64)),
        oblong(hf.IJepaModel, hf.IJepaConfig, (24, 40)),
        oblong(hf.ViTModel, hf.ViTConfig, (16, 64), patch_size=(8, 16)),
    ],
    ids=["vit 16x64", "ijepa 24x40", "patches of 8x16"],
)
def test_a_model_that_is_not_square_is_exported_at_its_own_size(builder, format, tmp_path):
    backbone, base = patched(builder)
    if format == "timm":
        backbone.model.pooler = None  # which timm has not
    (figure,) = export(backbone, tmp_path / "out", format, base=base)
    assert (figure.size, figure.claimed) == (backbone.spec.input_size, True)
    again, _ = open_model(tmp_path / "out")
    assert again.spec.input_size == backbone.spec.input_size
    images = pictures(backbone)
    # timm's norms add another constant to the variance: see exports/README.md.
    torch.testing.assert_close(again(images).patches, backbone(images).patches, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("builder", "format"),
    [
        (oblong(hf.ViTModel, hf.ViTConfig, (16, 64)), "remote-code"),
        (partial(build, hf.Dinov2WithRegistersModel, OBLONG_DINOV2), "transformers"),
        (partial(build, hf.Dinov2Model, hf.Dinov2Config(**TINY | {"image_size": (16, 64)})), "remote-code"),
    ],
    ids=["vit", "dinov2", "dinov2 remote-code"],
)
def test_the_image_processor_of_a_model_that_is_not_square_fills_its_shape(builder, format, tmp_path):
    backbone, base = patched(builder)
    export(backbone, tmp_path / "out", format, base=base)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    for size in ((50, 90), (90, 50)):
        white = np.full((*size, 3), 255, np.uint8)
        pixels = processor(white, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 16, 64)
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in (backbone.spec.mean, backbone.spec.std))
        torch.testing.assert_close(pixels[0], ((1 - mean) / std).expand(3, 16, 64))  # no black bars


# -- timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TIMM)
def test_plain_timm_loads_the_very_model_with_its_registers(family, tmp_path):
    backbone, base = patched(TIMM[family])
    figures = export(backbone, tmp_path / "out", "timm", base=base)
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = pictures(backbone)
    # The same class, weights and kernels: nothing is rounded differently, so equal means equal.
    assert torch.equal(stock(images), backbone.model(images))
    assert stock.num_prefix_tokens == backbone.spec.num_prefix + COUNT
    assert [(figure.difference, figure.claimed) for figure in figures] == [(0.0, True)] * 3
    assert len({figure.size for figure in figures}) == 3
    assert figures[0].size == backbone.spec.input_size
    (tmp_path / "new").touch()
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}, "whoever may read a new file may read these"


@pytest.mark.parametrize("family", ["vit", "clip", "siglip", "eva02", "dinov3"])
def test_timm_agrees_at_other_sizes_once_told_to_take_them(family, tmp_path):
    backbone, base = patched(TIMM[family])
    export(backbone, tmp_path / "out", "timm", base=base)
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, dynamic_img_size=True).eval()
    images = pictures(backbone, rows=3, cols=5)
    tokens = stock.forward_features(images)[:, stock.num_prefix_tokens :]
    assert torch.equal(tokens.unflatten(1, (3, 5)), backbone(images).patches)


@pytest.mark.parametrize("family", ["vit", "clip", "eva02"])
def test_a_timm_folder_loads_in_transformers_too(family, tmp_path):
    backbone, base = patched(TIMM[family])
    export(backbone, tmp_path / "out", "timm", base=base)
    stock = hf.AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    images = pictures(backbone)
    assert torch.equal(stock(images).logits, backbone.model(images))


@pytest.mark.parametrize("format", ["timm", "merged"])
@pytest.mark.parametrize("classes", [None, 10])
def test_an_exported_clip_keeps_its_projection_or_its_classifier(format, classes, tmp_path):
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    changes = small if classes is None else small | {"num_classes": classes}
    backbone, base = patched(lambda: timm.create_model("vit_base_patch16_clip_224.openai", **changes).eval())
    export(backbone, tmp_path / "out", format, base=base)
    again, _ = open_model(tmp_path / "out")
    assert (again.projection is None) == (backbone.projection is None) == (classes == 10)
    assert torch.equal(again.run(pictures(backbone)), backbone.run(pictures(backbone)))


def test_where_weights_come_from_is_told_as_their_own_folder_tells_it(saved, tmp_path):
    config = settings(saved)
    config["pretrained_cfg"] |= {"tag": "mine", "license": "mit", "mean": [0.1, 0.2, 0.3]}
    (saved / "config.json").write_text(json.dumps(config))
    backbone, base = patched(lambda: timm.create_model(f"local-dir:{saved}", pretrained=True))
    export(backbone, tmp_path / "out", "timm", base=base)
    found = settings(tmp_path / "out")["pretrained_cfg"]
    assert (found["tag"], found["license"]) == ("mine", "mit")
    assert (found["mean"], found["std"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    assert found["input_size"] == [3, 32, 32]
    assert not {"file", "source", "url", "hf_hub_id"} & found.keys()


def test_a_model_without_a_folder_is_not_taken_for_its_architectures_default_weights(tmp_path):
    backbone, base = patched(TIMM["clip"])
    assert backbone.model.pretrained_cfg["license"]  # timm's entry for another checkpoint
    export(backbone, tmp_path / "out", "timm", base=base)
    assert not {"tag", "license", "notes"} & settings(tmp_path / "out")["pretrained_cfg"].keys()


def test_the_number_of_classes_is_no_construction_argument(vit, tmp_path):
    export(vit[0], tmp_path / "out", "timm", base=vit[1])
    config = settings(tmp_path / "out")
    assert config["num_classes"] == 5
    assert "num_classes" not in config["model_args"]
    assert config["model_args"]["reg_tokens"] == COUNT
    assert config["model_args"]["no_embed_class"] is True


def test_a_new_head_and_a_new_native_size_are_exported(tmp_path):
    backbone, base = patched(TIMM["vit"])
    backbone.model.reset_classifier(7, global_pool="avg")
    nn.init.normal_(backbone.model.head.weight)
    backbone.set_input_size(48)
    figures = export(backbone, tmp_path / "out", "timm", base=base)
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = pictures(backbone)
    assert images.shape[-1] == 48
    assert torch.equal(stock(images), backbone.model(images))
    assert figures[0].size == (48, 48)


def test_a_model_that_timm_has_no_name_for_is_refused(tiny, tmp_path):
    backbone, base = patched(tiny)
    with pytest.raises(PhregError, match=r"calling its class.*timm\.create_model"):
        export(backbone, tmp_path / "out", "timm", base=base)


def test_an_architecture_that_timm_does_not_know_is_refused(vit, tmp_path):
    vit[0].model.pretrained_cfg = vit[0].model.pretrained_cfg | {"architecture": "vit_of_mine"}
    with pytest.raises(PhregError, match="knows no architecture 'vit_of_mine'"):
        export(vit[0], tmp_path / "out", "timm", base=vit[1])


def test_arguments_that_are_no_data_are_named(tmp_path):
    layer = partial(nn.LayerNorm, eps=1e-5)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    backbone, base = patched(lambda: timm.create_model("vit_tiny_patch16_224", norm_layer=layer, **arguments))
    with pytest.raises(PhregError, match="built with norm_layer, which cannot be written"):
        export(backbone, tmp_path / "out", "timm", base=base)


# -- transformers --------------------------------------------------------------------------------------------


def stock_dinov2(folder):
    """Loads with transformers alone, as the class that the folder names, and no other."""
    (name,) = settings(folder)["architectures"]
    assert name.startswith("Dinov2WithRegisters")
    stock, found = getattr(hf, name).from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return stock.eval()


@pytest.mark.parametrize("family", DINOV2)
def test_stock_dinov2_with_registers_is_the_very_model(family, tmp_path):
    backbone, base = patched(TRANSFORMERS[family])
    figures = export(backbone, tmp_path / "out", "transformers", base=base)
    stock, images = stock_dinov2(tmp_path / "out"), pictures(backbone)
    expected, found = backbone.model(images), stock(images)
    assert figures[0].claimed
    # The same operations in the same order: nothing is rounded differently.
    assert figures[0].difference == 0.0
    for name in {"logits", "pooler_output"} & expected.keys():
        assert torch.equal(found[name], expected[name])
    for stage, same in zip(found.get("feature_maps", ()), expected.get("feature_maps", ()), strict=True):
        assert torch.equal(stage, same)
    if "last_hidden_state" in found:
        visible = list(range(backbone.spec.num_prefix))
        visible += range(len(visible) + COUNT, found.last_hidden_state.shape[1])
        assert torch.equal(found.last_hidden_state[:, visible], expected.last_hidden_state)


@pytest.mark.parametrize("family", DINOV2)
def test_sizes_are_claimed_only_where_both_resample_positions_alike(family, tmp_path):
    backbone, base = patched(TRANSFORMERS[family])
    figures = export(backbone, tmp_path / "out", "transformers", base=base)
    native, *others = [figure.claimed for figure in figures]
    assert native
    # Stock Dinov2WithRegisters antialiases; so did the base if it was of that class, and not if it was a
    # Dinov2.
    assert others == [family.startswith("dinov2-registers")] * 2
    assert [figure["claimed"] for figure in settings(tmp_path / "out", EXPORT_FILE)["equality"]] == [
        native,
        *others,
    ]


def test_a_dinov2_is_equal_at_the_size_that_was_made_its_own(tmp_path):
    backbone, base = patched(TRANSFORMERS["dinov2"])
    backbone.set_input_size(48)
    figures = export(backbone, tmp_path / "out", "transformers", base=base)
    assert (figures[0].size, figures[0].difference) == ((48, 48), 0.0)
    assert stock_dinov2(tmp_path / "out").config.image_size == 48


def test_the_sizes_that_a_run_trained_at_are_measured(tmp_path):
    backbone, base = patched(TRANSFORMERS["dinov2"])
    run = RunSummary(recipe={"size": 48, "mixed_sizes": [[32, 48], 32]})
    figures = export(backbone, tmp_path / "out", "transformers", base=base, run=run)
    assert [figure.size for figure in figures[:3]] == [(32, 32), (48, 48), (32, 48)]
    assert [figure.claimed for figure in figures[:3]] == [True, False, False]
    assert len(figures) == 5, "a smaller and a larger size besides; none is measured twice"


def test_sizes_can_be_asked_for(tmp_path):
    backbone, base = patched(TRANSFORMERS["dinov2"])
    figures = export(backbone, tmp_path / "out", "transformers", base=base, sizes=[(16, 16)])
    assert [figure.size for figure in figures] == [(32, 32), (16, 16)]
    assert figures[1].difference > 0
    with pytest.raises(PhregError, match="size 17 asked"):
        export(backbone, tmp_path / "other", "transformers", base=base, sizes=[(17, 16)])


def test_native_registers_stay_ahead_of_added_ones(tmp_path):
    backbone, base = patched(TRANSFORMERS["dinov2-registers"])
    export(backbone, tmp_path / "out", "transformers", base=base)
    native, added = stock_dinov2(tmp_path / "out").embeddings.register_tokens.split([2, COUNT], dim=1)
    assert torch.equal(native, backbone.model.embeddings.register_tokens)
    assert torch.equal(added, backbone.registers)


def test_a_model_distilled_without_registers_is_exported_without(tmp_path):
    backbone, base = resolve.load(TRANSFORMERS["dinov2"]())
    export(backbone, tmp_path / "out", "transformers", base=base)
    assert stock_dinov2(tmp_path / "out").config.num_register_tokens == 0


def test_a_missing_mask_token_becomes_zero(tmp_path):
    config = hf.Dinov2Config(**TINY, mlp_ratio=2, use_mask_token=False)
    backbone, base = patched(lambda: build(hf.Dinov2Model, config))
    export(backbone, tmp_path / "out", "transformers", base=base)
    assert torch.equal(stock_dinov2(tmp_path / "out").embeddings.mask_token, torch.zeros(1, 32))


def test_images_are_prepared_at_the_models_own_size_and_normalisation(tmp_path):
    backbone, base = patched(TRANSFORMERS["dinov2"])
    export(backbone, tmp_path / "out", "transformers", base=base)
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = torch.zeros(3, 50, 80, dtype=torch.uint8)
    prepared = processor(picture, return_tensors="pt")["pixel_values"]
    assert prepared.shape[-2:] == backbone.spec.input_size
    black = [-mean / std for mean, std in zip(backbone.spec.mean, backbone.spec.std, strict=True)]
    assert torch.allclose(prepared[0, :, 0, 0], torch.tensor(black))  # float rounding


def test_labels_and_the_stages_of_a_backbone_are_kept(tmp_path):
    backbone, base = patched(TRANSFORMERS["dinov2-classifier"])
    backbone.model.config.id2label = {number: f"kind {number}" for number in range(5)}
    export(backbone, tmp_path / "classifier", "transformers", base=base)
    assert stock_dinov2(tmp_path / "classifier").config.id2label[3] == "kind 3"
    backbone, base = patched(TRANSFORMERS["dinov2-backbone"])
    export(backbone, tmp_path / "backbone", "transformers", base=base)
    assert stock_dinov2(tmp_path / "backbone").config.out_features == STAGES["out_features"]


def test_a_backbone_that_would_show_its_registers_is_refused(tmp_path):
    config = hf.Dinov2Config(**TINY, mlp_ratio=2, reshape_hidden_states=False, **STAGES)
    backbone, base = patched(lambda: build(hf.Dinov2Backbone, config))
    with pytest.raises(PhregError, match="reshape_hidden_states=False"):
        export(backbone, tmp_path / "out", "transformers", base=base)


# -- refusals and failures -----------------------------------------------------------------------------------


def test_a_format_that_a_model_cannot_take_names_those_it_can(vit, tmp_path):
    with pytest.raises(PhregError, match=r"model of timm.*It can be exported as timm or onnx or merged\."):
        export(vit[0], tmp_path / "out", "transformers", base=vit[1])
    backbone, base = patched(TRANSFORMERS["aimv2-vision"])
    for asked, reason in (("timm", "AIMv2"), ("transformers", "only those of DINOv2"), ("open_clip", "text")):
        with pytest.raises(PhregError, match=rf"{reason}.*exported as remote-code or onnx or merged\."):
            export(backbone, tmp_path / "out", asked, base=base)
    with pytest.raises(PhregError, match="'gguf'; the formats there are: timm, transformers, "):
        export(backbone, tmp_path / "out", "gguf", base=base)
    assert not list(tmp_path.iterdir())


def test_a_dense_read_out_is_refused(tmp_path):
    backbone = resolve.adapt(TIMM["clip"]())
    nn.init.zeros_(backbone.model.head.bias)  # as those of CLIP that timm converts
    backbone, base = patched(lambda: backbone.model)
    set_readout(backbone, "value-only")
    with pytest.raises(PhregError, match=r"read value-only.*set it to plain .*exported as onnx or merged\."):
        export(backbone, tmp_path / "out", "timm", base=base)
    set_readout(backbone, "plain")
    assert export(backbone, tmp_path / "out", "timm", base=base)[0].difference == 0.0


def _other_norm(model):
    model.norm.eps = 0.5


def _no_norm(model):
    model.norm = nn.Identity()


def _louder_head(model):
    model.head.register_forward_hook(lambda _module, _args, output: 2 * output)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (_other_norm, "at its own size.*differs by"),
        (_louder_head, "at its own size.*differs by 5.0e-01"),
        (_no_norm, "does not load"),
    ],
)
def test_a_model_that_its_class_would_not_build_so_leaves_nothing_behind(vit, change, found, tmp_path):
    change(vit[0].model)
    with pytest.raises(PhregError, match=f"another model: .*{found}"):
        export(vit[0], tmp_path / "out", "timm", base=vit[1])
    assert not list(tmp_path.iterdir())


def test_values_that_are_no_numbers_are_never_equal(vit, tmp_path):
    vit[0].model.norm.weight[0] = torch.nan
    with pytest.raises(PhregError, match="differs by nan"):
        export(vit[0], tmp_path / "out", "timm", base=vit[1])


@pytest.mark.parametrize("name", ["folder.save_file", "measure"])
def test_a_full_disk_leaves_nothing_behind(vit, name, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"phreg.formats.export.{name}", fail)
    with pytest.raises(PhregError, match=r"cannot be written \(.*No space left on device"):
        export(vit[0], tmp_path / "out", "timm", base=vit[1])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(vit, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for folder, what in ((tmp_path, "is not empty"), (tmp_path / "mine.txt", "is a file")):
        with pytest.raises(PhregError, match=what):
            export(vit[0], folder, "timm", base=vit[1])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_and_new_ones_are_written_whole(vit, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new" / "deep"):
        export(vit[0], folder, "timm", base=vit[1])
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", EXPORT_FILE}
        assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_what_a_killed_export_left_is_swept_away(vit, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "model.safetensors").write_bytes(b"half")
    export(vit[0], tmp_path / "out", "timm", base=vit[1])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_record_says_what_was_exported_and_how_equal_it_is(vit, tmp_path):
    figures = export(vit[0], tmp_path / "out", "timm", base=vit[1])
    record = settings(tmp_path / "out", EXPORT_FILE)
    assert record["base"]["sha256"] == vit[1].sha256
    assert (record["format"], record["registers"]) == ("timm", COUNT)
    assert [tuple(entry["size"]) for entry in record["equality"]] == [figure.size for figure in figures]
    assert record["versions"]["timm"] == timm.__version__
    # It is no adapter, and is not taken for one.
    assert resolve.locate(tmp_path / "out").library == "timm"
    with pytest.raises(LoadError):
        read_adapter(tmp_path / "out")


@each_format
def test_exporting_does_not_touch_the_model(format, builder, tmp_path):
    backbone, base = patched(builder)
    backbone.model.train()
    backbone.blocks[0].eval()
    modes = [module.training for module in backbone.model.modules()]
    state = copy.deepcopy(backbone.model.state_dict())
    export(backbone, tmp_path / "out", format, base=base)
    assert [module.training for module in backbone.model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.model.state_dict().items())


@each_format
def test_a_bf16_model_is_exported_in_bf16(format, builder, tmp_path):
    backbone, base = patched(builder)
    backbone.model.to(torch.bfloat16)
    figures = export(backbone, tmp_path / "out", format, base=base)
    assert figures[0].difference == 0.0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.bfloat16
    }


@pytest.mark.real
def test_a_real_model_is_exported_to_the_bit(real_model, tmp_path):
    backbone, base = resolve.load(real_model)
    add_registers(backbone, 4)
    figures = export(backbone, tmp_path / "out", "timm", base=base)
    assert [figure.difference for figure in figures] == [0.0] * 3
    assert settings(tmp_path / "out")["pretrained_cfg"]["license"] == "apache-2.0"
