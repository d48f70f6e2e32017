"""What the processes of one run do together, and how they end together.

    one makes, all get     on_main      the search for sinks
    each makes a share     in_shares    references and measurements on held-out images
    each has a part        gathered     features of an evaluation
    one dies, all end      watched      a heartbeat a process, in the store that they met through

A process that waits for another may wait long: the other searches, measures or writes. So collectives are
given a day (`TIMEOUT`), and heartbeats tell a process that works from one that is gone.
"""

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from phreg.errors import PhregError
from phreg.progress import track

T = TypeVar("T")

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(days=1)
"""How long a collective may take."""

BEAT = 2.0
"""Seconds between heartbeats."""

SILENT = 40.0
"""Seconds without a heartbeat after which a process counts as gone."""

GRACE = 5.0
"""Seconds that a process gets to end by itself once another has failed: all may have met the same error."""

_watches = count()
"""Numbers the runs of a process; those of one run have the same number in all processes."""


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def world() -> int:
    """Counts the processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_main(make: Callable[[], T]) -> T:
    """Makes something on the main process and hands it to all.

    Tensors of the main process's GPU arrive on this process's own.
    """
    if world() == 1:
        return make()
    box: list[Any] = [_pack(make()) if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return _unpack(box[0])


def in_shares(
    number: int, make: Callable[[int], T], what: str | None = None, *, even: bool = False
) -> list[T]:
    """Makes things of which each process makes a share, and hands all of them to all.

    Args:
        number: How many things there are.
        make: Makes the thing of an index; what it makes must not depend on the process.
        what: Name of the work, to tell progress of this process's share.
        even: Whether each process makes as many, some of them twice: where making is a collective.

    Returns:
        All things, by index.
    """
    share = range(rank(), number, world())
    own = [make(index) for index in (track(what, share) if what else share)]
    if even and len(share) < -(-number // world()):
        make(number - 1)
    parts = gathered(own)
    return [parts[index % world()][index // world()] for index in range(number)]


def gathered(own: T) -> list[T]:
    """Hands what each process has to all, by the number of the process."""
    if world() == 1:
        return [own]
    packed: list[Any] = [None] * world()
    dist.all_gather_object(packed, _pack(own))
    return [_unpack(part) for part in packed]


def _pack(made: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(made, buffer)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    """Reads what another process of this run packed: memory of the same program, not a file."""

    def here(storage: Any, location: str) -> Any:
        if location.startswith("cuda"):
            location = f"cuda:{torch.cuda.current_device()}"
        return torch.serialization.default_restore_location(storage, location)

    return torch.load(io.BytesIO(packed), map_location=here, weights_only=False)


@contextmanager
def watched(advice: str) -> Iterator[None]:
    """Ends this process with a message where another one of the run fails or dies inside the context.

    Args:
        advice: How to go on, for the message.

    Raises:
        PhregError: A collective failed because another process is gone.
    """
    if world() == 1:
        yield
        return
    watch = _Watch(advice)
    watch.start()
    try:
        yield
    except BaseException as error:
        watch.stop(f"failed: {type(error).__name__}: {error}")
        if _is_broken_connection(error):
            raise PhregError(
                f"process {rank()} of {world()} lost the others, so one of them has ended ({_first(error)}); "
                f"see its own message, then {advice}"
            ) from error
        raise
    watch.stop("done")


def _is_broken_connection(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first(error: BaseException) -> str:
    return str(error).splitlines()[0][:200]


class _Watch(threading.Thread):
    """Tells the other processes that this one lives, and watches whether they do."""

    def __init__(self, advice: str) -> None:
        super().__init__(name="phreg-processes", daemon=True)
        self.advice, self._ended = advice, threading.Event()
        # A connection of its own: that of the collectives may be busy waiting.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.distributed_c10d.PrefixStore(f"phreg/{next(_watches)}", store)
        self._rank, self._world = rank(), world()

    def run(self) -> None:
        """Beats and looks until stopped; ends the program where another process is gone."""
        last = dict.fromkeys(set(range(self._world)) - {self._rank}, "")
        heard = dict.fromkeys(last, time.monotonic())
        for beat in count():
            try:
                self._store.set(str(self._rank), str(beat))
                gone = self._look(last, heard)
            except (dist.DistError, RuntimeError):
                gone = "process 0, through which all met, is gone"
            if gone and not self._ended.wait(GRACE):
                self._end(gone)
            if self._ended.wait(BEAT):
                return

    def _look(self, last: dict[int, str], heard: dict[int, float]) -> str | None:
        """Reads the heartbeats of the others; returns what is wrong."""
        now = time.monotonic()
        for number in last:
            said = self._store.get(str(number)).decode() if self._store.check([str(number)]) else ""
            if said.startswith("failed: "):
                return f"process {number} {said}"
            if said != last[number] or said == "done":
                last[number], heard[number] = said, now
            elif now - heard[number] > SILENT:
                return f"process {number} has given no sign of life for {SILENT:g} s"
        return None

    def _end(self, gone: str) -> None:
        """Ends the program: its main thread may wait inside a collective, where no exception reaches it."""
        logger.error(
            "process %d of %d ends, as %s; see that process's own message, then %s",
            self._rank, self._world, gone, self.advice,
        )  # fmt: skip
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)

    def stop(self, last_words: str) -> None:
        """Ends the watch, and tells the others why."""
        self._ended.set()
        self.join()
        with suppress(dist.DistError, RuntimeError):  # the process that holds the store may have ended
            self._store.set(str(self._rank), last_words)
