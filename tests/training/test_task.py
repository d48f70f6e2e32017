"""A task's loss, probe and read-outs, against what its student and teacher say themselves."""

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES

from phreg.backbones.base import Features
from phreg.backbones.resolve import adapt
from phreg.config import TargetConfig, ViewsConfig
from phreg.registers import add_registers
from phreg.seeding import keyed_generator as generator
from phreg.teacher import Teacher
from phreg.training.losses import Cosine, LossTerm, SquaredError
from phreg.training.task import RetrofitTask

BEFORE_NORM = TargetConfig(layer=1, norm=False)


def task_of(student, terms=(), target=BEFORE_NORM, **views):
    teacher = Teacher(adapt(student.model), ViewsConfig(**({"count": 1} | views)), target)
    return RetrofitTask(student, teacher, terms, target)


def images(side=32):
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


class Recorder(LossTerm):
    """A term that notes what it is given, and whether it captures."""

    def __init__(self, name):
        super().__init__(1.0)
        self.name, self.captures = name, 0

    def __call__(self, outputs):
        self.outputs = outputs
        return torch.zeros(())

    @contextmanager
    def capture(self):
        self.captures += 1
        yield
        self.captures -= 1

    def warnings(self):
        return [f"{self.name} fails", f"{self.name} is silent"]


def test_the_loss_is_of_the_features_of_a_layer_within_the_context(tiny):
    student = add_registers(adapt(tiny()), 2)
    wide = images(48)
    features = student(wide[..., 8:40, 4:44], 1, norm=False)
    target = Features(torch.ones_like(features.patches), torch.ones_like(features.pooled))
    task = task_of(student, [Cosine(3.0), SquaredError(0.5)])
    total, terms = task.loss(student, wide, target, (8, 4))
    cosine = 1 - torch.cosine_similarity(features.patches, target.patches, dim=-1).mean()
    squared = (features.patches - target.patches).square().mean()
    assert terms.keys() == {"cosine", "mse"}
    torch.testing.assert_close(terms["cosine"], cosine)
    torch.testing.assert_close(terms["mse"], squared)
    torch.testing.assert_close(total, 3 * cosine + 0.5 * squared)


def test_without_a_margin_images_are_seen_and_taught_whole(tiny):
    student = adapt(tiny())
    task = task_of(student, [seen := Recorder("seen")])
    target = task.target(images(), generator(0))
    expected = student(images(), 1, norm=False)
    torch.testing.assert_close(target.patches, expected.patches)  # one view is the model itself
    task.loss(student, images(), target)
    assert torch.equal(seen.outputs.images, images())
    torch.testing.assert_close(seen.outputs.student.patches, expected.patches)
    assert seen.outputs.target is target


def test_the_target_is_the_teachers_of_the_images_with_their_context(tiny):
    task = task_of(adapt(tiny()), count=4, max_shift=0.25, fill="context")
    target = task.target(images(48), generator(3), (8, 8))
    expected = task.teacher(images(48), generator(3), (8, 8))
    assert torch.equal(target.patches, expected.patches)
    assert not torch.equal(target.patches, task.target(images(48), generator(4), (8, 8)).patches)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_is_the_loss_of_a_blank_image_against_ones(tiny, dtype):
    student = adapt(tiny().to(dtype))
    size = (32, 24)  # in pixels, of 8 each a patch
    student.model.set_input_size(size)
    blank = student(torch.zeros(1, 3, *size, dtype=dtype), 1, norm=False)
    expected = 1 - torch.cosine_similarity(
        blank.patches.float(), torch.ones_like(blank.patches).float(), dim=-1
    )
    probe = task_of(student, [Cosine(2.0)]).probe(size)
    torch.testing.assert_close(probe, 2 * expected.mean())
    probe.backward()
    assert student.model.patch_embed.proj.bias.grad.any()


def test_while_a_task_runs_both_models_are_read_as_asked_and_all_terms_capture():
    family = FAMILIES["open_clip/clip"]
    student = add_registers(adapt(family()), 1)
    teacher = adapt(family())
    target = TargetConfig(teacher_readout="naclip", student_readout="value-only")
    terms = [Recorder("one"), Recorder("two")]
    task = RetrofitTask(student, Teacher(teacher, ViewsConfig(count=1), target), terms, target)
    for _ in range(2):
        with task.running():
            assert (teacher.readout, student.readout) == ("naclip", "value-only")
            assert [term.captures for term in terms] == [1, 1]
        assert (teacher.readout, student.readout) == ("plain", "plain")
        assert [term.captures for term in terms] == [0, 0]


def test_warnings_are_those_of_all_terms_in_their_order(tiny):
    task = task_of(adapt(tiny()), [Recorder("one"), Recorder("two")])
    assert task.warnings() == ["one fails", "one is silent", "two fails", "two is silent"]
