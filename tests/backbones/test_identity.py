"""A model's identity changes with all that decides what it computes, and with nothing else."""

import copy
import json
import shutil
from dataclasses import replace

import families_open_clip
import families_transformers
import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from torch import nn

from phreg.backbones.identity import identify
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import adapt, load
from phreg.sinks import test_time


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_a_model_is_the_same_when_it_has_run_was_copied_or_is_built_again(family):
    backbone = adapt(FAMILIES[family]())
    before = identify(backbone)
    backbone(torch.randn(1, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0)))
    assert identify(backbone) == before
    assert identify(adapt(copy.deepcopy(backbone.model))) == before
    again = adapt(FAMILIES[family]())
    again.model.load_state_dict(backbone.model.state_dict())  # CoCa's are not all set when it is built
    assert identify(again) == before


def tower(backbone):
    return backbone.model.visual


def hook(backbone, by):
    backbone.blocks[0].register_forward_hook(lambda _module, _args, output: output * by)


CHANGES = {
    "nothing": lambda backbone: None,
    "a unit moved": lambda backbone: test_time.install(backbone, {1: [(0, 1)]}),
    "another unit moved": lambda backbone: test_time.install(backbone, {1: [(1, 1)]}),
    "that unit's sign": lambda backbone: test_time.install(backbone, {1: [(1, -1)]}),
    "two blocks' units moved": lambda backbone: test_time.install(backbone, {0: [(0, 1)], 1: [(0, 1)]}),
    "registers alone": lambda backbone: backbone.insert_registers(torch.zeros(1, 32)),
    "a hook": lambda backbone: hook(backbone, 2.0),
    "another number in that hook": lambda backbone: hook(backbone, 3.0),
    "mean": lambda backbone: vars(backbone).update(spec=replace(backbone.spec, mean=(0.1, 0.2, 0.3))),
    "read-out": lambda backbone: set_readout(backbone, "value-only"),
    "read-out it was trained with": lambda backbone: setattr(backbone, "trained_readout", "value-only"),
    "activation": lambda backbone: setattr(backbone.blocks[0].mlp, "gelu", nn.ReLU()),
    "pooling": lambda backbone: setattr(tower(backbone), "pool_type", "avg"),
    "heads": lambda backbone: setattr(backbone.blocks[0].attn, "num_heads", 2),
    "a weight": lambda backbone: tower(backbone).ln_post.bias.data[0].add_(1e-6),
}
"""Changes of a tiny CLIP, no two of which leave the same model."""


def test_whatever_changes_what_a_model_computes_makes_it_another():
    found = {}
    for name, change in CHANGES.items():
        backbone = adapt(families_open_clip.clip())
        change(backbone)
        found[name] = identify(backbone)
    whole = {name: identity.whole for name, identity in found.items()}
    assert len(set(whole.values())) == len(CHANGES), sorted(whole.items(), key=lambda item: item[1])
    assert found["a unit moved"].weights == found["another unit moved"].weights, "no tensor tells"


def test_a_folder_is_known_by_what_it_says_and_not_by_where_it_lies(tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    cfg = {"embed_dim": 16, "vision_cfg": families_open_clip.VISION, "text_cfg": families_open_clip.TEXT}
    config = {"model_cfg": cfg, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (one / "open_clip_config.json").write_text(json.dumps(config))
    save_file(families_open_clip.clip().state_dict(), one / "open_clip_model.safetensors")
    first = identify(load(one)[0])
    for name, changed in {
        "copy": config,
        "quick": config | {"model_cfg": cfg | {"quick_gelu": True}},
        "std": config | {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}},
    }.items():
        folder = shutil.copytree(one, tmp_path / name)
        (folder / "open_clip_config.json").write_text(json.dumps(changed))
        found = identify(load(folder)[0])
        assert found.weights == first.weights
        assert (found == first) == (name == "copy"), name


def test_a_folder_of_transformers_may_be_moved_too(tmp_path):
    families_transformers.FAMILIES["dinov2"]().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert identify(load(tmp_path / "one")[0]) == identify(load(tmp_path / "two")[0])
