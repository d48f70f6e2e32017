"""A step's numbers on their way from the device to log.jsonl, the trackers and whoever observes the run."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch
from torch import Tensor

from phreg.errors import TrainingError
from phreg.training.checkpoint import RunFolder, writing_run
from phreg.training.validation import Measurement

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    sizes: list[tuple[int, int]] | None = None
    """Height and width of the images of each batch of the step, in pixels, where a run has several sizes."""
    micro_batch: int | None = None
    """Images per forward and backward pass of the student, where that is less than a batch."""
    checkpointed: bool | None = None
    """True where activations were checkpointed."""


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
        sizes: Height and width of the images of each batch, where a run has several sizes.
        memory: What it took to fit into memory: `micro_batch` and `checkpointed`, where they apply.
    """

    def __init__(
        self,
        step: int,
        lr: float,
        names: list[str],
        values: dict[str, Tensor],
        stop: bool,
        accelerator: "Accelerator",
        measured: Measurement | None = None,
        sizes: list[tuple[int, int]] | None = None,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        self.step, self.lr, self.names, self.keys = step, lr, names, [*values, "stop"]
        self.measured, self.sizes, self.memory = measured, sizes, memory or {}
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
        accelerator: "Accelerator",
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
            record = StepRecord(
                metrics.step, loss, values, metrics.lr, round(speed, 3), held_out, metrics.sizes,
                **metrics.memory,
            )  # fmt: skip
            with writing_run(self.run):
                line = {name: value for name, value in asdict(record).items() if value is not None}
                self.log.write(json.dumps(line) + "\n")
                self.log.flush()
            self.accelerator.log({"loss": loss, "lr": metrics.lr, **values}, step=metrics.step)
            self.observe(record, self.steps)
        return asked > 0
