"""A step that takes less memory has the same gradients: blocks computed twice, a batch in parts."""

import json
import logging
import os
import socket
import subprocess
import sys
import weakref
from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, LIBRARIES
from known_sinks import sinks
from safetensors.torch import load_file
from short_runs import SHORT, logged, weights
from torch import nn

from phreg import api
from phreg.backbones.base import Features
from phreg.backbones.resolve import adapt
from phreg.config import DistillConfig, LossConfig, TargetConfig, UnlockConfig, ViewsConfig
from phreg.errors import PhregError
from phreg.registers import add_registers
from phreg.sinks.relocation import Relocation
from phreg.teacher import Teacher
from phreg.training.losses import LossTerm, RelocationTerm, distillation_terms
from phreg.training.memory import CheckpointedBlocks, StepMemory
from phreg.training.runtime import compiled
from phreg.training.task import RetrofitTask
from phreg.training.trainable import unlock

LORA = UnlockConfig.model_validate({"roles": (), "lora": {"rank": 2, "blocks": "all"}})
BLOCKS = UnlockConfig(roles=("blocks", "patch_embed", "pos_embed"))
LOSS = LossConfig(relative_mse=0.7)


def student_of(model, unlocked=LORA):
    student = add_registers(adapt(model), 2)
    torch.manual_seed(1)
    unlock(student, unlocked)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:  # zeros, which would keep gradients from the other factor
            nn.init.normal_(parameter, std=0.1)
    return student


def task_of(student, terms=None, loss=LOSS):
    teacher = Teacher(student, ViewsConfig(count=1), TargetConfig())
    return RetrofitTask(
        student, teacher, distillation_terms(loss) if terms is None else terms, TargetConfig()
    )


def images_for(backbone, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *backbone.spec.input_size, generator=generator)


def target_for(backbone, images):
    """Targets whose scale differs much from image to image."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made = backbone(images)
    scale = torch.arange(1.0, len(images) + 1)
    return Features(
        *(torch.randn(one.shape, generator=generator) * scale.view(-1, *[1] * (one.ndim - 1)) for one in made)
    )


def gradients(student):
    return {name: one.grad.clone() for name, one in student.named_parameters() if one.grad is not None}


def backward(task, config=None, images=None, target=None):
    """One backward pass from no gradients; the gradients, and the loss with its terms."""
    images = images_for(task.student) if images is None else images
    target = target_for(task.student, images) if target is None else target
    memory = StepMemory(task, config or DistillConfig(batch_size=len(images)))
    task.student.zero_grad()
    with task.running(), memory.running():
        while (sums := memory.backward(task.student, images, target, (0, 0))) is None:
            task.student.zero_grad()
    return gradients(task.student), sums, memory


def plainly(task, images):
    """Gradients and terms of the loss of all images at once, by autograd alone."""
    target = target_for(task.student, images)
    task.student.zero_grad()
    with task.running():
        loss, terms = task.loss(task.student, images, target, (0, 0))
        loss.backward()
    return gradients(task.student), {"loss": loss.detach(), **terms}


def assert_equal_gradients(found, expected, *, rtol=0.0, atol=0.0):
    assert found.keys() == expected.keys()
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def checkpointing(wanted=True, **settings):
    return DistillConfig.model_validate({"batch_size": 3, "checkpoint_activations": wanted} | settings)


@pytest.mark.parametrize("unlocked", [LORA, BLOCKS], ids=("lora", "blocks"))
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_bit_of_any_gradient(family, unlocked):
    task = task_of(student_of(FAMILIES[family](), unlocked))
    expected, losses, _ = backward(task, checkpointing(False))
    found, same, _ = backward(task, checkpointing(True))
    assert_equal_gradients(found, expected)
    assert same == losses
    again, _, _ = backward(task, checkpointing(False))
    assert_equal_gradients(again, expected)


@contextmanager
def saved_bytes():
    """Counts what autograd keeps for the backward pass, each memory once, weights left out."""
    sizes: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor):
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)  # so that no memory is counted under the address of another
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(sizes.values()))


@pytest.mark.parametrize("library", LIBRARIES)
def test_checkpointing_keeps_little_more_than_the_input_of_each_block(library, tiny):
    model = tiny(depth=6) if library == "timm" else LIBRARIES[library]["clip"]()
    student = student_of(model)
    images = images_for(student, 8)
    blocks = CheckpointedBlocks(student)
    with saved_bytes() as usual:
        student(images)
    blocks.turn_on()
    with saved_bytes() as less:
        student(images)
    blocks.turn_off()
    with saved_bytes() as after:
        student(images)
    layout = student.layout(images)
    tokens = 8 * layout.num_tokens * student.spec.width * 4
    # The input of each block, and what lies ahead of the blocks and after them: norms, pooling, projection.
    assert less[0] <= tokens * (len(student.blocks) + 8)
    assert less[0] < 0.6 * usual[0]
    assert after[0] == usual[0]


def test_dropout_in_a_block_is_drawn_alike_both_times(tiny):
    student = student_of(tiny(proj_drop_rate=0.3, drop_path_rate=0.5), BLOCKS)
    student.train()
    found = {}
    for wanted in (False, True):
        torch.manual_seed(3)
        found[wanted], _, _ = backward(task_of(student), checkpointing(wanted))
    assert_equal_gradients(found[True], found[False])
    torch.manual_seed(4)
    other, _, _ = backward(task_of(student), checkpointing(True))
    assert any(not torch.equal(other[name], one) for name, one in found[True].items()), "it was drawn"


def relocating(student, unlocked):
    """A task with a relocation term, which reads what blocks put out."""
    relocation = Relocation(student, sinks((1, 5, 10.0)))
    torch.manual_seed(1)
    unlock(student, unlocked)
    return task_of(student, [*distillation_terms(LOSS), RelocationTerm(0.5, relocation)])


@pytest.mark.parametrize("unlocked", [LORA, BLOCKS], ids=("lora", "blocks"))
def test_what_a_term_reads_of_a_block_is_the_same_when_it_is_computed_twice(tiny, unlocked):
    task = relocating(add_registers(adapt(tiny()), 2), unlocked)
    for _ in range(2):  # nothing of one step is left for the next
        expected, losses, _ = backward(task, checkpointing(False))
        found, same, _ = backward(task, checkpointing(True))
        assert losses["relocation"] > 0
        assert same == losses
        assert_equal_gradients(found, expected)


# Tracing reads the gradients of everything that enters a block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_checkpointed_with_the_same_gradients(tiny, monkeypatch):
    torch.compiler.reset()
    compile_ = torch.compile
    # aot_eager traces everything and generates no code.
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend="aot_eager"))
    student = student_of(tiny())
    with compiled(True, student):
        expected, _, _ = backward(task_of(student), checkpointing(False))
        found, _, _ = backward(task_of(student), checkpointing(True))
        assert all("forward" in vars(block) for block in student.blocks), "they are still compiled"
    assert_equal_gradients(found, expected)


def test_a_block_has_its_own_forward_back_whatever_ends_the_training(tiny):
    student = student_of(tiny())
    memory = StepMemory(task_of(student), checkpointing(True))

    def interrupted():
        with memory.running():
            assert all("forward" in vars(block) for block in student.blocks)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any("forward" in vars(block) for block in student.blocks)


# -- a batch in parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("library", ["timm", "transformers", "open_clip"])
def test_a_batch_in_parts_has_the_gradient_and_the_loss_of_the_whole(library, micro_batch, tiny):
    student = student_of(tiny() if library == "timm" else LIBRARIES[library]["clip"]())
    images = images_for(student, 5)
    whole, losses = plainly(task_of(student), images)
    settings = DistillConfig.model_validate({"batch_size": 5, "optim": {"micro_batch": micro_batch}})
    parts, same, _ = backward(task_of(student), settings, images)
    assert same.keys() == losses.keys() >= {"cosine", "mse", "relative_mse", "pooled"}
    for name, value in losses.items():
        torch.testing.assert_close(same[name], value, rtol=1e-6, atol=1e-6)
    scale = max(float(one.abs().max()) for one in whole.values())
    # The same terms, summed in another order: rounding of fp32.
    assert_equal_gradients(parts, whole, rtol=1e-5, atol=1e-6 * scale)


def test_relocation_in_parts_has_the_gradient_of_the_whole(tiny):
    task = relocating(add_registers(adapt(tiny()), 2), BLOCKS)
    images = images_for(task.student, 4)
    whole, losses = plainly(task, images)
    settings = DistillConfig.model_validate({"batch_size": 4, "optim": {"micro_batch": 3}})
    parts, same, _ = backward(task, settings, images)
    torch.testing.assert_close(same["relocation"], losses["relocation"], rtol=1e-6, atol=0)
    scale = max(float(one.abs().max()) for one in whole.values())
    assert_equal_gradients(parts, whole, rtol=1e-5, atol=1e-6 * scale)


def test_gradients_are_exchanged_with_the_last_part_alone_and_divided_as_asked(tiny):
    task = task_of(student_of(tiny()))
    images = images_for(task.student, 5)
    whole, _ = plainly(task, images)
    target, done = target_for(task.student, images), []

    @contextmanager
    def alone():
        done.append("alone")
        yield

    def backward_pass(loss):
        done.append("backward")
        loss.backward()

    settings = DistillConfig.model_validate({"batch_size": 5, "optim": {"micro_batch": 2}})
    task.student.zero_grad()
    with task.running():
        StepMemory(task, settings).backward(
            task.student, images, target, (0, 0), divisor=4, backward=backward_pass, alone=alone
        )
    assert done == ["alone", "backward", "alone", "backward", "backward"]
    quarter = {name: one / 4 for name, one in whole.items()}
    scale = max(float(one.abs().max()) for one in quarter.values())
    assert_equal_gradients(gradients(task.student), quarter, rtol=1e-5, atol=1e-6 * scale)


class Spread(LossTerm):
    """A term of the batch as a whole: its images should differ."""

    name = "spread"

    def __call__(self, outputs):
        return -outputs.student.pooled.var(0).mean()


def test_a_term_that_needs_the_whole_batch_refuses_parts(tiny):
    task = task_of(student_of(tiny()), [*distillation_terms(LOSS), Spread(1.0)])
    settings = DistillConfig.model_validate({"batch_size": 4, "optim": {"micro_batch": 2}})
    with pytest.raises(
        PhregError, match=r"optim.micro_batch = 2 .* spread need it whole .* lower batch_size"
    ):
        StepMemory(task, settings)


# -- running out of memory -----------------------------------------------------------------------------------


class Small:
    """A device on which a student's pass fits up to some images, more of them where it is checkpointed."""

    def __init__(self, student, images, checkpointed=0):
        self.student, self.limits = student, (images, max(images, checkpointed))
        self.tried = []
        student.register_forward_pre_hook(self._check)

    def _check(self, student, args):
        checkpointed = any("forward" in vars(block) for block in student.blocks)
        if torch.is_grad_enabled():
            self.tried.append((len(args[0]), checkpointed))
            if len(args[0]) > self.limits[checkpointed]:
                raise torch.OutOfMemoryError("planted: no room")


def test_running_out_of_memory_turns_checkpointing_on_and_then_halves_the_batch(tiny, caplog):
    student = student_of(tiny())
    images = images_for(student, 8)
    expected, losses, _ = backward(task_of(student), images=images)
    small = Small(student, 0, checkpointed=2)
    with caplog.at_level(logging.WARNING):
        found, same, memory = backward(task_of(student), images=images)
    assert small.tried == [(8, False), (8, True), (4, True), *[(2, True)] * 4]
    assert memory.use == {"micro_batch": 2, "checkpointed": True}
    assert [record.message.count("out of memory") for record in caplog.records] == [1, 1, 1]
    assert "activation checkpointing" in caplog.records[0].message
    assert "2 of 8 images at a time" in caplog.records[2].message
    scale = max(float(one.abs().max()) for one in expected.values())
    assert_equal_gradients(found, expected, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(same["loss"], losses["loss"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("where", ["gate of the MLP", "final norm"])
def test_nothing_that_a_pass_computed_is_held_when_the_next_begins(tiny, where):
    task = relocating(add_registers(adapt(tiny()), 2), BLOCKS)
    computed, left, failed = [], [], []

    def fail_once(_module, _args):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("planted: no room")

    def note(_module, _args, output):
        left.append(sum(one() is not None for one in computed))
        computed.append(weakref.ref(output))

    student = task.student
    # In the block whose units are read, between where they are fed and where they are read; or later.
    failing = student.blocks[1].mlp.act if where == "gate of the MLP" else student.final_norm
    failing.register_forward_pre_hook(fail_once)
    student.blocks[0].register_forward_hook(note)
    images, target = images_for(student), Features(torch.zeros(3, 4, 4, 32), torch.zeros(3, 32))
    backward(task, images=images, target=target)
    assert failed
    assert left == [0, 0]


def test_checkpointing_that_suffices_leaves_the_batch_whole(tiny):
    student = student_of(tiny())
    Small(student, 2, checkpointed=8)
    _, _, memory = backward(task_of(student), images=images_for(student, 8))
    assert memory.use == {"checkpointed": True}


def test_checkpointing_that_is_switched_off_stays_off_and_the_batch_is_halved(tiny):
    student = student_of(tiny())
    small = Small(student, 3)
    settings = DistillConfig.model_validate({"batch_size": 5, "checkpoint_activations": False})
    _, _, memory = backward(task_of(student), settings, images_for(student, 5))
    assert small.tried == [(5, False), (2, False), (2, False), (1, False)]
    assert memory.use == {"micro_batch": 2}


def test_one_image_that_does_not_fit_is_an_error_that_says_what_to_change(tiny):
    student = student_of(tiny())
    Small(student, 0)
    with pytest.raises(PhregError) as caught:
        backward(task_of(student), images=images_for(student, 4))
    message = str(caught.value)
    assert "with 1 images at a time does not fit into the memory of cpu: planted: no room" in message
    assert "unlock.lora" in message
    assert "--size" in message
    assert "checkpoint_activations" not in message, "which was tried"


def test_a_term_of_the_whole_batch_gets_checkpointing_and_no_parts(tiny):
    student = student_of(tiny())
    small = Small(student, 0)
    with pytest.raises(PhregError, match=r"4 images at a time.*--batch-size"):
        backward(task_of(student, [Spread(1.0)]), images=images_for(student, 4))
    assert small.tried == [(4, False), (4, True)]


QUICK = SHORT | {"precision": "fp32"}


@pytest.mark.parametrize("wanted", [True, "auto"])
def test_a_short_run_has_the_same_losses_and_weights_and_its_record_says_what_it_took(
    tiny, photos, tmp_path, monkeypatch, wanted
):
    usual = api.distill(tiny(), photos, tmp_path / "usual", **QUICK)
    if wanted == "auto":
        real = RetrofitTask.loss

        def small(task, model, *arguments):
            if "forward" not in vars(task.student.blocks[0]):
                raise torch.OutOfMemoryError("planted: no room")
            return real(task, model, *arguments)

        monkeypatch.setattr(RetrofitTask, "loss", small)
    less = api.distill(tiny(), photos, tmp_path / "less", checkpoint_activations=wanted, **QUICK)
    for one, other in zip(logged(tmp_path / "usual"), logged(tmp_path / "less"), strict=True):
        assert one["terms"] == other["terms"]
        assert "checkpointed" not in one
        assert other["checkpointed"] is True
    assert less.outcome.checkpointed is True
    assert usual.outcome.checkpointed is None
    expected = weights(usual.model)
    assert all(torch.equal(one, expected[name]) for name, one in weights(less.model).items())
    record = json.loads((tmp_path / "less" / "model" / "phreg.json").read_text())
    assert record["outcome"]["checkpointed"] is True


def test_a_step_that_runs_out_of_memory_in_its_second_batch_begins_again(tiny, photos, tmp_path, monkeypatch):
    settings = QUICK | {
        "optim": {"name": "sgd", "lr": 0.1, "accumulate": 2, "trust_region": False},
        "checkpoint_activations": False,
    }
    usual = api.distill(tiny(), photos, tmp_path / "usual", **settings)
    real, passes = RetrofitTask.loss, []

    def small(task, model, images, *arguments):
        passes.append(len(images))
        if len(passes) >= 4 and len(images) > 2:  # the second batch of the second step
            raise torch.OutOfMemoryError("planted: no room")
        return real(task, model, images, *arguments)

    monkeypatch.setattr(RetrofitTask, "loss", small)
    parts = api.distill(tiny(), photos, tmp_path / "parts", **settings)
    assert passes == [4, 4, 4, 4, *[2] * 8]
    assert parts.outcome.micro_batch == 2
    assert [line.get("micro_batch") for line in logged(tmp_path / "parts")] == [None, 2, 2]
    expected = weights(usual.model)
    for name, one in weights(parts.model).items():
        # The same terms, summed in another order.
        torch.testing.assert_close(one, expected[name], atol=1e-6, rtol=1e-5)


SHORT_OF_MEMORY = """
import os, sys
import torch
import phreg
from phreg.training.task import RetrofitTask

model, images, output, settings = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
real = RetrofitTask.loss

def small(task, model, images, *arguments):
    if os.environ["RANK"] == "1" and len(images) > 1:
        raise torch.OutOfMemoryError("planted: no room")
    return real(task, model, images, *arguments)

RetrofitTask.loss = small
phreg.distill(model, images, output, **settings)
"""


@pytest.mark.slow
def test_processes_find_what_fits_all_of_them_before_the_first_step(saved, photos, tmp_path):
    sgd = {"name": "sgd", "lr": 0.1, "trust_region": False}
    settings = QUICK | {"views": {"count": 1}, "unlock": {"roles": ["pos_embed"]}, "optim": sgd}
    script = tmp_path / "short.py"
    script.write_text(SHORT_OF_MEMORY)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, script]
    arguments = [saved, photos, tmp_path / "two", repr(settings | {"batch_size": 2})]
    done = subprocess.run(
        [sys.executable, *map(str, launch + arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert [(line["micro_batch"], line["checkpointed"]) for line in logged(tmp_path / "two")] == [
        (1, True)
    ] * 3
    one = api.distill(saved, photos, tmp_path / "one", **settings)
    two = load_file(tmp_path / "two" / "model" / "adapter.safetensors")
    expected = load_file(tmp_path / "one" / "model" / "adapter.safetensors")
    assert one.outcome.micro_batch is None
    assert two.keys() == expected.keys()
    for name, tensor in expected.items():
        # Means over parts, averaged over processes, against one mean over all: float rounding only.
        torch.testing.assert_close(two[name], tensor, atol=1e-6, rtol=1e-5)
