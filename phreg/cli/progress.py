"""Progress of long work: bars on a terminal, a line every few seconds elsewhere."""

import os
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
        elif what not in self._tasks or time.perf_counter() - self._last > LINE_EVERY:
            say(f"{what} {done}/{total}" if what in self._tasks else f"{what} …")
            self._tasks[what] = None  # one line when it begins
            self._last = time.perf_counter()

    def stopping(self) -> None:
        """Says at once that training will stop. A signal handler calls it, so no stream may be used."""
        if os.environ.get("RANK", "0") == "0":  # of many processes one speaks
            os.write(2, b"\nStopping after this step; a checkpoint follows. Ctrl-C again ends now.\n")

    def step(self, record: Any, steps: int) -> None:
        """Shows one training step's record."""
        described = f"loss {record.loss:.4f}  {record.images_per_second:.1f} images/s"
        if console.is_terminal:
            self("training", record.step, steps)
            self._progress.update(self._tasks["training"], description=f"training  {described}")
        elif time.perf_counter() - self._last > LINE_EVERY or record.step == steps:
            self._last = time.perf_counter()
            say(f"step {record.step}/{steps}  {described}")
