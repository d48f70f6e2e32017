"""Reads what comes next by threads, while the model computes.

    numbers ──read, by several threads──► a few results ahead ──in order──► whoever computes

Threads will do, as decoding and resampling run outside of the interpreter's lock, and nothing has to be
copied from one process to another.
"""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

MOST_WORKERS = 8
"""Threads at most, unless more are asked for."""

ItemType = TypeVar("ItemType")
ResultType = TypeVar("ResultType")


def default_workers() -> int:
    """Counts the threads that read where nobody says how many: the cores, at most `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def read_ahead(
    read: Callable[[ItemType], ResultType], items: Iterable[ItemType], workers: int, ahead: int = 0
) -> Iterator[ResultType]:
    """Reads items by threads, and gives what they read in the order of the items.

    Args:
        read: Reads one item.
        items: The items, which may be without end.
        workers: Threads.
        ahead: Results that are held, at most, beyond those that are being read.

    Raises:
        Exception: What `read` raised, in the place of its result.
    """
    left = iter(items)
    with ThreadPoolExecutor(max_workers=workers) as pool:
        coming: deque[Future[ResultType]] = deque()
        try:
            for item in itertools.islice(left, workers + ahead):
                coming.append(pool.submit(read, item))
            while coming:
                found = coming.popleft().result()
                for item in itertools.islice(left, 1):
                    coming.append(pool.submit(read, item))
                yield found
        finally:  # where an item cannot be read, or nobody wants the rest
            for future in coming:
                future.cancel()
