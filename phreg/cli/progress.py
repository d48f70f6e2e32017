"""Progress of long work: bars on a terminal, a line every few seconds elsewhere."""

import time
from contextlib import AbstractContextManager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from phreg.cli.printing import console, say

LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""


class ProgressReporter(AbstractContextManager["ProgressReporter"]):
    """Shows progress by the name of the work: bars on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        what = TextColumn("{task.description}", markup=False)
        columns = [what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, Any] = {}
        self._last = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows one more part done."""
        if console.is_terminal:
            if what not in self._tasks:
                self._progress.start()
                self._tasks[what] = self._progress.add_task(what, total=total)
            self._progress.update(self._tasks[what], completed=done, visible=done < total)
        elif what not in self._tasks or done == total or time.perf_counter() - self._last > LINE_EVERY:
            self._tasks[what] = None  # one line when it begins
            self._last = time.perf_counter()
            say(f"{what} {done}/{total}")


class TrainingProgress(AbstractContextManager["TrainingProgress"]):
    """Shows training steps: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        loss, speed = "loss {task.fields[loss]:.4f}", "{task.fields[speed]:.1f} images/s"
        columns = [
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn(loss),
            TextColumn(speed),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(TextColumn("step"), *columns, console=console, transient=True)
        self._task: Any = None
        self._last = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, record: Any, steps: int) -> None:
        """Shows one step's record."""
        if console.is_terminal:
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task("train", total=steps, loss=record.loss, speed=0.0)
            self._progress.update(
                self._task, completed=record.step, loss=record.loss, speed=record.images_per_second
            )
        elif time.perf_counter() - self._last > LINE_EVERY or record.step == steps:
            self._last = time.perf_counter()
            speed = f"{record.images_per_second:.1f} images/s"
            console.print(f"step {record.step}/{steps}  loss {record.loss:.4f}  {speed}")
