"""The default method on real models: small, never worse than the original, and the same after loading.

The runs are short and the images small, so they show what cannot happen, not what the method gains
(benchmarks/methods).
"""

import logging

import pytest
import torch

import phreg
from phreg.backbones.resolve import adapt

pytestmark = [pytest.mark.real, pytest.mark.slow]

SHORT = {
    "size": 112,
    "data": {"limit": 40, "workers": 0},
    "measure": {"images": 8, "views": 8, "every": 5},
    "views": {"count": 4},
    "sinks": {"images": 16},
    "steps": 15,
    "batch_size": 8,
    "device": "cpu",
    "force": True,
}
MODELS = ("dinov2-small", "deit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k")


def distil(real_data, name, output, **settings):
    folder = real_data / "models" / name
    return folder, phreg.distill(folder, real_data / "imagenet_samples", output, **SHORT | settings)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_trains_a_tenth_of_the_weights_and_its_adapter_is_an_eighth_of_the_file(
    name, real_data, tmp_path
):
    unmeasured = {"measure": {"images": 0}, "steps": 2}
    folder, result = distil(real_data, name, tmp_path / "run", **unmeasured)
    total = sum(parameter.numel() for parameter in result.model.parameters())
    assert result.outcome.trained <= 0.1 * total
    (adapter,) = (tmp_path / "run" / "model").glob("*.safetensors")
    assert adapter.stat().st_size <= 0.12 * (folder / "model.safetensors").stat().st_size
    loaded = phreg.load(tmp_path / "run")
    expected = adapt(result.model).disk_state()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in adapt(loaded).disk_state().items())


@pytest.mark.parametrize(("name", "lr"), [(MODELS[0], 1e-5), *((name, 1.0) for name in MODELS)])
def test_a_forced_run_never_hands_out_less_than_the_original(name, lr, real_data, tmp_path):
    _, result = distil(real_data, name, tmp_path / "run", optim={"lr": lr, "final_lr": lr / 50})
    if not result.unchanged:
        before, after = result.comparison.agreement
        assert after.mean > before.mean
        assert result.comparison.drift.mean >= 0.95


def test_the_papers_recipe_says_after_ten_steps_that_it_wrecks_a_dinov2(real_data, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    distil(real_data, "dinov2-small", tmp_path / "run", method="paper", steps=10)
    assert "after 10 steps the model agrees less with its own moved views" in caplog.text
