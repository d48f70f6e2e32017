"""What phreg wrote comes back: every format, from a folder and from the hub, into models of others too."""

import json
import os
import random
import shutil
from dataclasses import replace

import families
import families_open_clip
import families_timm
import families_transformers
import pytest
import timm
import torch
import transformers as hf
from families_transformers import TINY, VISION, build
from safetensors.torch import load_file, save_file
from torch import nn

import phreg
from phreg.backbones import resolve
from phreg.backbones.resolve import Base, adapt, weights_sha256
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats.adapter import describe_tower, fit, save_adapter
from phreg.formats.export import export
from phreg.formats.load import open_model
from phreg.record import RunRecord
from phreg.sinks import test_time

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
DINOV2 = {"mlp_ratio": 2, **TINY}
SUMS = ("tensors_sha256", "settings_sha256")
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 64,
}


def adapted(model, folder, source="instance", revision=None):
    """Writes an adapter that looks trained, and returns the patched model; the base's weights are changed."""
    backbone = adapt(model)
    before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    base, tower = (
        Base(source, backbone.spec.library, revision, weights_sha256(before)),
        describe_tower(backbone),
    )
    phreg.add_registers(backbone, 3)
    with torch.no_grad():
        for name in ("block.2", "registers", "pos_embed", "norm"):
            for parameter in backbone.roles()[name]:
                backbone.model.get_parameter(parameter).mul_(1.5)
    save_adapter(folder, backbone, base, before, None, lambda record: "# card", tower=tower)
    return backbone


def clip_tower():
    return build(hf.CLIPVisionModel, hf.CLIPVisionConfig(**VISION))


def llava(tower):
    """A vision-language model around a copy of a tower."""
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**LLAMA)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=60)
        config.image_seq_length = 16
        model = hf.LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def adapter(tmp_path, saved):
    """An adapter whose base is a timm folder."""
    backbone = adapted(
        timm.create_model(f"local-dir:{saved}", pretrained=True).eval(), tmp_path / "adapter", str(saved)
    )
    return tmp_path / "adapter", backbone.model


# -- every format, from here and from the hub ----------------------------------------------------------------


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_adapter_comes_back_from_a_folder_and_from_the_hub(place, adapter, hub):
    folder, patched = adapter
    hub.commit("me/adapter", folder, tag="v1")
    loaded = phreg.load(folder) if place == "folder" else phreg.load("me/adapter", revision="v1")
    assert torch.equal(loaded(IMAGES), patched(IMAGES))


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("format", ["timm", "transformers"])
def test_an_export_comes_back_as_the_stock_model(format, place, hub, tmp_path):
    model = {"timm": families_timm.FAMILIES["vit"], "transformers": families_transformers.FAMILIES["dinov2"]}[
        format
    ]()
    phreg.add_registers(model, 3)
    phreg.export(model, tmp_path / "out", format=format)
    hub.commit("me/export", tmp_path / "out")
    loaded = phreg.load(tmp_path / "out" if place == "folder" else "me/export")
    assert type(loaded) is (type(model) if format == "timm" else hf.Dinov2WithRegistersModel)
    found, expected = loaded(IMAGES), model(IMAGES)
    if format == "transformers":
        found, expected = found.pooler_output, expected.pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # the rounding of fp32 over three blocks
    assert not loaded.training


@pytest.mark.parametrize("place", ["folder", "hub"])
@pytest.mark.parametrize("family", ["vit-classifier", "clip", "dinov2"])
def test_a_remote_code_export_comes_back_as_the_stock_class_and_its_code_is_not_run(
    family, place, hub, tmp_path, monkeypatch
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = phreg.add_registers(families_transformers.FAMILIES[family](), 3)
    phreg.export(model, tmp_path / "out", format="remote-code")
    code = next((tmp_path / "out").glob("*.py"))
    code.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n" + code.read_text())
    hub.commit("me/export", tmp_path / "out")
    loaded = phreg.load(tmp_path / "out" if place == "folder" else "me/export")
    assert type(loaded) is type(model)
    found, expected = adapt(loaded), adapt(model)
    assert torch.equal(found(IMAGES).patches, expected(IMAGES).patches)
    assert torch.equal(found.run(IMAGES), expected.run(IMAGES))
    assert not (tmp_path / "trace").exists()


def test_a_remote_code_export_keeps_a_pooler_off_and_its_normalisation(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = families_transformers.FAMILIES["vit"]()
    model.pooler = None
    backbone, base = resolve.load(model)
    backbone.spec = replace(backbone.spec, mean=(0.1, 0.2, 0.3))
    phreg.add_registers(backbone, 3)
    export(backbone, tmp_path / "out", "remote-code", base=base)
    again, _ = open_model(tmp_path / "out")
    assert again.model.pooler is None
    assert again.spec.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_registers": 2},
        {"architectures": ["RegistersAutoModel"]},
        {"architectures": []},
        {"model_type": "registers_none"},
    ],
)
def test_a_remote_code_export_that_was_tampered_with_is_one_clear_error(changes, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = phreg.add_registers(families_transformers.FAMILIES["vit"](), 3)
    phreg.export(model, tmp_path / "out", format="remote-code")
    config = tmp_path / "out" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(LoadError, match="cannot be rebuilt without its code"):
        phreg.load(tmp_path / "out")


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_an_open_clip_export_comes_back_with_its_text_tower(place, hub, tmp_path):
    model = phreg.add_registers(families_open_clip.FAMILIES["clip"](), 3)
    phreg.export(model, tmp_path / "out", format="open_clip")
    hub.commit("me/export", tmp_path / "out")
    loaded = phreg.load(tmp_path / "out" if place == "folder" else "me/export")
    found, expected = loaded.encode_image(IMAGES), model.encode_image(IMAGES)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # another class: fp32 over three blocks
    words = torch.randint(1, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.encode_text(words), model.encode_text(words))


def test_a_merged_model_comes_back_from_the_hub_with_what_the_config_does_not_say(hub, tmp_path):
    backbone, base = resolve.load(families_transformers.FAMILIES["clip-vision"]())
    backbone.spec = replace(backbone.spec, mean=(0.1, 0.2, 0.3))
    phreg.add_registers(backbone, 3)
    export(backbone, tmp_path / "out", "merged", base=base)
    hub.commit("me/merged", tmp_path / "out")
    again, found = open_model("me/merged")
    assert torch.equal(again(IMAGES).patches, backbone(IMAGES).patches)
    assert again.spec.mean == (0.1, 0.2, 0.3)
    assert found.source == "me/merged"


def test_a_merged_model_names_no_library_that_phreg_has_not(tmp_path):
    phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), tmp_path / "out", format="merged")
    tampered(tmp_path / "out", library="hub")
    with pytest.raises(LoadError, match="library 'hub' is none of transformers, timm, open_clip"):
        phreg.load(tmp_path / "out")


def test_an_export_of_a_model_in_half_precision_comes_back(tmp_path):
    model = phreg.add_registers(families_timm.FAMILIES["vit"](), 3).bfloat16()
    phreg.export(model, tmp_path / "out", format="timm")
    assert torch.equal(phreg.load(tmp_path / "out").reg_token.bfloat16(), model.reg_token)


def test_of_an_export_on_the_hub_no_code_and_no_pickle_is_fetched(hub, tmp_path):
    model = phreg.add_registers(families_timm.FAMILIES["vit"](), 3)
    phreg.export(model, tmp_path / "out", format="timm")
    for name in ("modeling.py", "pytorch_model.bin", "README.md"):
        (tmp_path / "out" / name).write_text("x")
    hub.commit("me/export", tmp_path / "out")
    phreg.load("me/export")
    assert hub.fetched() == {"config.json", "model.safetensors", "phreg_export.json"}


def test_a_patched_model_saved_whole_comes_back_from_the_hub(hub, tmp_path):
    model = phreg.add_registers(families_transformers.FAMILIES["dinov2"](), 3)
    model.save_pretrained(tmp_path / "saved")
    hub.commit("me/saved", tmp_path / "saved")
    assert torch.equal(phreg.load("me/saved")(IMAGES).last_hidden_state, model(IMAGES).last_hidden_state)


def test_a_model_that_phreg_did_not_write_says_what_loads_it(saved):
    with pytest.raises(LoadError, match=r"timm model without registers of phreg; load it with timm"):
        phreg.load(saved)


# -- into models of others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tower", "clip"])
def test_an_adapter_goes_into_the_vision_tower_of_a_llava_which_still_generates(base, tmp_path):
    clip = families_transformers.FAMILIES["clip"]()
    tower = clip_tower() if base == "tower" else clip.vision_model
    model = llava(tower)
    patched = adapt(adapted(tower if base == "tower" else clip, tmp_path / "adapter").vision_tower().model)
    asked = {
        "input_ids": torch.tensor([[1, *[60] * 16, 5]]),
        "attention_mask": torch.ones(1, 18, dtype=torch.long),
        "pixel_values": IMAGES[:1],
    }
    before = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert phreg.load(tmp_path / "adapter", into=model) is model
    after = model.generate(**asked, max_new_tokens=3, do_sample=False)
    assert after.shape == before.shape
    inside = model.model.vision_tower(IMAGES).last_hidden_state
    assert torch.equal(inside, patched.model(IMAGES).last_hidden_state)


def test_a_llava_patched_inside_saves_itself_with_its_registers(tmp_path):
    model = llava(tower := clip_tower())
    adapted(tower, tmp_path / "adapter")
    phreg.load(tmp_path / "adapter", into=model)
    model.save_pretrained(tmp_path / "saved")
    loaded = phreg.load(tmp_path / "saved")
    assert type(loaded) is type(model)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tower_in_half_precision_is_known_as_the_same_base(dtype, tmp_path):
    model = llava(tower := clip_tower()).to(dtype)
    adapted(tower, tmp_path / "adapter")
    phreg.load(tmp_path / "adapter", into=model)
    registers = model.model.vision_tower.registers.tokens
    assert registers.dtype == dtype
    assert torch.equal(registers, tower.registers.tokens.to(dtype))


def depth_model(name, tower):
    stages = {"out_features": ["stage1", "stage2", "stage3"], "reshape_hidden_states": False}
    backbone = hf.Dinov2Config(**DINOV2, **stages)
    shape = {"backbone_config": backbone, "neck_hidden_sizes": [8, 8, 8], "fusion_hidden_size": 8}
    if name == "dpt":
        config = hf.DPTConfig(**shape, is_hybrid=False, reassemble_factors=[2, 1, 0.5], neck_ignore_stages=[])
        model = hf.DPTForDepthEstimation(config)
    else:
        config = hf.DepthAnythingConfig(
            **shape,
            reassemble_hidden_size=32,
            patch_size=8,
            reassemble_factors=[2, 1, 0.5],
            head_hidden_size=4,
        )
        model = hf.DepthAnythingForDepthEstimation(config)
    model.backbone.load_state_dict(tower.state_dict(), strict=False)
    return model.eval()


@pytest.mark.parametrize("name", ["dpt", "depth-anything"])
def test_an_adapter_goes_into_the_backbone_of_a_depth_model(name, tmp_path):
    tower = families_transformers.FAMILIES["dinov2"]()
    model = depth_model(name, tower)
    before = model(IMAGES).predicted_depth
    adapted(tower, tmp_path / "adapter")
    phreg.load(tmp_path / "adapter", into=model)
    assert model(IMAGES).predicted_depth.shape == before.shape
    assert torch.equal(model.backbone.registers.tokens, tower.registers.tokens)
    assert torch.equal(model.backbone.encoder.layer[2].mlp.fc1.weight, tower.encoder.layer[2].mlp.fc1.weight)


def detector(tower):
    """A transformers detector around timm's feature extractor, which has neither head nor last norm."""
    backbone = hf.TimmBackboneConfig(backbone="test_vit", out_indices=[-1], use_pretrained_backbone=False)
    sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}
    small = {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in sizes.items()}
    config = hf.DetrConfig(backbone_config=backbone, d_model=16, num_queries=3, **small)
    model = hf.DetrForObjectDetection(config).eval()
    model.model.backbone.model.model.load_state_dict(tower.state_dict(), strict=False)
    return model


def test_an_adapter_goes_into_the_timm_backbone_of_a_detector_and_tells_what_it_left_out(tmp_path, caplog):
    tower = timm.create_model("test_vit").eval()
    model = detector(tower)
    pixels = torch.randn(1, 3, 160, 160)
    before = model(pixels)
    patched = adapted(tower, tmp_path / "adapter").model
    phreg.load(tmp_path / "adapter", into=model)
    after = model(pixels)
    assert after.pred_boxes.shape == before.pred_boxes.shape
    assert not torch.equal(after.pred_boxes, before.pred_boxes)
    inside = model.model.backbone.model.model
    assert torch.equal(inside.reg_token, patched.reg_token)
    assert torch.equal(inside.blocks[2].mlp.fc1.weight, patched.blocks[2].mlp.fc1.weight)
    assert "left out: norm.weight" in caplog.text


def test_a_detector_patched_inside_refuses_to_save_itself_without_its_registers(tmp_path):
    tower = timm.create_model("test_vit").eval()
    model = detector(tower)
    adapted(tower, tmp_path / "adapter")
    phreg.load(tmp_path / "adapter", into=model)
    with pytest.raises(PhregError, match=r"save_pretrained asked of DetrForObjectDetection.*into=model"):
        model.save_pretrained(tmp_path / "saved")
    phreg.remove_registers(model.model.backbone.model.model)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").is_file()


@pytest.mark.parametrize("whole", [True, False])
def test_an_open_clip_adapter_goes_into_the_tower_alone_too(whole, tmp_path):
    base, other = families_open_clip.clip(), families_open_clip.clip()
    patched = adapted(base, tmp_path / "adapter")
    phreg.load(tmp_path / "adapter", into=other if whole else other.visual)
    assert torch.equal(other.visual(IMAGES), patched.model.visual(IMAGES))


def test_of_several_towers_the_one_that_the_adapter_was_made_for_is_patched(tmp_path):
    class Two(nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second

    right, wrong = families_timm.FAMILIES["vit"](), families_timm.FAMILIES["clip"]()
    adapted(families_timm.FAMILIES["vit"](), tmp_path / "adapter")
    phreg.load(tmp_path / "adapter", into=Two(wrong, right))
    assert right.reg_token.shape[1] == 3
    assert wrong.reg_token is None
    with pytest.raises(LoadError, match="fits 2 vision towers; give the tower itself"):
        phreg.load(
            tmp_path / "adapter", into=Two(families_timm.FAMILIES["vit"](), families_timm.FAMILIES["vit"]())
        )


def test_a_tower_of_other_weights_is_refused_and_left_as_it_was(tmp_path):
    model = llava(tower := clip_tower())
    adapted(tower, tmp_path / "adapter")
    model.model.vision_tower.embeddings.class_embedding[0] += 1e-3
    before = state_of(model)
    with pytest.raises(LoadError, match=r"whose vision tower.* has another architecture or other weights"):
        phreg.load(tmp_path / "adapter", into=model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_around_no_tower_and_a_wrapped_model_are_refused(adapter):
    with pytest.raises(UnsupportedModelError, match="cannot add registers to Sequential"):
        phreg.load(adapter[0], into=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModelError, match=r"model\.module"):
        phreg.load(adapter[0], into=nn.DataParallel(timm.create_model("test_vit")))


def test_only_an_adapter_goes_into_a_model_at_hand(tmp_path, tiny):
    phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), tmp_path / "out", format="timm")
    with pytest.raises(LoadError, match=r"it is a whole model \(timm\); only an adapter goes into"):
        phreg.load(tmp_path / "out", into=tiny())


def test_a_model_at_hand_stays_on_its_device_unless_told(adapter, saved):
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).to(torch.float32)
    assert phreg.load(adapter[0], into=model, device="meta").pos_embed.device.type == "meta"


# -- bad input -----------------------------------------------------------------------------------------------


def tampered(folder, **changes):
    """Changes what phreg.json says, and takes out the sums that would tell of it."""
    path = folder / "phreg.json"
    record = {key: value for key, value in json.loads(path.read_text()).items() if key not in SUMS}
    path.write_text(json.dumps(record | changes))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"format_version": 3}, "version 3; this phreg.*reads versions 1 to 2: upgrade phreg"),
        ({"format_version": 0}, "version 0; .*copy or fetch it again"),
        ({"format_version": "1"}, "version '1'"),
        ({"format_version": True}, "version True"),
        ({"format": "phreg-next"}, "found format 'phreg-next'.*upgrade phreg"),
        ({"registers": -1}, "not whole .*registers"),
        ({"registers": "many"}, "not whole .*registers"),
        ({"input_size": [32]}, "not whole .*input_size"),
        ({"base": {"source": "x"}}, "not whole .*base"),
        ({"tower": {"prefix": 3, "sha256": {}}}, "not whole .*tower"),
        ({"registers": 5}, "does not fit.*reg_token.*shape"),
    ],
)
def test_a_description_that_is_wrong_is_one_clear_error(changes, found, adapter, saved):
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    before = state_of(model)
    tampered(adapter[0], **changes)
    with pytest.raises(LoadError, match=found):
        phreg.load(adapter[0], into=model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"format": "phreg-adapter"', "\\xff"])
def test_a_broken_description_is_one_clear_error(content, adapter):
    (adapter[0] / "phreg.json").write_text(content)
    with pytest.raises(LoadError, match=r"phreg\.json cannot be read"):
        phreg.load(adapter[0])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda tensors: tensors["reg_token"].fill_(float("inf")), "NaN or infinite values in .*reg_token"),
        (
            lambda tensors: tensors.update(reg_token=tensors["reg_token"].double()),
            "reg_token is of torch.float64",
        ),
        (lambda tensors: tensors.update(reg_token=tensors["reg_token"].int()), "reg_token is of torch.int32"),
        (lambda tensors: tensors.update(reg_token=tensors["reg_token"][:, :2].clone()), "reg_token.*shape"),
        (lambda tensors: tensors.pop("reg_token"), "lacks .*reg_token"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "name .*extra.*lacks"),
    ],
)
def test_tampered_tensors_are_one_clear_error_and_change_nothing(change, found, adapter, saved):
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    before, file = state_of(model), adapter[0] / "adapter.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    tampered(adapter[0])
    with pytest.raises(LoadError, match=found):
        phreg.load(adapter[0], into=model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.bin"])
def test_a_pickle_in_place_of_safetensors_is_never_read(name, adapter, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "trace"),))

    (adapter[0] / "adapter.safetensors").unlink()
    torch.save({"reg_token": Bomb()}, adapter[0] / name)
    with pytest.raises(LoadError, match="pickle"):
        phreg.load(adapter[0])
    assert not (tmp_path / "trace").exists()


def test_a_pickle_in_an_export_is_never_read(tmp_path):
    phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), tmp_path / "out", format="timm")
    torch.save(load_file(tmp_path / "out" / "model.safetensors"), tmp_path / "out" / "pytorch_model.bin")
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(LoadError, match=r"has no \.safetensors file"):
        phreg.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"format_version": 3}, "version 3; this phreg"),
        ({"format": "hologram"}, "export of the format 'hologram'; phreg loads back .*timm, transformers"),
    ],
)
def test_an_export_of_another_version_or_format_is_refused(changes, found, tmp_path):
    phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), tmp_path / "out", format="timm")
    record = tmp_path / "out" / "phreg_export.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))
    with pytest.raises(LoadError, match=found):
        phreg.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "found"), [(1.0, "was changed since"), (float("nan"), "was changed since")]
)
def test_an_export_whose_weights_were_changed_is_refused(value, found, tmp_path):
    phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), tmp_path / "out", format="timm")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["reg_token"][0, 0, 0] = value
    save_file(tensors, file)
    with pytest.raises(LoadError, match=found):
        phreg.load(tmp_path / "out")


def test_a_model_saved_whole_with_values_that_are_none_is_refused(tmp_path):
    phreg.add_registers(families_transformers.FAMILIES["dinov2"](), 3).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "phreg.safetensors"
    tensors = load_file(file)
    tensors["layernorm.bias"][0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(LoadError, match=r"NaN or infinite values in .*layernorm\.bias"):
        phreg.load(tmp_path / "saved")


@pytest.mark.parametrize("name", ["logging", "pipeline", "__name__", "PreTrainedConfig", "NoSuchModel"])
def test_a_description_cannot_name_just_anything_of_transformers_as_its_class(name, tmp_path):
    phreg.add_registers(families_transformers.FAMILIES["dinov2"](), 3).save_pretrained(tmp_path / "saved")
    tampered(tmp_path / "saved", **{"class": name})
    with pytest.raises(LoadError, match="cannot be loaded"):
        phreg.load(tmp_path / "saved")


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "sub/part.safetensors", "..", "", 3]
)
def test_an_index_cannot_name_files_elsewhere(shard, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(LoadError, match="no file beside it"):
        phreg.inspect(folder, IMAGES)


@pytest.mark.parametrize("name", ["adapter.safetensors", "phreg.json"])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(name, adapter, tmp_path):
    shutil.move(adapter[0] / name, tmp_path / "elsewhere")
    (adapter[0] / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LoadError, match=rf"{name} is a link to .*elsewhere, outside of it"):
        phreg.load(adapter[0])


def test_a_base_of_another_revision_is_refused_by_its_hash_and_the_right_one_is_found_again(
    hub, saved, tmp_path
):
    right = hub.commit("me/vit", saved)
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    patched = adapted(model, tmp_path / "adapter", "me/vit", right).model
    tensors = load_file(saved / "model.safetensors")
    save_file(
        tensors | {"norm.bias": tensors["norm.bias"] + 1, "cls_token": tensors["cls_token"] + 1},
        saved / "model.safetensors",
    )
    newer = hub.commit("me/vit", saved)
    assert torch.equal(phreg.load(tmp_path / "adapter")(IMAGES), patched(IMAGES))
    other = timm.create_model(f"local-dir:{saved}", pretrained=True)
    with pytest.raises(LoadError, match=rf"load it onto that base \(revision {right}\)"):
        phreg.load(tmp_path / "adapter", into=other)
    base = json.loads((tmp_path / "adapter" / "phreg.json").read_text())["base"]
    tampered(tmp_path / "adapter", base=base | {"revision": newer})
    with pytest.raises(LoadError, match="sha256"):
        phreg.load(tmp_path / "adapter")


def test_a_base_that_is_gone_says_how_to_go_on(adapter, saved):
    shutil.rmtree(saved)
    with pytest.raises(LoadError, match=r"base of the adapter .* cannot be opened.*into=model"):
        phreg.load(adapter[0])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_s_tower_is_known_again_without_what_stands_around_it(family):
    backbone = adapt(families.FAMILIES[family]())
    base = Base("its base", "timm", None, "")
    record = RunRecord(
        format="phreg-adapter", model_class="", base=base, tower=describe_tower(backbone), registers=3
    )
    assert fit(record, backbone) == "tower"
    alone = backbone.vision_tower()
    assert fit(record, alone) == "tower"
    with torch.no_grad():
        alone.model.get_parameter(alone.roles()["block.0"][0]).add_(1)
    assert fit(record, backbone) is None


def test_towers_are_known_apart_from_what_stands_around_them():
    plain, headed = (
        adapt(families_transformers.FAMILIES[name]()) for name in ("dinov2", "dinov2-classifier")
    )
    headed.vision_tower().model.load_state_dict(plain.model.state_dict())
    assert replace(describe_tower(headed), prefix="") == describe_tower(plain)
    assert describe_tower(headed).prefix == "dinov2."


# -- where there are no values -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["context", "default device"])
@pytest.mark.parametrize(
    "kind", ["base", "demo", "adapter", "test-time adapter", "merged", "saved whole", "timm"]
)
def test_loading_on_the_meta_device_is_refused_with_what_works_there(kind, how, saved, tmp_path):
    source = {"base": saved, "demo": "demo"}.get(kind, tmp_path / "whole")
    if kind == "timm":
        phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), source, format="timm")
    elif kind not in ("base", "demo"):
        saved_as(kind, source, saved)
    torch.set_default_device("meta" if how == "default device" else None)
    try:
        for read in [open_model, *([phreg.load] if kind not in ("base", "demo") else [])]:
            with torch.device("meta"), pytest.raises(LoadError, match=r"torch\.device\('meta'\).*outside"):
                read(source)
        with torch.device("meta"):  # the advice
            phreg.add_registers(timm.create_model("test_vit"), 2)
    finally:
        torch.set_default_device(None)


def test_an_adapter_goes_into_no_model_on_the_meta_device_s_context(adapter, saved):
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    before = state_of(model)
    with torch.device("meta"), pytest.raises(LoadError, match="outside of that context"):
        phreg.load(adapter[0], into=model)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


# -- damage --------------------------------------------------------------------------------------------------


def saved_as(kind, folder, saved):
    """Writes a patched model in one of phreg's own formats."""
    model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
    match kind:
        case "adapter":
            adapted(model, folder, str(saved))
        case "test-time adapter":
            backbone, base = resolve.load(saved)
            before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
            test_time.install(backbone, {1: [(5, 1), (9, -1)]}, 2, (32, 32))
            tower = describe_tower(adapt(timm.create_model(f"local-dir:{saved}", pretrained=True)))
            save_adapter(folder, backbone, base, before, None, lambda _: "# card", tower=tower)
        case "merged":
            phreg.export(phreg.add_registers(families_timm.FAMILIES["vit"](), 3), folder, format="merged")
        case "saved whole":
            phreg.add_registers(families_transformers.FAMILIES["dinov2"](), 3).save_pretrained(folder)
    return folder


def all_that_it_is(folder):
    """Loads a folder and tells everything that decides what its model computes."""
    backbone, _ = open_model(folder)
    features = backbone(IMAGES)
    return features.patches, features.pooled, backbone.spec, backbone.trained_readout, backbone.num_registers


KINDS = {
    "adapter": ("adapter.safetensors", "phreg.json", "README.md"),
    "test-time adapter": ("adapter.safetensors", "phreg.json"),
    "merged": ("phreg.safetensors", "phreg.json"),
    "saved whole": ("phreg.safetensors", "phreg.json"),
}
FLIPS = 25


@pytest.mark.parametrize(("kind", "file"), [(kind, file) for kind in KINDS for file in KINDS[kind]])
def test_a_damaged_byte_is_refused_or_does_no_harm(kind, file, saved, tmp_path):
    folder = saved_as(kind, tmp_path / "whole", saved)
    expected = all_that_it_is(folder)
    whole = (folder / file).read_bytes()
    refused = 0
    for seed in range(FLIPS):
        draw = random.Random(f"{kind} {file} {seed}")
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
        (folder / file).write_bytes(damaged)
        try:
            found = all_that_it_is(folder)
        except PhregError:
            refused += 1
            continue
        assert all(map(torch.equal, found[:2], expected[:2])), f"seed {seed}"
        assert found[2:] == expected[2:], f"seed {seed}"
    # A byte of weights always matters; a byte of what is told to people, or of a space between, never does.
    if file.endswith(".safetensors"):
        assert refused == FLIPS
    if file == "README.md":
        assert refused == 0


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_weights_are_named_as_damage_and_the_model_at_hand_stays_as_it_was(kind, saved, tmp_path):
    folder = saved_as(kind, tmp_path / "whole", saved)
    file = folder / KINDS[kind][0]
    content = bytearray(file.read_bytes())
    content[-4] ^= 1  # the last bit of a number: as finite as before
    file.write_bytes(content)
    with pytest.raises(
        LoadError, match=r"sha256 \w{12}…, and \w{12}… were written; they were damaged or changed"
    ):
        phreg.load(folder)
    if kind == "adapter":
        model = timm.create_model(f"local-dir:{saved}", pretrained=True).eval()
        before = state_of(model)
        with pytest.raises(LoadError, match="damaged or changed"):
            phreg.load(folder, into=model)
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_phreg_wrote_loads_with_a_warning(kind, saved, tmp_path, caplog):
    folder = saved_as(kind, tmp_path / "whole", saved)
    expected = all_that_it_is(folder)
    assert "no sha256" not in caplog.text
    tampered(folder)
    found = all_that_it_is(folder)
    assert all(map(torch.equal, found[:2], expected[:2]))
    assert caplog.text.count("whole has no sha256 of its tensors and settings") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"test_time": {"1": [[6, 1], [9, -1]]}},
        {"readout": "naclip"},
        {"input_size": [40, 32]},
        {"registers": 1},
    ],
)
def test_a_setting_that_decides_what_the_model_computes_cannot_change_unnoticed(change, saved, tmp_path):
    folder = saved_as("test-time adapter", tmp_path / "whole", saved)
    path = folder / "phreg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(LoadError, match="damaged or changed since"):
        phreg.load(folder)


def test_where_the_base_lies_now_may_be_written_into_the_record(saved, tmp_path):
    folder = saved_as("adapter", tmp_path / "whole", saved)
    expected = all_that_it_is(folder)
    moved = saved.rename(tmp_path / "moved")
    path = folder / "phreg.json"
    path.write_text(path.read_text().replace(str(saved), str(moved)))
    assert torch.equal(all_that_it_is(folder)[0], expected[0])


@pytest.mark.parametrize("depth", [150, 900, 990, 100_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_record_nested_without_end_is_one_clear_error(kind, depth, saved, tmp_path):
    folder = saved_as(kind, tmp_path / "whole", saved)
    path = folder / "phreg.json"
    nested = "[" * depth + "]" * depth
    for text in (nested, path.read_text()[:-1].rstrip("}\n") + f', "more": {nested}}}'):
        path.write_text(text)
        for read in (phreg.load, phreg.info):
            with pytest.raises(LoadError, match=r"phreg\.json"):
                read(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"embed_dim": 64}, r"of another architecture than this VisionTransformer: its \S+ has shape"),
        ({"depth": 2}, r"of another architecture than this VisionTransformer: it lacks blocks\.2"),
    ],
)
def test_an_adapter_of_another_architecture_is_refused_in_words(tiny, tmp_path, changes, said):
    adapted(tiny(), tmp_path / "adapter")
    with pytest.raises(LoadError, match=said) as refused:
        phreg.load(tmp_path / "adapter", into=tiny(**changes))
    assert "sha256" not in str(refused.value)


def test_an_adapter_of_another_class_is_refused_by_the_names_of_both(tiny, tmp_path):
    adapted(tiny(), tmp_path / "adapter")
    with pytest.raises(LoadError, match="a VisionTransformer; the model is a CLIPVisionModel") as refused:
        phreg.load(tmp_path / "adapter", into=clip_tower())
    assert "sha256" not in str(refused.value)
