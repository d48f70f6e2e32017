"""A patched transformers model is loaded as it was constructed and saved, or refused as it is saved."""

import inspect
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from families_transformers import FAMILIES, build
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import phreg
from phreg.backbones.resolve import adapt
from phreg.backbones.transformers import CONSTRUCTED
from phreg.errors import PhregError
from phreg.testing.instruments import native_outputs

TOLD: dict[str, list[Any]] = {
    "image_size": [48],
    "num_hidden_layers": [4],
    "hidden_act": ["relu", "quick_gelu"],
    "layer_norm_eps": [1e-3],
    "rms_norm_eps": [1e-3],
    "qkv_bias": [False],
    "query_bias": [False],
    "key_bias": [True],
    "layerscale_value": [0.3],
    "use_mask_token": [False],
    "use_swiglu_ffn": [True],
    "vision_use_head": [False],
    "use_head": [False],
    "pooler_act": ["relu"],
    "pooler_output_size": [16],
    "mask_ratio": [0.5],
    "num_register_tokens": [1, 3],
    "apply_layernorm": [False],
    "reshape_hidden_states": [False],
    "num_patches": [9],
    "num_labels": [3],
    "attention_dropout": [0.1],
}
"""Fields of configs, and values that are not the default nor what the tiny models have."""


def change_config(model: nn.Module, changes: dict[str, Any]) -> Any:
    """Copies a model's config with fields changed, in its vision part where that has them."""
    told = model.config.to_dict()
    vision = told.get("vision_config", told)
    for name, value in changes.items():
        (vision if name in vision else told)[name] = value
    return type(model.config).from_dict(told)


@st.composite
def constructions(draw: st.DrawFn, name: str) -> tuple[nn.Module, int]:
    """Draws a model of a family, built in some way, and a number of registers."""
    model = FAMILIES[name]()
    vision = model.config.to_dict()
    vision = vision | vision.get("vision_config", {})
    known = sorted(TOLD.keys() & (vision.keys() | {"num_labels"}))
    if name.endswith("-backbone") and "image_size" in known:
        known.remove("num_hidden_layers")  # its stages are named by number
    chosen = draw(st.lists(st.sampled_from(known), max_size=4, unique=True))
    config = change_config(model, {field: draw(st.sampled_from(TOLD[field])) for field in chosen})
    taken = [field for field in CONSTRUCTED if field in inspect.signature(type(model).__init__).parameters]
    arguments = {field: draw(st.booleans()) for field in taken}
    return build(partial(type(model), **arguments), config), draw(st.integers(1, 4))


def outputs(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a user of its library sees of it."""
    backbone = adapt(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=generator).to(backbone.dtype)
    return native_outputs(backbone, images)


def trained(model: nn.Module, count: int) -> nn.Module:
    """Adds registers and changes what training changes."""
    phreg.add_registers(model, count)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_a_model_comes_back_as_it_was_constructed_patched_and_saved(name, data):
    model, count = data.draw(constructions(name))
    expected = outputs(trained(model, count))
    way = data.draw(st.sampled_from(["save_pretrained", "merged", "save_pretrained twice"]))
    with TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            if way == "merged":
                phreg.export(model, out, format="merged")
            else:
                model.save_pretrained(out)
        except PhregError:
            assert not out.exists(), "what is refused is refused before anything is written"
            return
        loaded = phreg.load(out)
        if way == "save_pretrained twice":
            loaded.save_pretrained(Path(folder) / "again")
            loaded = phreg.load(Path(folder) / "again")
    assert type(loaded) is type(model)
    assert adapt(loaded).num_registers == count
    assert adapt(loaded).spec == adapt(model).spec
    found, state = loaded.state_dict(), model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    again = outputs(loaded)
    assert again.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(again[key], expected[key])] == []


def test_the_settings_that_are_drawn_reach_the_models():
    reached = {}
    for name in FAMILIES:
        told = FAMILIES[name]().config.to_dict()
        reached |= dict.fromkeys((told | told.get("vision_config", {})).keys() & TOLD.keys(), name)
    assert reached.keys() | {"num_labels"} == TOLD.keys()
