"""Where a step of phreg's loop spends its time: functions of the loop, replaced by timed ones.

The stopwatch waits for the device at each change of part, so the parts add up, but a step of several parts
takes longer than it would undisturbed. It is for shares, never for speed.
"""

import functools
import pkgutil
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch


class Reading(NamedTuple):
    """The clock, and the kernel's counters of this process."""

    seconds: float
    page_faults: float
    system_seconds: float


def read(device: str) -> Reading:
    """Waits for the device, then reads."""
    if device == "cuda":
        torch.cuda.synchronize()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Reading(time.perf_counter(), usage.ru_minflt, usage.ru_stime)


def per_step(before: Reading, after: Reading, steps: int) -> Reading:
    """Takes a step's share of what lies between two readings."""
    return Reading(*((later - earlier) / steps for earlier, later in zip(before, after, strict=True)))


def forward_part() -> str:
    """Tells a teacher's forward from a student's: only the teacher runs under inference mode."""
    return "teacher forward" if torch.is_inference_mode_enabled() else "student forward"


PARTS: dict[str, str | Callable[[], str]] = {
    "phreg.training.loop.as_input": "normalise",
    "phreg.teacher.sample_views": "views",
    "phreg.views.Views.apply": "views",
    "phreg.backbones.base.Backbone.forward": forward_part,
    "phreg.views.Views.undo": "undo and average",
    "phreg.teacher.Teacher.__call__": "undo and average",
    "phreg.training.task.total_loss": "loss",
    "accelerate.Accelerator.backward": "backward",
    "torch.optim.AdamW.step": "optimizer",
    "phreg.training.loop.StepMetrics.__init__": "logging",
    "phreg.training.loop.StepLogger.write": "logging",
}
"""Functions of the loop, and the part of a step that each belongs to."""

BATCHES = "phreg.training.loop.loader"
"""The function whose batches the loop waits for."""


class Stopwatch:
    """Splits time among parts; what an inner part takes does not count for the outer one.

    Args:
        device: Waited for at each change of part.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = Counter[str]()
        self.running = ["rest"]
        self.last = read(device).seconds

    def lap(self) -> None:
        """Books the time since the last call on the part that runs."""
        now = read(self.device).seconds
        self.seconds[self.running[-1]] += now - self.last
        self.last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Books what happens inside on a part."""
        self.lap()
        self.running.append(name)
        try:
            yield
        finally:
            self.lap()
            self.running.pop()

    @contextmanager
    def on_the_loop(self) -> Iterator[None]:
        """Times the parts of any phreg run inside."""
        with ExitStack() as patches:
            for path, name in PARTS.items():
                patches.enter_context(mock.patch(path, self._timed(name, pkgutil.resolve_name(path))))
            patches.enter_context(mock.patch(BATCHES, self._awaited(pkgutil.resolve_name(BATCHES))))
            yield

    def _timed(self, name: str | Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name()):
                return function(*args, **kwargs)

        return timed

    def _awaited(self, batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def awaited(*args: Any, **kwargs: Any) -> Iterator[Any]:
            source = batches(*args, **kwargs)
            while True:
                with self.part("waiting for data"):
                    batch = next(source, None)
                if batch is None:
                    return
                yield batch

        return awaited
