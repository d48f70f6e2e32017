"""What a training step of phreg needs in memory: predicted by count, and measured on models that are small.

The step is phreg's own code. To predict, it runs on fake tensors, which have shapes and no values, and the
bytes of all that are alive are counted operation by operation. To measure, it runs on real ones, and the
allocator reports what it gave out.

    model on `meta` ──► fake tensors ──► two steps ──► bytes alive, operation by operation ──► predicted peak
    model           ──► real tensors ──► two steps ──► the allocator's own report          ──► measured peak
"""

import argparse
import ctypes
import gc
import json
import platform
import time
import weakref
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import phreg
from phreg.backbones.base import Backbone, Features
from phreg.backbones.resolve import adapt
from phreg.config import DistillConfig
from phreg.methods import resolve
from phreg.registers import add_registers
from phreg.rollback import ModelState
from phreg.teacher import Teacher
from phreg.training.checkpoint import RunFolder
from phreg.training.frozen import frozen_matrices
from phreg.training.losses import distillation_terms
from phreg.training.memory import StepMemory
from phreg.training.runtime import start_accelerator
from phreg.training.task import RetrofitTask
from phreg.training.trainable import optimizer, unlock

MODELS = {
    "ViT-S/14": ("vit_small_patch14_dinov2", 518),
    "ViT-B/14": ("vit_base_patch14_dinov2", 518),
    "ViT-L/14": ("vit_large_patch14_dinov2", 518),
    "ViT-g/14": ("vit_giant_patch14_dinov2", 518),
    "ViT-7B/16": ("vit_7b_patch16_dinov3", 528),
}
"""Architectures of timm, and the side of the images in pixels: 518, or the next multiple of the patch."""

VARIANTS: dict[str, dict[str, Any]] = {
    "two copies": {"shared": False},
    "shared": {},
    "shared, fp32 products": {"precision": "fp32"},
    "checkpointed": {"checkpointed": True},
    "checkpointed, fp32 products": {"checkpointed": True, "precision": "fp32"},
    "frozen bf16": {"frozen_dtype": "bf16"},
    "checkpointed, frozen bf16": {"checkpointed": True, "frozen_dtype": "bf16"},
}
"""What is compared; products are in bf16 where nothing else is said."""

TEACHER_VIEWS = 16
"""Views per forward of the teacher: phreg's default on a CPU. On a GPU it is 256, halved to what fits."""


@dataclass(frozen=True)
class Options:
    """One step to predict or measure."""

    model: str
    size: int
    batch_size: int = 16
    micro_batch: int | None = None
    rank: int = 16
    registers: int = 4
    precision: str = "bf16"
    frozen_dtype: str = "fp32"
    checkpointed: bool = False
    shared: bool = True
    device: str = "cpu"

    def config(self) -> DistillConfig:
        """The same as phreg's settings, all others as the default method has them."""
        settings = {
            "method": "relocate", "size": self.size, "registers": self.registers, "device": self.device,
            "batch_size": self.batch_size, "precision": self.precision, "frozen_dtype": self.frozen_dtype,
            "checkpoint_activations": self.checkpointed, "keep_freed_memory": False,
            "unlock.lora.rank": self.rank, "optim.micro_batch": self.micro_batch,
        }  # fmt: skip
        return resolve(overrides={key: value for key, value in settings.items() if value is not None})


# -- one step ------------------------------------------------------------------------------------------------


def models(options: Options, device: str) -> tuple[Backbone, Backbone]:
    """Builds student and teacher: registers and LoRA are in place, frozen weights shared."""
    with torch.device(device):
        model = timm.create_model(options.model, img_size=options.size).eval()
    student = adapt(model)
    original = ModelState(student).frozen_twin() if options.shared else deepcopy(student)
    add_registers(student, options.registers)
    unlock(student, options.config().unlock)
    return student, original.requires_grad_(False)


class Step:
    """All that a training step needs, on real or fake tensors.

    Args:
        options: What it is a step of.
        student: The student.
        original: The model that it was made from.
    """

    def __init__(self, options: Options, student: Backbone, original: Backbone) -> None:
        self.options, config = options, options.config()
        with TemporaryDirectory() as folder:
            self.accelerator = start_accelerator(config, RunFolder(Path(folder)))
        if options.frozen_dtype == "bf16":
            round_frozen(student, original)
        teacher = Teacher(original, config.views, config.target)
        self.task = RetrofitTask(student, teacher, distillation_terms(config.loss), config.target)
        self.memory = StepMemory(self.task, config)
        trained = {name: one for name, one in student.named_parameters() if one.requires_grad}
        self.optimizer = optimizer(trained, config.optim)
        self.best = [parameter.detach().clone() for parameter in trained.values()]
        self.model = self.accelerator.prepare_model(student, device_placement=False)

    def run(self) -> None:
        """Makes a target, forward, backward and a step of the optimizer."""
        options, task, side = self.options, self.task, self.options.size
        backbone, device = task.teacher.backbone, options.device
        with self.accelerator.autocast(), torch.no_grad():
            made = backbone(torch.randn(TEACHER_VIEWS, 3, side, side, device=device))
        target = Features(*(torch.randn(options.batch_size, *one.shape[1:], device=device) for one in made))
        del made
        images = torch.randn(options.batch_size, 3, side, side, device=device)
        with self.memory.running():
            self.memory.backward(self.model, images, target, (0, 0), backward=self.accelerator.backward)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> Iterator[Tensor]:
        """Lists what a step holds before it begins, shared memory as often as it is shared."""
        backbones = (self.task.student, self.task.teacher.backbone)
        yield from chain(*(chain(one.parameters(), one.buffers()) for one in backbones), self.best)

    def weights(self) -> int:
        """Counts the bytes of student and teacher, shared memory once."""
        return sum({key(tensor): tensor.untyped_storage().nbytes() for tensor in self.tensors()}.values())


def round_frozen(student: Backbone, original: Backbone) -> None:
    """Puts frozen matrices into bf16 as `frozen_weights` does, which needs addresses, on fake tensors too."""
    rounded: dict[int, Tensor] = {}
    for weight in [*frozen_matrices(student), *frozen_matrices(original)]:
        place = key(weight)
        if place not in rounded:
            rounded[place] = weight.detach().to(torch.bfloat16)
        weight.data = rounded[place]


def key(tensor: Tensor) -> int:
    """Tells memory apart, of fake tensors too."""
    return tensor.untyped_storage()._cdata


# -- by count, and by the allocator --------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, operation by operation, and their peak.

    Args:
        there: Tensors that are there before.
    """

    def __init__(self, there: Iterator[Tensor]) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in there:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, and counts what it makes."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return made

    def _add(self, tensor: Tensor) -> None:
        place, storage = key(tensor), tensor.untyped_storage()
        if place not in self.sizes:
            self.sizes[place] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, place)

    def _free(self, place: int) -> None:
        self.now -= self.sizes.pop(place)


def predict(options: Options) -> dict[str, float]:
    """Counts the memory of a step on fake tensors."""
    student, original = models(options, "meta")
    with FakeTensorMode():
        to_fake(student, original)
        step = Step(options, student, original)
        weights = step.weights()
        with LiveBytes(step.tensors()) as live:
            step.run()
            between = live.now
            step.run()
    return {"weights": gb(weights), "between_steps": gb(between), "peak": gb(live.peak)}


def to_fake(*backbones: Backbone) -> None:
    """Gives models of `meta` fake tensors of a CPU, shared where theirs are."""
    made: dict[int, Tensor] = {}
    for module in chain(*(one.modules() for one in backbones)):
        for name, one in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if key(one) not in made:
                made[key(one)] = torch.empty(one.shape, dtype=one.dtype, device="cpu")
            fake = made[key(one)]
            is_parameter = isinstance(one, nn.Parameter)
            setattr(module, name, nn.Parameter(fake, one.requires_grad) if is_parameter else fake)


def measure(options: Options) -> dict[str, float]:
    """Runs real steps; the allocator says what it gave out."""
    torch.manual_seed(0)
    step = Step(options, *models(options, options.device))
    step.run()
    gc.collect()
    started = time.perf_counter()
    moments = [one for state in step.optimizer.state.values() for one in state.values()]
    there = sum({key(one): one.untyped_storage().nbytes() for one in [*step.tensors(), *moments]}.values())
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.run()
        peak = torch.cuda.max_memory_allocated()
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            step.run()
        peak = there + highest(profile)
    found = {"measured_peak": gb(peak), "seconds": round(time.perf_counter() - started, 1)}
    if options.device == "cpu" and Path("/proc/self/clear_refs").exists():
        found["resident_peak"] = gb(there + resident_growth(step))
    return found


def resident_growth(step: Step) -> int:
    """Runs a step and returns how much the process grew, as the system sees it: pages, not tensors."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    step.run()
    return status("VmHWM") - before


def highest(profile: Any) -> int:
    """Reads the peak of the bytes that the CPU's allocator gave out while it was profiled."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def gb(size: int) -> float:
    """Rounds bytes to GB as in the aims: 10^9 bytes."""
    return round(size / 1e9, 4)


# -- the record ----------------------------------------------------------------------------------------------


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="of those listed, or timm's names")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument(
        "--size", type=int, help="image side in pixels; unset means 518, or what fits patches"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images a step")
    parser.add_argument("--micro-batch", type=int, help="images per forward and backward pass")
    parser.add_argument("--rank", type=int, default=16, help="rank of LoRA, in all blocks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--measure", action="store_true", help="run the step too, not only count it")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Predicts, measures if asked to, prints and writes the record."""
    asked = read_options(arguments)
    rows = []
    for name in asked.models:
        model, size = MODELS.get(name, (name, 518))
        options = Options(
            model, asked.size or size, asked.batch_size, asked.micro_batch, asked.rank, device=asked.device
        )
        for variant in asked.variants:
            chosen = replace(options, **VARIANTS[variant])
            # Counted as of a CPU: fake tensors of a GPU have no backward pass on a machine without one.
            figures = predict(replace(chosen, device="cpu"))
            figures |= measure(chosen) if asked.measure else {}
            rows.append({"name": name, "variant": variant, **asdict(chosen), **figures})
            print(f"{name:10} {variant:28} {json.dumps(figures)}", flush=True)
    libraries = {name: version(name) for name in ("torch", "timm", "peft", "accelerate")}
    record = {
        "teacher_views": TEACHER_VIEWS,
        "unit": "GB of 10^9 bytes",
        "versions": {"python": platform.python_version(), "phreg": phreg.__version__} | libraries,
        "rows": rows,
    }
    if asked.output:
        asked.output.parent.mkdir(parents=True, exist_ok=True)
        asked.output.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main()
