"""Progress of long work, told to whoever listens.

    with told_to(listener):               # phreg.cli draws bars
        for images in track("norms", batches): …

The work that takes time is deep inside, so the listener is not handed down. It belongs to the current
context. Without one nothing is told.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

ProgressListener = Callable[[str, int, int], None]
"""Takes the name of the work, how many parts of it are done, and how many there are."""

PartType = TypeVar("PartType")

StopListener = Callable[[], None]
"""Takes that work was asked to stop and will do so soon. It is called from within a signal handler."""

_listener: ContextVar[ProgressListener] = ContextVar("listener", default=lambda *_: None)
_stop_listener: ContextVar[StopListener] = ContextVar("stop_listener", default=lambda: None)


@contextmanager
def told_to(listener: ProgressListener, stopping: StopListener = lambda: None) -> Iterator[None]:
    """Tells progress to a listener for as long as the context lasts, and to another that work will stop."""
    token, stop_token = _listener.set(listener), _stop_listener.set(stopping)
    try:
        yield
    finally:
        _listener.reset(token)
        _stop_listener.reset(stop_token)


def tell_stopping() -> None:
    """Tells that work was asked to stop, and will when its present part is done."""
    _stop_listener.get()()


def track(what: str, parts: Sequence[PartType]) -> Iterator[PartType]:
    """Goes through the parts of some work, and tells how many are done: none at first, all at the end.

    Args:
        what: Name of the work.
        parts: The parts.
    """
    tell(what, 0, len(parts))
    for number, part in enumerate(parts, start=1):
        yield part
        tell(what, number, len(parts))


def tell(what: str, done: int, total: int) -> None:
    """Tells how many parts of some work are done, where they are no sequence to go through."""
    _listener.get()(what, done, total)


@contextmanager
def told_of(whose: str) -> Iterator[None]:
    """Puts a name before that of all work, for as long as the context lasts."""
    outer = _listener.get()
    with told_to(lambda what, done, total: outer(f"{whose}: {what}", done, total)):
        yield


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Tells of work that is not counted: that it begins, and that it is done."""
    for _ in track(what, range(1)):
        yield
