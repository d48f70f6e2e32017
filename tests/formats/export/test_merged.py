"""Merged: the whole model in one folder, which phreg.load opens without the base."""

import json
import shutil

import jaxtyping
import open_clip
import pytest
import torch
from families import FAMILIES
from families_open_clip import TEXT
from families_transformers import FAMILIES as TRANSFORMERS
from safetensors.torch import save_file

import phreg
from phreg.backbones import resolve
from phreg.backbones.readout import set_readout
from phreg.errors import LoadError, PhregError
from phreg.formats.export import export
from phreg.formats.load import open_model
from phreg.registers import add_registers, remove_registers
from phreg.sinks import test_time


def pictures(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def patched(model):
    backbone, base = resolve.load(model)
    return add_registers(backbone, 3), base


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def clip_folder(tmp_path):
    """A tiny CLIP as an open_clip folder."""
    folder = tmp_path / "clip"
    folder.mkdir()
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.model.CLIP(16, vision, TEXT)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.mark.parametrize("family", ["transformers/vit-classifier", "timm/vit", "timm/naflexvit-reg"])
def test_load_gives_the_very_model_and_its_registers_come_out_again(family, tmp_path):
    backbone, base = patched(FAMILIES[family]())
    export(backbone, tmp_path / "out", "merged", base=base)
    again = phreg.load(tmp_path / "out")
    images, model = pictures(), backbone.model
    outputs = (lambda one: one(images).logits) if "transformers" in family else (lambda one: one(images))
    assert type(again) is type(model)
    assert torch.equal(outputs(again), outputs(model))
    # Taken out, the model is the patched one without registers: sums of CLS and position are rounded anew.
    assert torch.allclose(outputs(remove_registers(again)), outputs(remove_registers(model)), atol=1e-5)


def test_an_open_clip_folder_is_merged_after_it_is_gone(clip_folder, tmp_path):
    backbone, base = patched(clip_folder)
    export(backbone, tmp_path / "out", "merged", base=base)
    shutil.rmtree(clip_folder)
    again = open_model(tmp_path / "out")[0]
    assert again.num_registers == 3
    assert again.spec.mean == (0.1, 0.2, 0.3)
    assert torch.equal(again.model.encode_image(pictures()), backbone.model.encode_image(pictures()))
    words = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.model.encode_text(words), backbone.model.encode_text(words))


def test_a_merged_model_is_merged_again_and_exported_otherwise(clip_folder, tmp_path):
    backbone, base = patched(clip_folder)
    export(backbone, tmp_path / "out", "merged", base=base)
    figures = phreg.export(tmp_path / "out", tmp_path / "again", format="merged")
    assert [figure.difference for figure in figures] == [0.0] * 3
    assert torch.equal(phreg.load(tmp_path / "again").visual.registers, backbone.registers)


@pytest.mark.parametrize("family", ["timm/vit", "transformers/clip", "open_clip/clip"])
def test_a_new_native_size_is_kept(family, tmp_path, clip_folder):
    backbone, base = patched(clip_folder if "open_clip" in family else FAMILIES[family]())
    backbone.set_input_size(48)
    export(backbone, tmp_path / "out", "merged", base=base)
    again = open_model(tmp_path / "out")[0]
    assert again.spec.input_size == (48, 48)
    assert torch.equal(again.run(pictures(48)), backbone.run(pictures(48)))


def test_a_read_out_goes_along(clip_folder, tmp_path):
    backbone, base = patched(clip_folder)
    set_readout(backbone, "value-only")
    expected = backbone(pictures()).patches
    figures = export(backbone, tmp_path / "out", "merged", base=base)
    assert all(figure.claimed for figure in figures)
    assert json.loads((tmp_path / "out" / "phreg.json").read_text())["readout"] == "value-only"
    again = open_model(tmp_path / "out")[0]
    set_readout(again, "value-only")
    assert torch.equal(again(pictures()).patches, expected)
    # and stays on the way through the folder into a format that cannot carry it, which says so
    with pytest.raises(PhregError, match=r"read value-only.*exported as onnx or merged\."):
        phreg.export(tmp_path / "out", tmp_path / "timm", format="timm")


@pytest.mark.parametrize("format", ["merged", "onnx"])
# onnxscript calls what it deprecates itself, on the way through torch's exporter.
@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")
def test_test_time_registers_go_along_and_other_formats_name_those_with_them(format, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # checked shapes are fixed in a graph
    backbone, base = resolve.load(FAMILIES["timm/vit"]())
    before = backbone(pictures()).patches
    units = {1: [(3, 1), (7, -1)]}
    test_time.install(backbone, units)
    assert not torch.allclose(backbone(pictures()).patches, before, atol=1e-2)
    figures = export(backbone, tmp_path / "out", format, base=base)
    assert [figure.claimed for figure in figures] == [True] * 3
    if format == "merged":
        again = open_model(tmp_path / "out")[0]
        assert test_time.installed(again).units == units
        assert torch.equal(again(pictures()).patches, backbone(pictures()).patches)
    with pytest.raises(PhregError, match=r"test-time registers.*exported as onnx or merged\."):
        export(backbone, tmp_path / "timm", "timm", base=base)


def test_no_stock_loader_takes_the_folder_for_an_unpatched_model(clip_folder, tmp_path):
    import timm
    import transformers

    backbone, base = patched(clip_folder)
    export(backbone, tmp_path / "out", "merged", base=base)
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModel.from_pretrained(tmp_path / "out")
    with pytest.raises((OSError, ValueError)):
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    with pytest.raises((OSError, ValueError)):
        open_clip.create_model(f"local-dir:{tmp_path / 'out'}")


def test_what_a_transformers_model_saves_itself_loads_the_same_way(tmp_path):
    backbone, _ = patched(TRANSFORMERS["siglip-vision"]())
    backbone.model.save_pretrained(tmp_path / "out")
    assert torch.equal(open_model(tmp_path / "out")[0].run(pictures()), backbone.run(pictures()))


@pytest.mark.parametrize("broken", ["tensors", "class", "config", "missing"])
def test_a_broken_folder_is_one_clear_error(broken, tmp_path):
    backbone, base = patched(FAMILIES["transformers/vit"]())
    folder = tmp_path / "out"
    export(backbone, folder, "merged", base=base)
    description = json.loads((folder / "phreg.json").read_text())
    # Written so by somebody, and no damage: what is there is noted as it is.
    description = {key: value for key, value in description.items() if not key.endswith("_sha256")}
    (folder / "phreg.json").write_text(json.dumps(description))
    if broken == "tensors":
        (folder / "phreg.safetensors").write_bytes(b"half")
    elif broken == "missing":
        save_file({"registers.tokens": torch.zeros(1, 3, 32)}, folder / "phreg.safetensors")
    else:
        description[broken] = {"class": "NoSuchModel", "config": {"model_type": "none"}}[broken]
        (folder / "phreg.json").write_text(json.dumps(description))
    found = (
        "cannot read .* as safetensors" if broken == "tensors" else r"patched model in .*cannot be loaded \("
    )
    with pytest.raises(LoadError, match=rf"{found}.*it again"):
        phreg.load(folder)
