"""The open_clip format: plain open_clip encodes images and texts as the patched model does."""

import json
from functools import partial

import open_clip
import pytest
import timm
import torch
from families_open_clip import FAMILIES, TEXT, VISION, clip, clip_around_timm, shaken
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file
from torch import nn

from phreg.backbones import resolve
from phreg.errors import LoadError, PhregError
from phreg.formats.export import export
from phreg.registers import add_registers
from phreg.storage import EXPORT_FILE

COUNT = 3
ROUNDING = 1e-5
"""Of fp32, absolute: outputs are of order 1, and timm and open_clip call different attention kernels."""


def exported(model, folder):
    """Adds registers, exports, and returns the patched model and what plain open_clip loads."""
    backbone, base = resolve.load(model)
    add_registers(backbone, COUNT)
    export(backbone, folder, "open_clip", base=base)
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return backbone.model, stock.eval()


def text_model(quick_gelu=False, joint=None, **text):
    """A model whose text tower differs from the plain one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"vision_cfg": VISION, "text_cfg": TEXT | text, "quick_gelu": quick_gelu}
        return shaken(CustomTextCLIP(embed_dim=16, **settings, **(joint or {})))


def pictures():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def texts():
    return torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(2))


def settings(folder):
    return json.loads((folder / "open_clip_config.json").read_text())


def save(model, folder, text, tokenizer=()):
    """Saves a native CLIP as a folder of open_clip's."""
    folder.mkdir()
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT | text}
    mean = {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    described = {"model_cfg": config, "preprocess_cfg": mean}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    for name in tokenizer:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# -- the same model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["clip", "clip-quickgelu", "custom-text", "no-pre-norm", "timm", "timm-head", "siglip"]
)
def test_plain_open_clip_encodes_images_and_texts_alike(family, tmp_path):
    model, stock = exported(FAMILIES[family](), tmp_path / "out")
    assert type(stock) is type(model)
    assert torch.allclose(stock.encode_image(pictures()), model.encode_image(pictures()), atol=ROUNDING)
    assert torch.equal(stock.encode_text(texts()), model.encode_text(texts()))
    assert torch.equal(stock.logit_scale, model.logit_scale)
    grid = stock.visual.forward_intermediates(pictures())["image_intermediates"][-1]
    expected = model.visual.forward_intermediates(pictures())["image_intermediates"][-1]
    assert torch.allclose(grid, expected, atol=ROUNDING)


@pytest.mark.parametrize(
    "build",
    [
        partial(text_model, quick_gelu=True),
        partial(text_model, pool_type="eos", eos_id=7, no_causal_mask=True),
        partial(text_model, pool_type="last", proj_bias=True, norm_kwargs={"eps": 1e-6}),
        partial(text_model, embed_cls=True, pad_id=3, act_kwargs={"approximate": "tanh"}),
        partial(text_model, ls_init_value=0.5, mlp_ratio=3.0, layers=2),
        partial(text_model, joint={"init_logit_bias": -10.0, "nonscalar_logit_scale": True}),
        partial(clip, CLIP, pool_type="avg"),
        partial(clip_around_timm, pool="avg", proj="none", class_token=False, fc_norm=False),
    ],
)
def test_settings_are_read_off_the_model_itself(build, tmp_path):
    model, stock = exported(build(), tmp_path / "out")
    found, expected = stock(pictures(), texts()), model(pictures(), texts())
    assert len(found) == len(expected)
    assert all(torch.allclose(one, other, atol=ROUNDING) for one, other in zip(found, expected, strict=True))


def test_a_biased_projection_beside_the_trunk_is_kept(tmp_path):
    model = FAMILIES["timm"]()
    model.visual.head.proj = nn.Linear(64, 64)
    model, stock = exported(model, tmp_path / "out")
    assert torch.equal(stock.encode_image(pictures()), model.encode_image(pictures()))


def test_a_tower_whose_projection_was_pruned_is_kept(tmp_path):
    model = clip()
    model.visual.prune_intermediate_layers(indices=3)
    model, stock = exported(model, tmp_path / "out")
    assert torch.allclose(stock.visual(pictures()), model.visual(pictures()), atol=ROUNDING)


# -- the folder ----------------------------------------------------------------------------------------------


def test_the_image_tower_is_a_timm_folder_in_its_own_right(tmp_path):
    model, _ = exported(FAMILIES["clip"](), tmp_path / "out")
    tower = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert tower.num_reg_tokens == COUNT
    assert torch.allclose(tower(pictures()), model.encode_image(pictures()), atol=ROUNDING)


def test_the_folder_names_the_place_where_it_is(tmp_path):
    exported(FAMILIES["clip"](), tmp_path / "a folder")
    found = settings(tmp_path / "a folder")["model_cfg"]["vision_cfg"]["timm_model_name"]
    assert found == f"local-dir:{tmp_path / 'a folder'}"


def test_a_moved_folder_loads_once_its_path_is_corrected(tmp_path):
    model, _ = exported(FAMILIES["clip"](), tmp_path / "out")
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    config = moved / "open_clip_config.json"
    with pytest.raises(FileNotFoundError):
        open_clip.create_model(f"local-dir:{moved}")
    config.write_text(config.read_text().replace(str(tmp_path / "out"), str(moved)))
    stock = open_clip.create_model(f"local-dir:{moved}").eval()
    assert torch.allclose(stock.encode_image(pictures()), model.encode_image(pictures()), atol=ROUNDING)


def test_images_are_prepared_as_the_base_prepares_them(tmp_path):
    exported(save(clip(), tmp_path / "base", {}), tmp_path / "out")
    found = settings(tmp_path / "out")["preprocess_cfg"]
    assert (found["mean"], found["std"]) == ([0.1, 0.2, 0.3], [0.4] * 3)
    assert (found["interpolation"], found["resize_mode"]) == ("bilinear", "squash")


def test_a_tokenizer_beside_the_base_comes_along(tmp_path):
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    named = {"hf_tokenizer_name": "owner/words", "tokenizer_kwargs": {"clean": "canonicalize"}}
    folder = save(clip(), tmp_path / "base", named, names)
    exported(folder, tmp_path / "out")
    assert {name for name in names if (tmp_path / "out" / name).read_text() == "{}"} == set(names)
    assert named.items() <= settings(tmp_path / "out")["model_cfg"]["text_cfg"].items()


def test_a_tokenizer_on_the_hub_is_fetched(tmp_path, hub):
    words = tmp_path / "words"
    words.mkdir()
    (words / "tokenizer.json").write_text("{}")
    hub.commit("owner/words", words)
    folder = save(clip(), tmp_path / "base", {"hf_tokenizer_name": "owner/words"})
    exported(folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_tokenizer_that_cannot_be_had_leaves_nothing_behind(tmp_path, hub):
    folder = save(clip(), tmp_path / "base", {"hf_tokenizer_name": "owner/nothing"})
    with pytest.raises(LoadError, match="owner/nothing"):
        exported(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_nobody_names_is_missed_aloud(tmp_path, caplog):
    exported(FAMILIES["clip"](), tmp_path / "out")
    assert "tokenizer of CLIP" in caplog.text


def test_clips_own_tokenizer_needs_no_file(tmp_path, caplog):
    model = text_model(vocab_size=49408, context_length=77)
    exported(model, tmp_path / "out")
    assert not caplog.text
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")("a cat")
    assert tokens.shape == (1, 77)


def test_image_weights_are_shared_by_both_files_and_none_is_lost(tmp_path):
    exported(FAMILIES["clip"](), tmp_path / "out")
    whole = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    image = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(whole["visual.trunk.reg_token"], image["reg_token"])
    assert torch.equal(whole["visual.head.proj.weight"], image["head.weight"])
    assert json.loads((tmp_path / "out" / EXPORT_FILE).read_text())["format"] == "open_clip"


# -- refusals ------------------------------------------------------------------------------------------------


def another_text_tower():
    model = FAMILIES["custom-text"]()
    model.text.__class__ = type("HFTextEncoder", (nn.Module,), {})
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (FAMILIES["tower"], "an image tower alone; give the whole model.*exported as timm"),
        (FAMILIES["coca"], "writes captions"),
        (partial(text_model, qk_norm=True), "text tower has blocks whose settings cannot be read"),
        (another_text_tower, "text tower is a HFTextEncoder"),
        (partial(clip, qk_norm=True), "CustomResidualAttentionBlock, which timm does not have"),
        (partial(clip, pool_type="none"), "does not pool"),
        (partial(clip, norm_kwargs={"eps": 1e-3}), "norms add 0.001"),
    ],
)
def test_what_open_clip_cannot_hold_is_refused(build, reason, tmp_path):
    with pytest.raises(PhregError, match=reason):
        exported(build(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
