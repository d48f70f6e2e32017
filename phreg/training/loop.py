"""The training loop, from first step to last, in order.

    batch (uint8) ──device──► normalise ──► task.target ─┐
                                       └──► task.loss ───┴► backward ──► step ──► log ──► checkpoint

Everything random (order, crops, views) is a pure function of (seed, step, rank). So a run that was killed and
resumed reaches the same weights as an uninterrupted one. The loop never waits for the device: the numbers of
a step are read while the next one runs. A NaN is noticed then, and nothing is saved before its step is known
to be finite.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from phreg.backbones.base import Features
from phreg.config import DistillConfig
from phreg.data.crops import BrokenImages, Crops, MixedCrops, Order, as_input, loader
from phreg.errors import Interrupted
from phreg.run_summary import Outcome
from phreg.seeding import keyed_generator
from phreg.storage import resume_command
from phreg.training.checkpoint import (
    RunFolder,
    Sessions,
    load_state,
    past_sessions,
    read_rates,
    save_state,
    truncate_log,
    write_rates,
)
from phreg.training.frozen import frozen_weights
from phreg.training.launch import reshards, shards_weights
from phreg.training.memory import StepMemory
from phreg.training.runtime import compiled, stop_signals
from phreg.training.sharding import ShardedStudent
from phreg.training.step_log import StepLogger, StepMetrics, StepRecord
from phreg.training.target_cache import TargetCache, plan_cache
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

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


EARLY = 10
"""Step after which every run is measured once: a recipe that damages a model shows it by then."""

CALIBRATED = 4
"""Images on which a step's movement is measured. They have hundreds of patches, so few suffice."""

UNTRAINED = Outcome(steps=0, images=0, seconds=0.0, trained=0, skipped=[])
"""The outcome of a method that trains nothing."""


def train(  # noqa: C901 (the loop reads straight down)
    task: RetrofitTask,
    images: Crops | MixedCrops,
    config: DistillConfig,
    run: RunFolder,
    accelerator: "Accelerator",
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
    num_sizes = len(images.parts)
    order = Order(len(images), config.batch_size, config.seed, rank, world, num_sizes)
    memory = StepMemory(task, config, world)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # for LoRA's initial weights, which PEFT draws from the global state
        trained = unlock(student, config.unlock)
    with task.running():
        trained = freeze_unused(task, trained, size)
    shares, frozen = None, partial(frozen_weights, config.frozen_dtype, student, task.teacher.backbone)
    with frozen() as reading, reading:
        if config.optim.trust_region:
            shares = calibrated_shares(task, trained, images, config, run, accelerator)
        if validator is not None and config.frozen_dtype == "bf16":
            validator.measure_original(task.teacher.backbone)
    sharded = None
    if world > 1 and shards_weights():
        bf16 = accelerator.mixed_precision == "bf16"
        sharded = ShardedStudent(student, trained, bf16=bf16, reshard=reshards())
        trained = sharded.trained
    optim = optimizer(trained, config.optim, shares)
    average = MovingAverage(trained, config.optim.ema) if config.optim.ema is not None else None

    steps_per_epoch = order.steps_per_epoch / accumulate
    steps = config.num_steps(order.steps_per_epoch)

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
    before = past_sessions(run, done)
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

    def sessions() -> Sessions:
        seconds = before.seconds + time.perf_counter() - started
        return Sessions(seconds=round(seconds, 3), skipped=before.skipped | broken.reasons.keys())

    target_cache = None
    if config.target.cache:
        plan = plan_cache(student, len(images), config, world)
        target_cache = TargetCache(run.path / "targets", accelerator.device, plan.cached)
    with (
        stop_signals() as stop,
        task.running(),
        frozen() as reading,
        compiled(config.compile, student, task.teacher.backbone),
        memory.running(),
        run.log.open("a") as log,
    ):
        model = accelerator.prepare_model(student) if sharded is None else sharded
        if world > 1 and sharded is None:
            memory.rehearse(model, max((part.shape for part in images.parts), key=math.prod), accelerator)
        images_per_step = config.batch_size * accumulate * world
        step_logger = StepLogger(log, accelerator, images_per_step, steps, run, observe or (lambda *_: None))
        metrics: StepMetrics | None = None
        for step in range(done, done if best is not None and best.turned else steps):
            lr = learning_rate(config.optim, step, steps, steps_per_epoch)
            set_learning_rate(optim, lr)

            accumulated = list(islice(batches, accumulate))
            for batch in accumulated:
                broken.add(batch)
            sums: dict[str, Tensor] = {}
            names = [name for batch in accumulated for name in batch.names]
            sizes: list[tuple[int, int]] = []
            while len(sizes) < accumulate:
                micro = len(sizes)
                batch = accumulated[micro]
                indices = batch.indices.tolist()
                part = images.parts[indices[0] % num_sizes]  # a batch has images of one size
                pixels = as_input(student, batch.images)
                views = partial(keyed_generator, "views", config.seed, step, micro, rank)
                if target_cache is not None:
                    make = partial(_target_of, task, pixels, views, part.margin)
                    target = target_cache.read(indices, make)
                else:
                    target = task.target(pixels, views(), part.margin)
                # Processes exchange gradients once a step, with the last accumulated batch.
                last = micro + 1 == accumulate
                with nullcontext() if last else accelerator.no_sync(model):
                    values = memory.backward(
                        model, pixels, target, part.margin, divisor=accumulate,
                        backward=accelerator.backward, alone=lambda: accelerator.no_sync(model),
                    )  # fmt: skip
                if values is None:  # out of memory: the step begins again, with less of it
                    optim.zero_grad()
                    sums, sizes = {}, []
                    continue
                sizes.append(part.shape)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value / accumulate

            if config.optim.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained.values(), config.optim.clip_norm)
            optim.step()
            optim.zero_grad()
            if average is not None:
                average.update()

            measured = None
            due = best is not None and ((step + 1) % every == 0 or step + 1 == steps)
            if validator is not None and (due or step + 1 == EARLY):
                with average.applied() if average is not None else nullcontext(), reading:
                    measured = on_all_processes(validator(student), accelerator)
                    if best is not None:
                        best.update(step + 1, measured)
                if best is None:  # a worse state would be the result
                    warn_wrecked(step + 1, measured, validator.original)

            # The previous step's numbers are on the host by now. All processes read the same numbers, so they
            # stop together.
            of_each = sizes if num_sizes > 1 else None
            newest = StepMetrics(
                step + 1, lr, names, sums, stop.is_set(), accelerator, measured, of_each, memory.use
            )  # fmt: skip
            previous, metrics = metrics, newest
            stopping = previous is not None and step_logger.write(previous)
            turned = best is not None and best.turned
            if stopping or turned or step + 1 == steps or (step + 1) % config.checkpoint_every == 0:
                stopping = step_logger.write(metrics) or stopping
                metrics = None
                main = accelerator.is_main_process
                if main or sharded is not None:
                    save_state(run, step + 1, saved_tensors, optim, facts, sessions(), write=main)
                accelerator.wait_for_everyone()
            done = step + 1
            if turned:
                break
            if stopping and step + 1 < steps:
                raise Interrupted(
                    f"stopped after step {step + 1} of {steps}, checkpoint written; go on with the run: "
                    f"{resume_command(run.path)}"
                )
        if sharded is None:
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
    if sharded is not None:
        sharded.gather()
    student.low_rank = merge_lora(student, task.teacher.backbone)
    return Outcome(
        steps=done,
        images=done * step_logger.images_per_step,
        seconds=sessions().seconds,
        trained=sum(parameter.numel() for parameter in trained.values()),
        skipped=sorted(sessions().skipped),
        best_step=best.step if best is not None else None,
        **memory.use,
    )


def _target_of(
    task: RetrofitTask,
    pixels: Tensor,
    views: Callable[[], torch.Generator],
    margin: tuple[int, int],
    places: Sequence[int],
) -> Features:
    """Makes the targets of some images of a batch."""
    return task.target(pixels[list(places)], views(), margin)


def calibrated_shares(
    task: RetrofitTask,
    trained: Mapping[str, nn.Parameter],
    images: Crops | MixedCrops,
    config: DistillConfig,
    run: RunFolder,
    accelerator: "Accelerator",
) -> dict[str, float]:
    """Measures what a step of each role does on one batch; returns each parameter's share of the rate.

    The rates are written to the run folder, so that a resumed run has the same; so has every process.
    """
    roles = parameter_roles(task.student, trained)
    if accelerator.is_main_process and not run.rates.is_file():
        order = Order(len(images), config.batch_size, config.seed, num_sizes=len(images.parts))
        batch = next(iter(loader(images, order, 0, 1, workers=0)))  # the first one is of the main size
        margin = images.parts[0].margin
        pixels = as_input(task.student, batch.images)
        grouped: dict[str, dict[str, nn.Parameter]] = {}
        for name, parameter in trained.items():
            grouped.setdefault(roles[name], {})[name] = parameter
        memory = StepMemory(task, config)
        with task.running(), memory.running():
            target = task.target(pixels, keyed_generator("rates", config.seed), margin)
            while memory.backward(task.student, pixels, target, margin) is None:
                task.student.zero_grad()
            few = pixels[:CALIBRATED]
            rates = calibrate(
                grouped, lambda: task.features(task.student, few, margin)[1], config.optim.max_movement
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


def on_all_processes(measured: Measurement, accelerator: "Accelerator") -> Measurement:
    """Returns the mean over processes, so that all of them decide alike."""
    if accelerator.num_processes == 1:
        return measured
    own = torch.tensor(measured, dtype=torch.float64, device=accelerator.device)
    return Measurement(*cast(Tensor, accelerator.reduce(own, "mean")).tolist())
