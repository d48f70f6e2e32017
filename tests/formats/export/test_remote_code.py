"""Remote code: a folder that transformers loads by itself, registers inside, where there is no phreg."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers as hf
from families_transformers import FAMILIES, TEXT, VISION, build
from huggingface_hub.errors import StrictDataclassError

from phreg.backbones import resolve
from phreg.backbones.transformers_registers import without_refusal
from phreg.errors import PhregError
from phreg.formats.export import export, remote_code
from phreg.registers import add_registers, remove_registers

COUNT = 3
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums in another order; a missing register changes the first digit."""


@pytest.fixture(autouse=True)
def _modules_of_their_own(tmp_path, monkeypatch):
    """transformers copies code that it runs into its cache; here, into that of the test."""
    cache = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def patched(builder):
    backbone, base = resolve.load(builder())
    return add_registers(backbone, COUNT), base


def exported(name, folder):
    """Exports a family, and returns its backbone."""
    backbone, base = patched(FAMILIES[name])
    export(backbone, folder, "remote-code", base=base)
    return backbone


def llava():
    """A tiny language model that sees."""
    text = hf.LlamaConfig(**{key: TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")})
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 1, 4, 4
    text.bos_token_id, text.eos_token_id = 0, 1
    vision = hf.CLIPVisionConfig(**VISION)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
    return build(hf.LlavaForConditionalGeneration, config)


def pictures(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


WITHOUT_PHREG = """
import sys
sys.modules["phreg"] = None  # importing it fails
import torch, transformers
from safetensors.torch import load_file, save_file
folder, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    output = model(**load_file(folder + "/inputs.safetensors"))
output = {name: value for name, value in output.items() if torch.is_tensor(value)}
save_file(output, folder + "/outputs.safetensors")
assert not [name for name in sys.modules if name.startswith("phreg.")]
"""


@pytest.mark.parametrize(
    ("family", "auto"),
    [
        ("vit-classifier", "AutoModelForImageClassification"),
        pytest.param("clip-vision", "AutoModel", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_it_loads_where_phreg_is_not_installed(family, auto, tmp_path):
    from safetensors.torch import load_file, save_file

    backbone = exported(family, tmp_path / "out")
    save_file({"pixel_values": pictures()}, tmp_path / "out" / "inputs.safetensors")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSTARTUP")
    }
    subprocess.run(
        [sys.executable, "-c", WITHOUT_PHREG, str(tmp_path / "out"), auto],
        check=True,
        cwd=tmp_path,
        env=environment | {"HF_MODULES_CACHE": str(tmp_path / "elsewhere")},
        capture_output=True,
    )
    found = load_file(tmp_path / "out" / "outputs.safetensors")
    expected = backbone.model(pictures())
    assert found
    assert all(torch.allclose(value, expected[name], **ROUNDING) for name, value in found.items())


@pytest.mark.parametrize("family", ["clip", "siglip", "aimv2"])
@torch.no_grad()
def test_full_models_give_features_of_images_and_text(family, tmp_path):
    backbone = exported(family, tmp_path / "out")
    again = hf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    words, mask = torch.tensor([[0, 5, 6, 1]]), torch.ones(1, 4, dtype=torch.long)
    model = backbone.model
    for found, expected in (
        (again.get_image_features(pictures()), model.get_image_features(pictures())),
        (again.get_text_features(words, attention_mask=mask), model.get_text_features(words, mask)),
    ):
        for name in ("pooler_output", "last_hidden_state"):
            # Weights that a file was mapped into lie differently in memory, and kernels round accordingly.
            assert torch.allclose(found[name], expected[name], **ROUNDING)


@torch.no_grad()
def test_a_language_model_that_sees_generates_what_the_patched_one_does(tmp_path):
    backbone, base = patched(llava)
    export(backbone, tmp_path / "out", "remote-code", base=base)
    again = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert isinstance(again, hf.LlavaForConditionalGeneration)
    words = torch.tensor([[0, *[3] * 16, 5]])
    arguments = {"pixel_values": pictures()[:1], "max_new_tokens": 6, "do_sample": False}
    expected = backbone.model.generate(words, **arguments)
    assert torch.equal(again.generate(words, **arguments), expected)
    seen = {"input_ids": words, "pixel_values": pictures()[:1]}
    logits = backbone.model(**seen).logits
    assert torch.equal(again(**seen).logits, logits)
    assert not torch.equal(remove_registers(backbone.model)(**seen).logits, logits)


@pytest.mark.parametrize("family", ["clip", "vit-classifier"])
@torch.no_grad()
def test_saved_and_loaded_again_it_keeps_registers_and_code(family, tmp_path):
    backbone = exported(family, tmp_path / "out")
    auto = hf.AutoModel if family == "clip" else hf.AutoModelForImageClassification
    once = auto.from_pretrained(tmp_path / "out", trust_remote_code=True)
    once.get_submodule(f"{backbone.tower_name}.registers").tokens.fill_(2)
    once.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "modeling_registers.py").is_file()
    before, after = (
        json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "again")
    )
    for key in ("auto_map", "model_type", "num_registers", "architectures"):
        assert after[key] == before[key]
    twice = auto.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(
        twice.get_submodule(f"{backbone.tower_name}.registers").tokens, torch.full((1, COUNT, 32), 2.0)
    )
    state = once.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in twice.state_dict().items())


@torch.no_grad()
def test_outputs_are_shaped_as_ever_at_any_size_in_bf16_and_in_a_copy(tmp_path):
    backbone = exported("clip-vision", tmp_path / "out")
    options = {"trust_remote_code": True, "device_map": "cpu", "dtype": torch.bfloat16}
    model = hf.AutoModel.from_pretrained(tmp_path / "out", **options).eval()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    images = pictures(40, 24).bfloat16()
    asked = {"interpolate_pos_encoding": True, "output_hidden_states": True}
    backbone.model.bfloat16()
    expected, found = backbone.model(images, **asked), copy.deepcopy(model)(images, **asked)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert {state.shape for state in found.hidden_states} == {(2, 1 + 5 * 3, 32)}


def test_its_registers_learn_and_gradients_reach_hidden_states(tmp_path):
    exported("vit-classifier", tmp_path / "out")
    auto = hf.AutoModelForImageClassification
    model = auto.from_pretrained(tmp_path / "out", trust_remote_code=True).train()
    output = model(pictures(), labels=torch.tensor([0, 1]), output_hidden_states=True)
    for state in output.hidden_states:
        state.retain_grad()
    output.loss.backward()
    assert model.vit.registers.tokens.grad.abs().max() > 0
    assert all(state.grad.any() for state in output.hidden_states)


def test_a_model_of_its_config_alone_has_registers_each_another(tmp_path):
    exported("vit", tmp_path / "out")
    config = hf.AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config.num_registers = 5
    tokens = hf.AutoModel.from_config(config, trust_remote_code=True).registers.tokens
    assert tokens.shape == (1, 5, 32)
    assert torch.pdist(tokens[0]).min() > 0


@torch.no_grad()
def test_phreg_knows_the_loaded_model_and_its_registers(tmp_path):
    exported("siglip-vision", tmp_path / "out")
    model = hf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    backbone = resolve.adapt(model)
    before = backbone.run(pictures())
    assert backbone.num_registers == COUNT
    backbone.remove_registers()
    assert not torch.equal(backbone.run(pictures()), before)


def test_without_trust_no_auto_class_loads_it(tmp_path):
    exported("clip-vision", tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        hf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_the_stock_class_refuses_it_and_what_is_saved_of_it(tmp_path):
    exported("clip", tmp_path / "out")
    model = hf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        for stock in (hf.CLIPModel, hf.CLIPVisionModel, hf.CLIPVisionModelWithProjection):
            with pytest.raises(StrictDataclassError, match="registers, which take trust_remote_code=True"):
                stock.from_pretrained(tmp_path / folder)


def test_told_another_config_the_stock_class_says_that_it_leaves_registers_out(tmp_path):
    exported("clip-vision", tmp_path / "out")
    told = {"config": hf.CLIPVisionConfig(**VISION), "output_loading_info": True}
    _, found = hf.CLIPVisionModel.from_pretrained(tmp_path / "out", **told)
    assert set(found["unexpected_keys"]) == {"registers.tokens"}


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith("backbone")])
def test_no_stock_config_takes_that_of_a_folder(family):
    backbone, _ = patched(FAMILIES[family])
    config = remote_code.contents(backbone).settings["config.json"]
    for stock in {type(backbone.model.config), type(backbone.tower.config)}:
        own = config if type(backbone.model.config) is stock else config["vision_config"]
        with pytest.raises(StrictDataclassError, match="registers, which take trust_remote_code=True"):
            stock.from_dict(own)
        stock.from_dict(without_refusal(own))


@torch.no_grad()
def test_a_pooler_that_the_checkpoint_lacks_is_not_made_up(tmp_path):
    whole = FAMILIES["vit"]()
    whole.pooler = None
    backbone, base = patched(lambda: whole)
    export(backbone, tmp_path / "out", "remote-code", base=base)
    again = hf.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert again(pictures()).pooler_output is None


@pytest.mark.parametrize("family", ["vit", "clip", "siglip-vision", "siglip2", "dinov3"])
def test_images_are_prepared_for_the_models_own_size(family, tmp_path):
    backbone = exported(family, tmp_path / "out")
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    picture = torch.zeros(3, 50, 80, dtype=torch.uint8)
    prepared = processor(picture, return_tensors="pt")["pixel_values"]
    assert prepared.shape[1:] == ((16, 192) if family == "siglip2" else (3, 32, 32))
    mean, std = backbone.spec.mean[0], backbone.spec.std[0]
    assert torch.allclose(prepared.flatten()[0], torch.tensor(-mean / std))  # float rounding


def test_the_code_says_where_it_comes_from_and_is_short(tmp_path):
    exported("clip", tmp_path / "out")
    code = (tmp_path / "out" / "modeling_registers.py").read_text()
    assert "Written by phreg" in code
    assert "Apache-2.0" in code
    assert "import phreg" not in code
    assert "from phreg" not in code
    assert len(code.splitlines()) < 400


@pytest.mark.parametrize("family", ["dinov2-backbone", "dinov3-backbone"])
def test_a_backbone_class_is_refused(family, tmp_path):
    backbone, base = patched(FAMILIES[family])
    with pytest.raises(PhregError, match="AutoBackbone takes no code"):
        export(backbone, tmp_path / "out", "remote-code", base=base)


def test_a_model_without_registers_is_sent_to_its_own_way_of_saving(tmp_path):
    backbone, base = resolve.load(FAMILIES["vit"]())
    with pytest.raises(PhregError, match="save_pretrained writes all of it"):
        export(backbone, tmp_path / "out", "remote-code", base=base)
