"""Depth models on a DINOv2 with registers: DPT and Depth Anything, patched whole."""

import pytest
import torch
import transformers as hf
from families_transformers import TINY, build
from torch import nn

import phreg
from phreg.backbones.resolve import adapt
from phreg.testing import registers_masked

PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WIDE_PICTURES = torch.randn(2, 3, 24, 48, generator=torch.Generator().manual_seed(1))
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums over longer rows, with zeros; a visible register changes the first digits."""


@pytest.fixture(params=["dpt", "depth-anything"])
def model(request):
    """A depth model that takes tokens of three blocks, CLS among them."""
    stages = {"out_features": ["stage1", "stage2", "stage3"], "reshape_hidden_states": False}
    shape = {
        "backbone_config": hf.Dinov2Config(**TINY, mlp_ratio=2, **stages),
        "neck_hidden_sizes": [8, 8, 8],
        "fusion_hidden_size": 8,
        "reassemble_factors": [2, 1, 0.5],
    }
    if request.param == "dpt":
        config = hf.DPTConfig(**shape, is_hybrid=False, neck_ignore_stages=[])
        model = build(hf.DPTForDepthEstimation, config)
    else:
        more = {"reassemble_hidden_size": 32, "patch_size": 8, "head_hidden_size": 4}
        model = build(hf.DepthAnythingForDepthEstimation, hf.DepthAnythingConfig(**shape, **more))
    for layer in model.head.modules():
        if isinstance(layer, nn.Conv2d):
            # That of a random network hardly depends on the picture, and what is below zero is cut off.
            layer.weight.data.mul_(10)
            layer.bias.data.fill_(1)
    return model


@pytest.mark.parametrize("pictures", [PICTURES, WIDE_PICTURES], ids=["own size", "another size"])
@torch.no_grad()
def test_depth_is_what_it_was_once_registers_are_masked(model, pictures):
    before = model(pictures).predicted_depth
    backbone = adapt(phreg.add_registers(model, 3))
    seen = model(pictures).predicted_depth
    with registers_masked(backbone, pictures):
        masked = model(pictures).predicted_depth
    assert seen.shape == before.shape
    assert not torch.allclose(seen, before, **ROUNDING)
    assert torch.allclose(masked, before, **ROUNDING)


def test_depth_is_learned_saved_and_loaded_with_its_registers(model, tmp_path):
    phreg.add_registers(model, 3)
    registers = adapt(model).registers
    before = registers.detach().clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        loss = (model(PICTURES).predicted_depth - PICTURES.mean(1).exp()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert registers.grad.abs().sum(-1).min() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(registers, before)
    model.save_pretrained(tmp_path)
    loaded = phreg.load(tmp_path)
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(PICTURES).predicted_depth, model(PICTURES).predicted_depth)
