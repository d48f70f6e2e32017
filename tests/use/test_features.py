"""Feature maps as each library gives them: the grid of the patches, and never a register among them."""

import pytest
import timm
import torch
import transformers as hf
from families_timm import FAMILIES as TIMM
from families_transformers import TINY

import phreg
from phreg.backbones.resolve import adapt
from phreg.testing import registers_masked

COUNT = 3
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums over longer rows, with zeros; a visible register changes the first digits."""


def pictures(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["vit", "siglip", "vit-native-rows"])
@torch.no_grad()
def test_timms_intermediate_layers_are_patches_and_its_prefix_has_the_registers(family):
    model, asked = TIMM[family](), {"n": [0, 2], "reshape": True, "norm": True}
    num_prefix = model.num_prefix_tokens
    before = model.get_intermediate_layers(pictures(), **asked)
    backbone = adapt(phreg.add_registers(model, COUNT))
    seen = model.get_intermediate_layers(pictures(), return_prefix_tokens=True, **asked)
    with registers_masked(backbone, pictures()):
        masked = model.get_intermediate_layers(pictures(), **asked)
    for maps, (seen_maps, prefix), masked_maps in zip(before, seen, masked, strict=True):
        assert seen_maps.shape == maps.shape == (2, 32, 4, 4)
        assert prefix.shape == (2, num_prefix + COUNT, 32)
        assert not torch.allclose(seen_maps, maps, **ROUNDING)
        assert torch.allclose(masked_maps, maps, **ROUNDING)


@torch.no_grad()
def test_timms_features_only_wrapper_gives_what_it_gave_once_registers_are_masked():
    wrapper = timm.create_model("test_vit", features_only=True, out_indices=[0, 1]).eval()
    before = wrapper(pictures(160))
    with registers_masked(adapt(phreg.add_registers(wrapper.model, COUNT)), pictures(160)):
        masked = wrapper(pictures(160))
    for found, expected in zip(masked, before, strict=True):
        assert torch.allclose(found, expected, **ROUNDING)


@pytest.mark.parametrize("config", [hf.Dinov2Config, hf.DINOv3ViTConfig])
@torch.no_grad()
def test_an_auto_backbone_gives_the_stages_asked_for_before_and_after(config):
    sizes = TINY | ({"intermediate_size": 64} if config is hf.DINOv3ViTConfig else {})
    model = hf.AutoBackbone.from_config(config(**sizes, out_features=["stage1", "stage3"])).eval()
    before = model(pictures()).feature_maps
    backbone = adapt(phreg.add_registers(model, COUNT))
    seen = model(pictures()).feature_maps
    with registers_masked(backbone, pictures()):
        masked = model(pictures()).feature_maps
    assert [maps.shape for maps in seen] == [maps.shape for maps in before] == [(2, 32, 4, 4)] * 2
    assert all(torch.allclose(maps, was, **ROUNDING) for maps, was in zip(masked, before, strict=True))
    model.out_features = ["stage2", "stage3"]
    second, third = model(pictures()).feature_maps
    assert second.shape == third.shape
    assert torch.equal(third, seen[1])
    assert not torch.equal(second, seen[0])
