"""Frozen weights in bf16: the same steps to the bit, and results that are made of the original weights."""

import pytest
import torch
from families import LIBRARIES
from safetensors.torch import load_file
from short_runs import SHORT, logged, weights
from torch import nn

import phreg
from phreg import api
from phreg.backbones.resolve import adapt
from phreg.config import DistillConfig, UnlockConfig
from phreg.errors import PhregError
from phreg.rollback import ModelState
from phreg.training.checkpoint import RunFolder
from phreg.training.frozen import frozen_matrices, frozen_weights
from phreg.training.runtime import start_accelerator
from phreg.training.trainable import unlock

LORA = {"lora": {"rank": 2, "blocks": "all"}}
MODELS = {
    "timm vit": lambda: LIBRARIES["timm"]["vit"](),
    "timm eva": lambda: LIBRARIES["timm"]["eva02"](),
    "transformers dinov2": lambda: LIBRARIES["transformers"]["dinov2"](),
    "transformers clip": lambda: LIBRARIES["transformers"]["clip"](),
    "open_clip clip": lambda: LIBRARIES["open_clip"]["clip"](),
}

RUN = SHORT | {
    "precision": "bf16",
    "unlock": LORA,
    "optim": {"lr": 1e-2, "trust_region": False},
    "checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0},
}


@pytest.mark.parametrize("unlocked", [LORA, {"roles": ["block.-1"]}], ids=("lora", "blocks"))
@pytest.mark.parametrize("name", MODELS)
def test_a_run_has_the_same_losses_and_weights_to_the_bit(name, unlocked, photos, tmp_path):
    settings = RUN | {"unlock": unlocked}
    usual = api.distill(MODELS[name](), photos, tmp_path / "usual", **settings)
    half = api.distill(MODELS[name](), photos, tmp_path / "half", frozen_dtype="bf16", **settings)
    for one, other in zip(logged(tmp_path / "usual"), logged(tmp_path / "half"), strict=True):
        assert (one["loss"], one["terms"]) == (other["loss"], other["terms"])
    assert {one.dtype for one in half.model.parameters()} == {torch.float32}
    expected = weights(usual.model)
    for one, value in weights(half.model).items():
        assert torch.equal(value, expected[one]), one


def test_checkpointing_and_parts_of_a_batch_go_together_with_rounded_weights(tiny, photos, tmp_path):
    usual = api.distill(tiny(), photos, tmp_path / "usual", **RUN)
    less = {"frozen_dtype": "bf16", "checkpoint_activations": True}
    half = api.distill(tiny(), photos, tmp_path / "half", **RUN | less)
    expected = weights(usual.model)
    assert all(torch.equal(one, expected[name]) for name, one in weights(half.model).items())
    parts = RUN["optim"] | {"micro_batch": 2}
    api.distill(tiny(), photos, tmp_path / "parts", **RUN | less | {"optim": parts})
    first, second = logged(tmp_path / "usual")[0], logged(tmp_path / "parts")[0]
    assert second["micro_batch"] == 2
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_a_run_that_was_killed_goes_on_with_rounded_weights_to_the_same_bits(tiny, photos, tmp_path):
    settings = RUN | {"frozen_dtype": "bf16", "steps": 4, "checkpoint_every": 2}
    whole = api.distill(tiny(), photos, tmp_path / "whole", **settings)

    def kill(record, _steps):
        if record.step == 3:
            raise KeyboardInterrupt

    model = tiny()
    before = weights(model)
    with pytest.raises(KeyboardInterrupt):
        api.distill(model, photos, tmp_path / "killed", observe=kill, **settings)
    assert all(torch.equal(one, before[name]) for name, one in weights(model).items())
    resumed = api.distill(model, photos, tmp_path / "killed", resume=True, **settings)
    expected = weights(whole.model)
    assert all(torch.equal(one, expected[name]) for name, one in weights(resumed.model).items())


def test_results_are_made_of_the_original_weights_and_the_factors_alone(saved, photos, tmp_path):
    original = load_file(saved / "model.safetensors")
    settings = RUN | {"unlock": LORA | {"roles": []}, "frozen_dtype": "bf16"}
    api.distill(saved, photos, tmp_path / "run", **settings)
    adapter = load_file(tmp_path / "run" / "model" / "adapter.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    phreg.export(tmp_path / "run", tmp_path / "merged", format="timm")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    rounds = 0
    for name in original.keys() - {"cls_token", "pos_embed"}:  # which make room for the registers
        expected = original[name]
        if f"{name}.lora_A" in adapter:
            product = adapter[f"{name}.lora_B"].double() @ adapter[f"{name}.lora_A"].double()
            expected = (expected.double() + product).float()
            rounds += not torch.equal(original[name].bfloat16().float(), original[name])
        assert torch.equal(merged[name], expected), name
    assert rounds == 12, "four matrices in each of three blocks, which bf16 would change"


@pytest.mark.parametrize("name", MODELS)
def test_student_and_teacher_share_rounded_weights_and_have_the_same_memory_back(name):
    student = adapt(MODELS[name]())
    original = ModelState(student).frozen_twin()
    unlock(student, UnlockConfig.model_validate({"roles": ()} | LORA))
    tensors = [*student.named_parameters(), *original.named_parameters()]
    before = [(one, tensor, tensor.data_ptr(), tensor.detach().clone()) for one, tensor in tensors]
    frozen = {tensor.data_ptr() for tensor in frozen_matrices(student)}
    assert frozen
    with frozen_weights("bf16", student, original):
        for _, tensor, place, value in before:
            wanted = torch.bfloat16 if place in frozen else torch.float32
            assert tensor.dtype == wanted
            assert torch.equal(tensor, value.to(wanted))
        halves = [tensor for _, tensor, place, _ in before if place in frozen]
        assert len({tensor.data_ptr() for tensor in halves}) == len(frozen) == len(halves) / 2
        assert not any(tensor.requires_grad for tensor in halves)
    for one, tensor, place, value in before:
        assert tensor.dtype == torch.float32, one
        assert torch.equal(tensor, value), one
        assert tensor.data_ptr() == place, f"{one}: on a CPU the original is put back, not a copy"


def test_weights_are_put_back_when_training_fails(tiny):
    student = adapt(tiny()).requires_grad_(False)
    before = weights(student)

    def failing():
        with frozen_weights("bf16", student):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        failing()
    assert all(torch.equal(one, before[name]) for name, one in weights(student).items())


def test_fused_attention_and_all_but_linear_layers_stay_in_fp32():
    student = adapt(LIBRARIES["open_clip"]["clip"]()).requires_grad_(False)
    fused = [module for block in student.blocks for module in block.modules()]
    fused = [module for module in fused if isinstance(module, nn.MultiheadAttention)]
    assert fused
    with frozen_weights("bf16", student):
        assert all(one.dtype == torch.float32 for module in fused for one in module.parameters())
        halves = [name for name, one in student.named_parameters() if one.dtype == torch.bfloat16]
    assert len(halves) == 2 * len(student.blocks), "the two layers of each MLP"


def test_a_run_that_measures_and_keeps_the_best_state_does_so_with_rounded_weights(tiny, photos, tmp_path):
    measure = {"images": 4, "views": 4, "every": 1, "keep_best": True}
    settings = RUN | {"measure": measure, "optim": {"trust_region": True}, "frozen_dtype": "bf16"}
    result = api.distill(tiny(), photos, tmp_path / "run", **settings)
    assert all("held_out" in line for line in logged(tmp_path / "run"))
    assert {one.dtype for one in result.model.parameters()} == {torch.float32}


def test_without_bf16_products_rounded_weights_are_refused(tmp_path):
    settings = {"frozen_dtype": "bf16", "precision": "fp32", "device": "cpu"}
    with pytest.raises(PhregError, match=r"frozen_dtype = bf16 .* precision is fp32; use --precision bf16"):
        start_accelerator(DistillConfig.model_validate(settings), RunFolder(tmp_path))
