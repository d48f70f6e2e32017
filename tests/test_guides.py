"""The Python of the guides in docs/ is run, block after block, on tiny random models."""

import functools
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import timm
import torch
import transformers
from families_timm import FAMILIES as TIMM
from families_transformers import FAMILIES, VISION, build

import phreg
from phreg.backbones.resolve import adapt

DOCS = Path(__file__).parents[1] / "docs"
REGISTERS = 4
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
QUICK = {
    "steps": 2, "batch_size": 2, "registers": REGISTERS, "force": True, "device": "cpu",
    "data": {"workers": 0},
    "views": {"count": 3}, "measure": {"images": 2, "views": 3, "keep_best": False},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings(
    "ignore:Could not find a config file in:UserWarning",  # PEFT looks for a vocabulary
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT uses it
)


def blocks(page):
    """The Python blocks of a page, in order."""
    return re.findall(
        r"^```python\n(.*?)^```", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def run(page, **names):
    """Runs the blocks of a page in one namespace, and returns it."""
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def here(tmp_path, photos, monkeypatch):
    """A folder with photographs, and runs that end soon."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(phreg, "distill", functools.partial(phreg.distill, **QUICK))


def clip_tower():
    return build(transformers.CLIPVisionModel, transformers.CLIPVisionConfig(**VISION))


@pytest.fixture
def llava(monkeypatch):
    """A tiny LLaVA around a tower that an adapter in runs/clip-reg was made for."""
    language = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    text = transformers.LlamaConfig(**language, num_attention_heads=2, num_key_value_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_id=60
    )
    config.image_seq_length = 16
    model = build(transformers.LlavaForConditionalGeneration, config)
    model.model.vision_tower.load_state_dict(clip_tower().state_dict())
    monkeypatch.setattr(transformers.LlavaForConditionalGeneration, "from_pretrained", lambda _: model)
    return model


def test_a_vision_language_model_takes_the_adapter_of_its_tower_and_trains_its_own(llava):
    read = llava.get_image_features(pixel_values=IMAGES[:1])
    phreg.distill(clip_tower(), "photos", "runs/clip-reg", target={"layer": -2, "norm": False})
    first, second = blocks("vlm.md")
    names = {"phreg": phreg, "transformers": transformers}
    exec(first, names)
    assert adapt(llava).num_registers == REGISTERS
    again = llava.get_image_features(pixel_values=IMAGES[:1])
    sizes = [[tuple(part.shape) for part in side.pooler_output] for side in (read, again)]
    assert sizes[0] == sizes[1], "as many image tokens as before"
    llava.save_pretrained("llava-reg")
    loaded = phreg.load("llava-reg")
    assert type(loaded) is type(llava)
    assert adapt(loaded).num_registers == REGISTERS
    with pytest.raises(ValueError, match="Unrecognized model"):
        transformers.AutoModel.from_pretrained("llava-reg")
    phreg.remove_registers(llava)
    exec(second, names)
    assert adapt(llava).num_registers == REGISTERS
    assert names["result"].model is llava.model.vision_tower


def test_a_head_inside_a_model_keeps_its_shape(monkeypatch):
    tiny = TIMM["vit"]()
    tiny.reset_classifier(10)
    monkeypatch.setattr(timm, "create_model", lambda name, num_classes: tiny)
    names = run("heads.md", phreg=phreg, timm=timm, images=IMAGES)
    assert names["scores"].shape == (2, 10)
    assert names["model"].num_prefix_tokens == 1 + REGISTERS


def test_peft_and_lightly_train_take_a_patched_model():
    phreg.add_registers(FAMILIES["vit-classifier"](), REGISTERS).save_pretrained("runs/vit-reg")
    phreg.export(phreg.add_registers(TIMM["vit"](), REGISTERS), "runs/timm-reg", format="timm")
    given = []
    stand_in = SimpleNamespace(
        pretrain=lambda *, out, data, model, method: given.append((model, out, data, method))
    )
    names = run("finetune.md", phreg=phreg, peft=peft, lightly_train=stand_in)
    assert adapt(names["model"]).num_registers == REGISTERS
    trained = [name for name, weight in names["tuned"].named_parameters() if weight.requires_grad]
    assert any("registers" in name for name in trained)
    assert any("lora_A" in name for name in trained)
    assert isinstance(given[0][0], timm.models.VisionTransformer)
    assert given[0][0].num_prefix_tokens == 1 + REGISTERS, "which LightlyTrain leaves out"


def test_grids_of_two_libraries_serve_anomaly_detection_and_upsampling(monkeypatch):
    def anyup(images, features):
        assert images.shape[1] == 3
        return torch.nn.functional.interpolate(features, size=images.shape[-2:])

    monkeypatch.setattr(torch.hub, "load", lambda repository, name: anyup)
    timm_model = phreg.add_registers(TIMM["vit"](), REGISTERS)
    hf_model = phreg.add_registers(FAMILIES["dinov2"](), REGISTERS)
    assert timm_model.patch_embed.num_patches == (32 // timm_model.patch_embed.patch_size[0]) ** 2
    names = run("dense.md", torch=torch, timm_model=timm_model, hf_model=hf_model, images=IMAGES, good=IMAGES)
    tokens = timm_model.forward_features(IMAGES)[:, 1 + REGISTERS :]
    expected = tokens.unflatten(1, names["grid"].shape[-2:]).permute(0, 3, 1, 2)
    torch.testing.assert_close(names["grid"], expected)
    assert names["hf_grid"].shape[0] == 2
    assert names["oddness"].abs().max() < 1e-5, "what is in the memory is not odd"
    assert names["score"].shape == (2,)
    assert names["enlarged"].shape == (2, names["grid"].shape[1], 32, 32)


def test_the_reshape_of_the_attribution_guide_drops_all_prefix_tokens():
    model = phreg.add_registers(TIMM["vit"](), REGISTERS)
    names = {"model": model}
    exec(blocks("attribution.md")[0], names)
    tokens = model.forward_features(IMAGES)
    (grid,) = model.forward_intermediates(IMAGES, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(names["grid_of"](tokens), grid)


@pytest.mark.parametrize(
    ("block", "package", "made"), [(1, "pytorch_grad_cam", "heat"), (2, "captum", "captum_heat")]
)
@torch.enable_grad()
def test_attribution_packages_give_maps_of_the_patches(block, package, made):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    model = phreg.add_registers(TIMM["vit"](), REGISTERS)
    names = {"model": model, "images": IMAGES}
    exec(blocks("attribution.md")[0], names)
    exec(blocks("attribution.md")[block], names)
    side = (model.patch_embed.num_patches) ** 0.5
    assert names[made].shape == ((2, 32, 32) if made == "heat" else (2, side, side))
    assert abs(names[made]).max() > 0
