"""The processes of one evaluation, as `accelerate launch` and torchrun start them.

    pictures ──each process reads a part──► features ──gathered──► all of them, in order, in every process

Every process goes through the same evaluation and has the same figures. What is split is the model's forwards
over pictures that are read in order, which take most of the time; heads are trained by every process for
itself, as are crops read. The main process alone writes, into a folder that all processes see.

What goes from one process to another lies on the CPU, so gloo serves any device. An error that is foreseen in
one process is raised in all.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import distributed

from phreg.errors import PhregError
from phreg.processes import gathered

OwnType = TypeVar("OwnType")

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets."""


@dataclass(frozen=True)
class Processes:
    """This process among those of an evaluation.

    Attributes:
        rank: Its number; that of the main one is 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def gather(self, make: Callable[[], OwnType]) -> list[OwnType]:
        """Makes a part in each process, and gives all parts to each, in the processes' order.

        Raises:
            PhregError: `make` raised one, in any process.
        """
        if self.count == 1:
            return [make()]
        try:
            own: Any = make()
        except PhregError as error:
            own = error
        found = gathered(own)
        for part in found:
            if isinstance(part, PhregError):
                raise part
        return found

    def from_main(self, make: Callable[[], OwnType]) -> OwnType:
        """Makes something in the main process alone, and gives it to all, once all are there.

        Raises:
            PhregError: `make` raised one.
        """
        parts = self.gather(lambda: make() if self.is_main else None)
        return parts[0]  # pyright: ignore[reportReturnType]

    def wait(self) -> None:
        """Waits until all processes are here."""
        self.gather(lambda: None)

    def device(self) -> str | None:
        """Names the device of this process; None leaves it to torch, as where there is one process."""
        if self.count == 1:
            return None
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        if on_cpu or not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{os.environ.get('LOCAL_RANK', self.rank)}"


ALONE = Processes()
"""A process on its own."""


@contextmanager
def launched_processes() -> Iterator[Processes]:
    """Joins the processes that a launcher started, for as long as the context lasts.

    Where there is one, or a script has joined them for purposes of its own, this process is on its own.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2 or not all(name in os.environ for name in LAUNCHED) or distributed.is_initialized():
        yield ALONE
        return
    distributed.init_process_group("gloo")
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def is_main_process() -> bool:
    """Tells whether a launcher, if there is one, started this process as the main one."""
    return os.environ.get("RANK", "0") == "0"
