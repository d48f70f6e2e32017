"""Training takes the steps of a plain loop written out here: targets, loss, gradients, optimizer, average.

The pictures have the model's own size, so that no crop is drawn. A batch holds all of them, so that their
order does not matter. With one view the target is the original's own output. All that is left is arithmetic.
"""

import json
import math
import os
import signal
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from phreg.backbones.resolve import adapt
from phreg.config import DistillConfig
from phreg.data.crops import Crops
from phreg.data.sources import open_images
from phreg.errors import Interrupted, TrainingError
from phreg.registers import add_registers
from phreg.sinks.relocation import Relocation
from phreg.teacher import Teacher
from phreg.training.checkpoint import RunFolder
from phreg.training.loop import train
from phreg.training.losses import RelocationTerm, distillation_terms
from phreg.training.runtime import start_accelerator
from phreg.training.task import RetrofitTask

COUNT = 4
LR, DECAY, STEPS = 0.5, 0.1, 3


@pytest.fixture
def pictures(tmp_path):
    """Pictures of 32x32 pixels, as arrays and as a folder."""
    arrays = np.random.default_rng(0).integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number}.png")
    return arrays, folder


@pytest.fixture
def distilled(tiny, pictures, tmp_path):
    """Trains a tiny model with two registers, and returns it, its outcome and its log."""

    sgd = {"name": "sgd", "lr": LR, "schedule": "constant", "momentum": 0.0, "weight_decay": 0.0}

    def build(observe=lambda *_: None, relocation=None, **settings):
        run = RunFolder(tmp_path / "run")
        run.path.mkdir(exist_ok=True)
        config = DistillConfig.model_validate(
            {
                "device": "cpu",
                "precision": "fp32",
                "steps": STEPS,
                "batch_size": COUNT,
                "views": {"count": 1},
                "target": {"cache": False},
                "unlock": {"roles": ("pos_embed",)},
                "data": {"workers": 0},
            }
            | settings
            | {"optim": sgd | settings.get("optim", {})}
        )
        student = displaced(tiny)
        teacher = Teacher(adapt(tiny()).requires_grad_(False), config.views, config.target)
        images = Crops(open_images(pictures[1]), 32, config.seed, "random")
        accelerator = start_accelerator(config, run)
        terms = distillation_terms(config.loss)
        if relocation is not None:
            terms.append(RelocationTerm(config.loss.relocation, relocation))
        task = RetrofitTask(student, teacher, terms, config.target)
        outcome = train(task, images, config, run, accelerator, observe)
        return student, outcome, [json.loads(line) for line in run.log.read_text().splitlines()]

    return build


def displaced(tiny):
    """A tiny model with two registers, far enough from the original that there is something to learn."""
    student = add_registers(adapt(tiny()), 2)
    with torch.no_grad():
        shape, generator = student.model.pos_embed.shape, torch.Generator().manual_seed(1)
        student.model.pos_embed.add_(torch.randn(shape, generator=generator))
    return student


def plain_loop(
    tiny, arrays, steps=STEPS, lr=lambda _step: LR, decay=0.0, clip=None, momentum=0.0, pooled=1.0
):
    """The same steps, written out: weights after each (the start first), losses, and gradient norms."""
    student, teacher = displaced(tiny), adapt(tiny())
    pixels = torch.tensor(arrays).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (teacher.spec.mean, teacher.spec.std))
    pixels = (pixels - mean) / std
    with torch.no_grad():
        target = teacher(pixels)
    weights = {"registers": student.registers, "pos_embed": student.model.pos_embed}
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    history, losses, norms = [snapshot(student)], [], []
    for step in range(steps):
        made = student(pixels)
        cosines = [
            1 - torch.cosine_similarity(one, other, dim=-1).mean()
            for one, other in zip(made, target, strict=True)
        ]
        squares = [((one - other) ** 2).mean() for one, other in zip(made, target, strict=True)]
        loss = cosines[0] + squares[0]
        loss = loss + pooled * (cosines[1] + squares[1] / (target.pooled**2).mean())
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        for name, weight in weights.items():
            share = 1.0 if clip is None else min(1.0, clip / norm)
            velocity[name] = momentum * velocity[name] + share * gradients[name] + decay * weight.detach()
            with torch.no_grad():
                weight -= lr(step) * velocity[name]
        history.append(snapshot(student))
        losses.append(loss.item())
        norms.append(norm)
    return history, losses, norms


def snapshot(backbone):
    parts = {"registers": backbone.registers, "pos_embed": backbone.model.pos_embed}
    return {name: part.detach().clone() for name, part in parts.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        # Sums in another order: a few units in the last place of values around 1, over a few steps.
        torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-5)


def test_training_takes_the_steps_of_the_plain_loop(tiny, pictures, distilled):
    history, losses, _ = plain_loop(tiny, pictures[0])
    student, outcome, log = distilled()
    assert_same(snapshot(student), history[-1])
    assert not torch.allclose(history[-1]["registers"], history[0]["registers"], atol=1e-3), "they do move"
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    assert [sum(line["terms"].values()) for line in log] == pytest.approx(losses, rel=1e-5)
    assert [line["step"] for line in log] == [1, 2, 3]
    assert outcome.steps == STEPS
    assert outcome.images == STEPS * COUNT
    assert outcome.trained == sum(part.numel() for part in history[0].values())
    assert outcome.skipped == []


def test_what_is_not_unlocked_stays_frozen_and_bit_identical(tiny, distilled):
    student, _, _ = distilled()
    original = tiny().state_dict()
    after = student.model.state_dict()
    frozen = [name for name in original if name.startswith(("blocks.", "norm.", "patch_embed."))]
    assert frozen
    assert all(torch.equal(after[name], original[name]) for name in frozen)
    assert not any(student.model.get_parameter(name).requires_grad for name in frozen)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_gradient_longer_than_clip_norm_is_scaled_to_it_and_a_shorter_one_left(
    tiny, pictures, distilled, share
):
    _, _, (norm,) = plain_loop(tiny, pictures[0], steps=1)
    history, _, _ = plain_loop(tiny, pictures[0], steps=1, clip=share * norm)
    student, _, _ = distilled(steps=1, optim={"clip_norm": share * norm})
    assert_same(snapshot(student), history[-1])
    moved = math.sqrt(sum(float((history[1][name] - history[0][name]).square().sum()) for name in history[0]))
    assert moved == pytest.approx(LR * norm * min(share, 1), rel=1e-4)


def test_weight_decay_is_that_of_the_plain_loop(tiny, pictures, distilled):
    history, _, _ = plain_loop(tiny, pictures[0], decay=DECAY)
    student, _, _ = distilled(optim={"weight_decay": DECAY})
    assert_same(snapshot(student), history[-1])


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("share", [None, 0.5])
def test_accumulated_batches_take_the_step_of_one_batch_of_all(tiny, pictures, distilled, accumulate, share):
    # Without the pooled term, which is relative to each batch's own targets. Clipped, sum and mean are alike.
    clip = share and share * plain_loop(tiny, pictures[0], steps=1, pooled=0)[2][0]
    history, losses, _ = plain_loop(tiny, pictures[0], pooled=0, clip=clip)
    optim = {"accumulate": accumulate, "clip_norm": clip}
    student, outcome, log = distilled(batch_size=COUNT // accumulate, optim=optim, loss={"pooled": 0})
    assert_same(snapshot(student), history[-1])
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    assert outcome.images == STEPS * COUNT
    assert len(log) == STEPS


def test_the_average_of_the_weights_takes_their_place(tiny, pictures, distilled):
    history, _, _ = plain_loop(tiny, pictures[0])
    decay, average = 0.75, history[0]
    for weights in history[1:]:
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    student, _, _ = distilled(optim={"ema": decay})
    assert_same(snapshot(student), average)


def test_every_step_runs_at_the_schedules_rate(tiny, pictures, distilled):
    rates = [LR, LR / 2, 0.0]  # a cosine from LR to 0 in three steps
    history, _, _ = plain_loop(tiny, pictures[0], lr=lambda step: rates[step])
    student, _, log = distilled(optim={"schedule": "cosine", "final_lr": 0.0})
    assert_same(snapshot(student), history[-1])
    assert [line["lr"] for line in log] == pytest.approx(rates)


def test_each_step_is_in_the_log_when_it_is_told_of_with_its_speed(distilled, tmp_path):
    observed = []

    def observe(record, steps):
        observed.append((record.step, steps))
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == record.step

    _, outcome, log = distilled(observe)
    assert observed == [(1, STEPS), (2, STEPS), (3, STEPS)]
    speeds = [line["images_per_second"] for line in log]
    assert speeds == [round(speed, 3) for speed in speeds]
    # The steps are all that the run's time is made of, but for what comes before them and after them.
    assert 0 < sum(COUNT / speed for speed in speeds) <= outcome.seconds + 0.01


def test_trackers_get_what_the_log_gets(distilled, monkeypatch):
    tracked = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step=None: tracked.append((step, values)))
    _, _, log = distilled()
    assert tracked == [
        (line["step"], {"loss": line["loss"], "lr": line["lr"], **line["terms"]}) for line in log
    ]


@pytest.mark.parametrize(
    ("length", "steps"),
    [({"epochs": 3}, 4), ({"epochs": 1}, 1), ({}, 1), ({"steps": 5}, 5)],
)
def test_epochs_are_as_many_steps_as_their_images_fill(distilled, length, steps):
    settings = {"steps": None, "batch_size": 1, "optim": {"accumulate": 3}} | length
    _, outcome, log = distilled(**settings)  # three epochs of four pictures fill four steps of three
    assert outcome.steps == len(log) == steps
    assert outcome.images == steps * 3


def test_after_training_under_autocast_the_model_runs_in_full_precision_again(tiny, pictures, distilled):
    student, _, log = distilled(precision="bf16")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    other = add_registers(adapt(tiny()), 2)
    other.load_disk_state(student.disk_state())
    assert torch.equal(student(images).patches, other(images).patches)
    losses = plain_loop(tiny, pictures[0])[1]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=0.05), "near those of fp32"
    assert [line["loss"] for line in log] != pytest.approx(losses, rel=1e-5), "bf16 was used"


def test_kept_targets_give_the_same_run_and_are_gone_afterwards(tiny, pictures, distilled, tmp_path):
    history, losses, _ = plain_loop(tiny, pictures[0])
    seen, targets = [], tmp_path / "run" / "targets"
    student, _, log = distilled(lambda *_: seen.append(targets.is_dir()), target={"cache": True})
    # Targets are kept in bf16: of values around 1, 1 part in 256, which averages out.
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=2e-3)
    for name, expected in history[-1].items():
        torch.testing.assert_close(snapshot(student)[name], expected, atol=5e-4, rtol=0)
    assert seen == [True] * STEPS
    assert not targets.exists()


def test_pictures_that_cannot_be_read_are_told_in_the_outcome(distilled, pictures):
    (pictures[1] / "2.png").write_bytes(b"no picture")
    _, outcome, _ = distilled(data={"workers": 0, "max_broken": 0.5})
    assert [name.rsplit("/")[-1] for name in outcome.skipped] == ["2.png"]


def test_a_checkpoint_is_written_every_so_many_steps_and_at_the_end(distilled, tmp_path):
    written = {}

    def observe(record, _steps):
        written[record.step] = [state.name for state in RunFolder(tmp_path / "run").states]

    distilled(observe, steps=5, checkpoint_every=2)
    # A step is told of while the next one runs, or right before its own checkpoint.
    assert written == {
        1: [],
        2: [],
        3: ["step-000002"],
        4: ["step-000002"],
        5: ["step-000002", "step-000004"],
    }
    states = RunFolder(tmp_path / "run").states
    assert [state.name for state in states] == ["step-000004", "step-000005"]
    told = json.loads((states[1] / "state.json").read_text())
    assert told["step"] == 5
    assert told["facts"] == {"processes": 1, "images": COUNT, "precision": "no"}


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_relocation_term_adds_its_weight_times_its_value(tiny, pictures, distilled, weight):
    class Constant(Relocation):
        """A relocation loss of 3, whatever the model does."""

        __init__ = object.__init__
        capture = staticmethod(lambda: nullcontext({"block": "captured"}))
        lost = staticmethod(lambda hidden: [])

        def loss(self, hidden, images):
            assert hidden == {"block": "captured"}
            assert images.shape[1:] == (3, 32, 32)
            return torch.tensor(3.0)

    plain, _, log = distilled(relocation=Constant(), loss={"relocation": weight})
    history, losses, _ = plain_loop(tiny, pictures[0])
    assert_same(snapshot(plain), history[-1])
    assert [line["terms"]["relocation"] for line in log] == [3.0] * STEPS
    assert [line["loss"] - 3 * weight for line in log] == pytest.approx(losses, abs=1e-5)


class PowerCutError(Exception):
    """Ends a run without giving it time to save."""


@pytest.mark.parametrize("every", [1, 2])
def test_a_run_cut_off_and_resumed_takes_the_steps_of_the_plain_loop(tiny, pictures, distilled, every):
    settings = {"steps": 5, "checkpoint_every": every, "optim": {"momentum": 0.5, "weight_decay": DECAY}}
    history, losses, _ = plain_loop(tiny, pictures[0], steps=5, momentum=0.5, decay=DECAY)

    def cut(record, steps):
        assert steps == 5
        if record.step == 3:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        distilled(cut, **settings)
    seen = []
    student, outcome, log = distilled(lambda record, _: seen.append(record.step), **settings)
    assert seen == [3, 4, 5], "after the checkpoint of step 2"
    assert_same(snapshot(student), history[-1])
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in log] == pytest.approx(losses, rel=1e-5)
    assert outcome.images == 5 * COUNT, "over both sessions"


def test_a_run_asked_to_stop_does_so_with_a_checkpoint_of_the_step_it_names(
    tiny, pictures, distilled, tmp_path
):
    def stop(record, _steps):
        if record.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match=r"stopped after step (\d) of 9, checkpoint written") as caught:
        distilled(stop, steps=9, checkpoint_every=100)
    done = int(str(caught.value).split()[3])
    (state,) = RunFolder(tmp_path / "run").states
    assert json.loads((state / "state.json").read_text())["step"] == done < 9
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == done
    student, _, _ = distilled(steps=9, checkpoint_every=100)
    assert_same(snapshot(student), plain_loop(tiny, pictures[0], steps=9)[0][-1])


def test_a_loss_that_is_not_finite_names_the_step_and_its_pictures(distilled, tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d, on .*\.png.*none yet"):
        distilled(optim={"lr": 1e30}, steps=9)
    assert RunFolder(tmp_path / "run").states == []
