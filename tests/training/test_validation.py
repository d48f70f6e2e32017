"""Which state of a run is kept: figures by hand."""

import math

import families_open_clip
import pytest
import torch
from accelerate import Accelerator

from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt
from phreg.config import TargetConfig
from phreg.evaluation.before_after import HeldOut
from phreg.training.validation import PATIENCE, TURNED, BestState, Measurement, Validator, warn_wrecked

ORIGINAL = Measurement(agreement=0.9, worst_percent=0.5, pooled=1.0)


def best_state():
    weight = torch.nn.Parameter(torch.tensor([0.0]))
    return weight, BestState({"w": weight}, ORIGINAL, min_pooled=0.95)


def at(state, weight, step, agreement, pooled=1.0):
    with torch.no_grad():
        weight.fill_(float(step))
    state.update(step, Measurement(agreement, 0.0, pooled))


def test_the_state_that_agreed_best_is_restored_whatever_came_after():
    weight, state = best_state()
    for step, agreement in ((10, 0.91), (20, 0.93), (30, 0.92)):
        at(state, weight, step, agreement)
    state.restore()
    assert (state.step, weight.item(), state.agreement) == (20, 20.0, pytest.approx(0.93))


@pytest.mark.parametrize(
    ("agreement", "pooled"),
    [(0.9, 1.0), (0.89, 1.0), (0.95, 0.94), (math.nan, 1.0), (0.95, math.nan)],
    ids=["no better", "worse", "pooled output drifted", "not a number", "pooled not a number"],
)
def test_the_original_is_the_best_where_no_state_beats_it(agreement, pooled):
    weight, state = best_state()
    at(state, weight, 10, agreement, pooled)
    state.restore()
    assert state.step == 0
    assert weight.item() == 10.0, "there are no weights to put back: who asks hands out the original"


def test_training_has_turned_after_so_many_measurements_in_a_row_below_the_best():
    weight, state = best_state()
    at(state, weight, 1, 0.95)
    below = 0.95 - TURNED
    for step in range(PATIENCE - 1):
        at(state, weight, 2 + step, below - 1e-6)
    assert not state.turned
    at(state, weight, 8, below + 1e-6)
    for step in range(PATIENCE):
        assert not state.turned
        at(state, weight, 9 + step, math.nan if step else below - 1e-6)
    assert state.turned


def test_a_checkpoint_holds_figures_and_weights_of_the_best_state():
    weight, state = best_state()
    at(state, weight, 10, 0.95)
    other_weight, other = best_state()
    for name, tensor in other.tensors.items():
        tensor.copy_(state.tensors[name])
    other.restore()
    assert (other.step, other.agreement, other_weight.item()) == (10, pytest.approx(0.95), 10.0)


def test_the_validator_measures_agreement_by_the_references_and_drift_by_the_original(tiny):
    backbone = adapt(tiny())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches, pooled = backbone(images)
    opposed = patches.clone()
    opposed[0, 0, 0] *= -1  # one patch of 64
    held_out = HeldOut(list(images.split(2)), list(opposed.split(2)), "")
    validator = Validator(backbone, held_out, TargetConfig())
    assert validator.original.agreement == pytest.approx(1 - 2 / 64, abs=1e-6)
    assert validator.original.worst_percent == pytest.approx(-1)
    assert validator.original.pooled == pytest.approx(1)

    student = adapt(tiny())
    with torch.no_grad():
        student.model.norm.weight.neg_()
        student.model.norm.bias.neg_()
    turned = validator(student)
    assert turned.agreement == pytest.approx(-1 + 2 / 64, abs=1e-6)
    assert turned.pooled == pytest.approx(torch.cosine_similarity(student.run(images), pooled).mean().item())


def test_of_several_sizes_images_count_alike_and_each_is_compared_at_its_own(tiny):
    backbone = adapt(tiny())
    draw = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(count, 3, side, side, generator=draw) for count, side in ((2, 32), (1, 48), (1, 32))
    ]
    with torch.no_grad():
        references = [backbone(images).patches for images in batches]
        pooled = torch.cat([backbone.run(images) for images in batches])
    references[1][0, :3] *= -1  # half of the 36 patches of one image of four
    validator = Validator(backbone, HeldOut(batches, references, ""), TargetConfig())
    assert validator.original.agreement == pytest.approx((1 + 1 + 0 + 1) / 4, abs=1e-6)
    assert validator.original.worst_percent == pytest.approx((1 + 1 - 1 + 1) / 4, abs=1e-6)

    student = adapt(tiny())
    with torch.no_grad():
        student.model.norm.weight.mul_(torch.linspace(0.5, 2, 32))
        by_image = [
            torch.cosine_similarity(student(image[None]).patches[0], reference, dim=-1).mean()
            for images, grids in zip(batches, references, strict=True)
            for image, reference in zip(images, grids, strict=True)
        ]
        drifted = torch.cat([student.run(images) for images in batches])
    measured = validator(student)
    assert measured.agreement == pytest.approx(torch.stack(by_image).mean().item(), abs=1e-6)
    assert measured.pooled == pytest.approx(torch.cosine_similarity(drifted, pooled).mean().item(), abs=1e-6)


def test_the_pooled_output_is_read_plainly_whatever_way_patches_are_read():
    backbone = adapt(families_open_clip.FAMILIES["clip"]()).eval()
    size = backbone.spec.input_size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with use_readout(backbone, "naclip"):
            held_out = HeldOut([images], [backbone(images).patches], "itself")
        with use_readout(backbone, "value-only"):
            otherwise = backbone(images).pooled
        assert not torch.allclose(otherwise, backbone.run(images)), "it would tell"
    validator = Validator(
        backbone, held_out, TargetConfig(teacher_readout="naclip", student_readout="value-only")
    )
    measured = validator(backbone)
    assert measured.pooled == pytest.approx(1, abs=1e-6)
    assert measured.agreement < validator.original.agreement, "patches are read through values alone"


def test_a_student_that_trains_in_bf16_is_measured_in_fp32_as_the_original_is(tiny):
    backbone, images = adapt(tiny()), torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        held_out = HeldOut([images], [backbone(images).patches], "")
    validator = Validator(backbone, held_out, TargetConfig())
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.prepare_model(backbone)
    assert backbone(images).patches.sub(held_out.references[0]).abs().max() > 1e-3, "bf16 shows"
    assert validator(backbone) == validator.original == Measurement(*[pytest.approx(1, abs=1e-6)] * 3)


@pytest.mark.parametrize(("agreement", "warns"), [(0.87, True), (0.89, False), (math.nan, True)])
def test_a_run_that_damages_the_model_says_so(agreement, warns, caplog):
    warn_wrecked(10, Measurement(agreement, 0.0, 1.0), ORIGINAL)
    assert ("damaging" in caplog.text) == warns
