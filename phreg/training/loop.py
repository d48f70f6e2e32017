"""The training loop, from first step to last, in order.

    batch (uint8) ──device──► normalise ──► task.target ─┐
                                       └──► task.loss ───┴► backward ──► step ──► log ──► checkpoint

Everything random (order, crops, views) is a pure function of (seed, step, rank). So a run that was killed and
resumed reaches the same weights as an uninterrupted one. The loop never waits for the device: the numbers of
a step are read while the next one runs. A NaN is noticed then, and nothing is saved before its step is known
to be finite.
"""

import ctypes
import importlib.util
import json
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TextIO, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import patch_environment
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.config import DistillConfig
from phreg.data.crops import BrokenImages, Crops, Order, as_input, loader
from phreg.errors import Interrupted, PhregError, TrainingError
from phreg.run_summary import Outcome
from phreg.seeding import keyed_generator
from phreg.storage import resume_command
from phreg.training.checkpoint import (
    RunFolder,
    load_state,
    read_rates,
    save_state,
    truncate_log,
    write_rates,
    writing_run,
)
from phreg.training.target_cache import TargetCache
from phreg.training.task import RetrofitTask
from phreg.training.trainable import (
    MovingAverage,
    freeze_unused,
    learning_rate,
    merge_lora,
    optimizer,
    parameter_roles,
    set_learning_rate,
    unlock,
)
from phreg.training.trust_region import calibrate
from phreg.training.validation import BestState, Measurement, Validator, warn_wrecked

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    """One line of log.jsonl: a step, counted from 1, and its means over all processes."""

    step: int
    loss: float
    terms: dict[str, float]
    lr: float
    images_per_second: float
    held_out: dict[str, float] | None = None
    """The student's figures on held-out images after the step, where it was measured."""


EARLY = 10
"""Step after which every run is measured once: a recipe that damages a model shows it by then."""

UNTRAINED = Outcome(steps=0, images=0, seconds=0.0, trained=0, skipped=[])
"""The outcome of a method that trains nothing."""


def train(  # noqa: C901 (the loop reads straight down)
    task: RetrofitTask,
    images: Crops,
    config: DistillConfig,
    run: RunFolder,
    accelerator: Accelerator,
    observe: Callable[[StepRecord, int], None] | None = None,
    validator: Validator | None = None,
) -> Outcome:
    """Trains a patched model's registers and unlocked weights towards the teacher's targets.

    Args:
        task: The patched model, its teacher and the loss. The model is on the accelerator's device, in fp32
            and eval mode, and is trained in place. Parameters that do not train stay frozen.
        images: Training images.
        config: The run's settings.
        run: Where to log and checkpoint. Training continues from a checkpoint found there.
        accelerator: From `start_accelerator`.
        observe: Called on the main process with each step's record, and the number of steps.
        validator: Measures the student after the first steps, to warn where they damage it; with
            measure.keep_best as often as measure.every says, to keep the best state.

    Raises:
        TrainingError: The loss became NaN or infinite.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written.
    """
    student, size = task.student, images.shape
    rank, world, accumulate = accelerator.process_index, accelerator.num_processes, config.optim.accumulate
    order = Order(len(images), config.batch_size, seed=config.seed, rank=rank, world_size=world)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # for LoRA's initial weights, which PEFT draws from the global state
        trained = unlock(student, config.unlock)
    with task.running():
        trained = freeze_unused(task, trained, size)
    shares = None
    if config.optim.trust_region:
        shares = calibrated_shares(task, trained, images, config, run, accelerator)
    optim = optimizer(trained, config.optim, shares)
    average = MovingAverage(trained, config.optim.ema) if config.optim.ema is not None else None

    steps_per_epoch = order.steps_per_epoch / accumulate
    steps = config.steps or max(1, (config.epochs or 1) * order.steps_per_epoch // accumulate)

    saved_tensors: dict[str, Tensor] = dict(trained)
    if average is not None:
        saved_tensors |= {f"ema.{name}": value for name, value in average.average.items()}
    best = None
    if validator is not None and config.measure.keep_best:
        best = BestState(trained, validator.original, config.checks.drift)
        saved_tensors |= best.tensors
    every = config.measure.every or max(10, steps // 16)
    facts = {"processes": world, "images": len(images), "precision": accelerator.mixed_precision}
    done = load_state(run, saved_tensors, optim, facts)
    if accelerator.is_main_process:
        truncate_log(run.log, done)
    accelerator.init_trackers("phreg", config={"method": config.method, "seed": config.seed})
    accelerator.wait_for_everyone()

    broken = BrokenImages(len(images), config.data.max_broken)
    batches = iter(
        loader(
            images, order, done * accumulate, steps * accumulate,
            workers=config.data.workers, pin_memory=accelerator.device.type == "cuda",
        )
    )  # fmt: skip
    started = time.perf_counter()
    target_cache = TargetCache(run.path / "targets", accelerator.device) if config.target.cache else None
    with (
        stop_signals() as stop,
        task.running(),
        compiled(config.compile, student, task.teacher.backbone),
        run.log.open("a") as log,
    ):
        model = accelerator.prepare_model(student)
        images_per_step = config.batch_size * accumulate * world
        step_logger = StepLogger(log, accelerator, images_per_step, steps, run, observe or (lambda *_: None))
        metrics: StepMetrics | None = None
        started_at = done
        for step in range(done, done if best is not None and best.turned else steps):
            lr = learning_rate(config.optim, step, steps, steps_per_epoch)
            set_learning_rate(optim, lr)

            sums: dict[str, Tensor] = {}
            names: list[str] = []
            for micro in range(accumulate):
                batch = next(batches)
                broken.add(batch)
                names += batch.names
                pixels = as_input(student, batch.images)
                views = keyed_generator("views", config.seed, step, micro, rank)
                make_target = partial(task.target, pixels, views)
                target = (
                    target_cache.read(batch.indices.tolist(), make_target) if target_cache else make_target()
                )
                # Processes exchange gradients once a step, with the last accumulated batch.
                with accelerator.no_sync(model) if micro + 1 < accumulate else nullcontext():
                    loss, terms = task.loss(model, pixels, target)
                    accelerator.backward(loss / accumulate)
                for name, value in {"loss": loss, **terms}.items():
                    sums[name] = sums.get(name, 0) + value.detach() / accumulate

            if config.optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained.values(), config.optim.clip_norm)
            optim.step()
            optim.zero_grad()
            if average is not None:
                average.update()

            measured = None
            due = best is not None and ((step + 1) % every == 0 or step + 1 == steps)
            if validator is not None and (due or step + 1 == EARLY):
                with average.applied() if average is not None else nullcontext():
                    measured = on_all_processes(validator(student), accelerator)
                    if best is not None:
                        best.update(step + 1, measured)
                warn_wrecked(step + 1, measured, validator.original)

            # The previous step's numbers are on the host by now. All processes read the same numbers, so they
            # stop together.
            previous, metrics = (
                metrics,
                StepMetrics(step + 1, lr, names, sums, stop.is_set(), accelerator, measured),
            )
            stopping = previous is not None and step_logger.write(previous)
            turned = best is not None and best.turned
            if stopping or turned or step + 1 == steps or (step + 1) % config.checkpoint_every == 0:
                stopping = step_logger.write(metrics) or stopping
                metrics = None
                if accelerator.is_main_process:
                    save_state(run, step + 1, saved_tensors, optim, facts)
                accelerator.wait_for_everyone()
            done = step + 1
            if turned:
                break
            if stopping and step + 1 < steps:
                raise Interrupted(
                    f"stopped after step {step + 1} of {steps}, checkpoint written; go on with the run: "
                    f"{resume_command(run.path)}"
                )
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if accelerator.is_main_process:
            for warning in task.warnings():
                logger.warning("%s", warning)
    if target_cache is not None and accelerator.is_main_process:
        target_cache.remove()

    if best is not None:
        if done < steps:
            logger.info("training had turned; it ended after step %d of %d", done, steps)
        logger.info("the best of all states measured is that after step %d", best.step)
        best.restore()
    elif average is not None:
        average.apply()
    student.low_rank = merge_lora(student)
    return Outcome(
        steps=done,
        images=(done - started_at) * step_logger.images_per_step,
        seconds=round(time.perf_counter() - started, 3),
        trained=sum(parameter.numel() for parameter in trained.values()),
        skipped=sorted(broken.reasons),
        best_step=best.step if best is not None else None,
    )


def calibrated_shares(
    task: RetrofitTask,
    trained: Mapping[str, nn.Parameter],
    images: Crops,
    config: DistillConfig,
    run: RunFolder,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Measures what a step of each role does on one batch; returns each parameter's share of the rate.

    The rates are written to the run folder, so that a resumed run has the same; so has every process.
    """
    roles = parameter_roles(task.student, trained)
    if accelerator.is_main_process and not run.rates.is_file():
        order = Order(len(images), config.batch_size, seed=config.seed)
        batch = next(iter(loader(images, order, 0, 1, workers=0)))
        pixels = as_input(task.student, batch.images)
        grouped: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in trained.items():
            grouped.setdefault(roles[name], {})[name] = parameter
        with task.running():
            target = task.target(pixels, keyed_generator("rates", config.seed))
            task.loss(task.student, pixels, target)[0].backward()
            rates = calibrate(
                grouped, lambda: task.features(task.student, pixels)[1], config.optim.max_movement
            )
        task.student.zero_grad(set_to_none=True)
        write_rates(run, rates)
    accelerator.wait_for_everyone()
    rates = read_rates(run)
    for role, rate in rates.items():
        logger.info(
            "learning rate of %-14s %.2g (alone %.2g)", role, min(rate.rate, config.optim.lr), rate.alone
        )
    return {name: min(1.0, rates[role].rate / config.optim.lr) for name, role in roles.items()}


def on_all_processes(measured: Measurement, accelerator: Accelerator) -> Measurement:
    """Returns the mean over processes, so that all of them decide alike."""
    if accelerator.num_processes == 1:
        return measured
    own = torch.tensor(measured, dtype=torch.float64, device=accelerator.device)
    return Measurement(*cast(Tensor, accelerator.reduce(own, "mean")).tolist())


class StepMetrics:
    """A step's numbers on their way from the device to the host, means over all processes.

    Args:
        step: Step, from 1.
        lr: Its learning rate.
        names: Files of its images, on this process.
        values: Scalars on the device, by name.
        stop: Whether this process was asked to stop.
        accelerator: Says how the processes add up.
        measured: The student on held-out images after this step, where it was measured.
    """

    def __init__(
        self,
        step: int,
        lr: float,
        names: list[str],
        values: dict[str, Tensor],
        stop: bool,
        accelerator: Accelerator,
        measured: Measurement | None = None,
    ) -> None:
        self.step, self.lr, self.names, self.keys = step, lr, names, [*values, "stop"]
        self.measured = measured
        self.made = time.perf_counter()
        asked = torch.tensor(float(stop)).to(accelerator.device, non_blocking=True)
        own = torch.stack([*(value.float() for value in values.values()), asked])
        mean = cast(Tensor, accelerator.reduce(own, "mean"))
        self._host = mean.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if mean.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def read(self) -> dict[str, float]:
        """Waits for the numbers, but not for work queued after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return dict(zip(self.keys, self._host.tolist(), strict=True))


class StepLogger:
    """Writes each step to log.jsonl, the trackers and the observer; a loss that is not finite is an error."""

    def __init__(
        self,
        log: TextIO,
        accelerator: Accelerator,
        images_per_step: int,
        steps: int,
        run: RunFolder,
        observe: Callable[[StepRecord, int], None],
    ) -> None:
        self.log, self.accelerator, self.images_per_step = log, accelerator, images_per_step
        self.steps, self.run, self.observe = steps, run, observe
        self.clock = time.perf_counter()

    def write(self, metrics: StepMetrics) -> bool:
        """Records a step.

        Returns:
            Whether any process was asked to stop.

        Raises:
            TrainingError: The loss is NaN or infinite.
        """
        values = metrics.read()
        loss, asked = values.pop("loss"), values.pop("stop")
        if not math.isfinite(loss):
            last = self.run.states[-1] if self.run.states else "none yet"
            raise TrainingError(
                f"the loss is {loss} at step {metrics.step}, on {', '.join(metrics.names)}; "
                f"last good checkpoint: {last}. "
                "Lower --optim.lr, set --optim.clip-norm"
                f"{', or use --precision fp32' if self.accelerator.mixed_precision == 'bf16' else ''}"
            )
        speed, self.clock = self.images_per_step / (metrics.made - self.clock), metrics.made
        if self.accelerator.is_main_process:
            held_out = metrics.measured._asdict() if metrics.measured is not None else None
            record = StepRecord(metrics.step, loss, values, metrics.lr, round(speed, 3), held_out)
            with writing_run(self.run):
                line = {name: value for name, value in asdict(record).items() if value is not None}
                self.log.write(json.dumps(line) + "\n")
                self.log.flush()
            self.accelerator.log({"loss": loss, "lr": metrics.lr, **values}, step=metrics.step)
            self.observe(record, self.steps)
        return asked > 0


def start_accelerator(config: DistillConfig, run: RunFolder) -> Accelerator:
    """Sets up device, precision, processes and trackers as configured, and a CPU's memory.

    Raises:
        PhregError: A tracker's package is not installed.
    """
    for tracker in config.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise PhregError(
                f'trackers asks for {tracker}, which is not installed; run: pip install "phreg[{tracker}]"'
            )
    on_cpu = config.device == "cpu" or not (torch.accelerator.is_available() or config.device)
    precision = config.precision or ("bf16" if computes_bf16("cpu" if on_cpu else "cuda") else "fp32")
    # A process may distil more than once; accelerate would keep the first run's precision and device.
    AcceleratorState._reset_state(reset_partial_state=True)
    # The environment is the one place where accelerate takes a device such as cuda:1.
    with patch_environment(**({"accelerate_torch_device": config.device} if config.device else {})):
        accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(config.trackers) or None,
            project_dir=run.path,
        )
    if on_cpu and config.keep_freed_memory:
        keep_freed_memory()
    return accelerator


@contextmanager
def deterministic_kernels(*, wanted: bool) -> Iterator[None]:
    """Makes torch use only deterministic kernels inside the context, if wanted."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def computes_bf16(device_type: str) -> bool:
    """Says whether a device multiplies matrices in bf16 natively. Emulation is slower than fp32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory in the process, if glibc is the allocator.

    By default glibc returns large freed tensors to the kernel, and their pages are faulted in again. The cost
    grows with the size of the tensors (benchmarks/throughput). With this setting, the process holds its peak
    memory until it ends.

    Returns:
        Whether the setting was made.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # option numbers, from malloc.h
    made = [libc.mallopt(trim_threshold, -1), libc.mallopt(top_pad, 512 << 20), libc.mallopt(mmap_max, 0)]
    logger.debug("freed memory stays in the process (keep_freed_memory)")
    return all(made)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Turns SIGTERM and SIGINT into an event while the loop runs. Only the main thread gets signals."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {
        number: signal.signal(number, lambda *_: event.set()) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def compiled(wanted: bool, *backbones: Backbone) -> Iterator[None]:
    """Compiles the blocks of backbones inside the context.

    Blocks are compiled one by one. They are alike, so compilation is short, and hooks around them (registers,
    taps) stay outside. Blocks with hooks inside (relocation reads there) are left out: alike blocks share
    compiled code, so a block would get the hooks of another.
    """
    blocks = [block for backbone in backbones for block in backbone.blocks if not _hooked_inside(block)]
    if not wanted:
        blocks = []
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _hooked_inside(block: nn.Module) -> bool:
    return any(
        module._forward_pre_hooks or module._forward_hooks
        for module in block.modules()
        if module is not block
    )
