"""Patched models compiled, quantised, pickled: what is made of a model still has its registers."""

import pickle

import families_open_clip
import families_timm
import families_transformers
import jaxtyping
import pytest
import torch
from torch import nn

import phreg
from phreg.backbones.resolve import adapt

COUNT = 3
PICTURES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


BUILDERS = {
    "transformers": families_transformers.FAMILIES["vit-classifier"],
    "timm": families_timm.FAMILIES["vit"],
    "open_clip": families_open_clip.FAMILIES["tower"],
}


def patched(library):
    return phreg.add_registers(BUILDERS[library](), COUNT)


def scores(model):
    answer = model(PICTURES)
    return answer if torch.is_tensor(answer) else answer.logits


@pytest.mark.slow
@pytest.mark.parametrize("library", BUILDERS)
@torch.no_grad()
def test_generated_code_gives_what_the_model_gives_and_follows_its_registers(library, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    torch.compiler.reset()
    model = patched(library)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        # Generated kernels sum in another order than torch's own, over three blocks.
        assert torch.allclose(scores(compiled), scores(model), rtol=1e-4, atol=1e-5)
        before = scores(model)
        adapt(model).registers.neg_()
        assert not torch.allclose(scores(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("library", BUILDERS)
@torch.no_grad()
def test_an_exported_program_holds_the_registers_when_saved_and_loaded(library, tmp_path):
    model = patched(library)
    torch.export.save(torch.export.export(model, (PICTURES,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    held = [tensor for name, tensor in program.state_dict.items() if "reg" in name]
    assert any(torch.equal(tensor, adapt(model).registers) for tensor in held)
    assert torch.allclose(scores(program.module()), scores(model), rtol=1e-5, atol=1e-6)  # the same kernels


# torch points to torchao, another package; what it deprecates is what people have in place.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
@pytest.mark.parametrize("library", ["transformers", "timm"])
@torch.no_grad()
def test_int8_linears_leave_registers_in_place_and_scores_close(library):
    model = patched(library)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not [layer for layer in quantised.modules() if type(layer) is nn.Linear]
    assert [layer for layer in model.modules() if type(layer) is nn.Linear]
    # 255 steps a layer, over three blocks. Other registers move scores by more, as the last line asks.
    error = (scores(quantised) - scores(model)).norm() / scores(model).norm()
    assert error < 0.1
    registers = adapt(quantised).registers
    assert registers.dtype == torch.float32
    before = scores(quantised)
    registers.neg_()
    assert (scores(quantised) - before).norm() / before.norm() > 2 * error


@pytest.mark.parametrize(
    "build",
    [
        families_transformers.FAMILIES["vit-classifier"],
        families_transformers.FAMILIES["clip"],
        families_timm.FAMILIES["vit"],
        families_timm.FAMILIES["eva02"],
        families_timm.FAMILIES["naflexvit"],
    ],
    ids=["vit-classifier", "clip", "timm-vit", "timm-eva", "timm-naflex"],
)
@torch.no_grad()
def test_a_pickled_model_comes_back_with_registers_of_its_own(build):
    model = phreg.add_registers(build(), COUNT)
    twin = pickle.loads(pickle.dumps(model))
    backbone, original = adapt(twin), adapt(model)
    pictures = torch.randn(2, 3, *original.spec.input_size, generator=torch.Generator().manual_seed(0))
    before = original.run(pictures)
    assert torch.equal(backbone.run(pictures), before)
    backbone.registers.neg_()
    assert not torch.equal(backbone.run(pictures), before)
    assert torch.equal(original.run(pictures), before)
    phreg.remove_registers(twin)
    assert torch.equal(adapt(twin).run(pictures), adapt(build()).run(pictures))
