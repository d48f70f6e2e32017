"""The errors phreg raises on purpose.

Every message has three parts: what was asked, what was found, and what to do about it. The command line
prints a `PhregError` without a traceback and exits non-zero; any other exception that escapes is a bug in
phreg.
"""

from collections.abc import Sequence
from typing import Any

from phreg.deprecated import current_attribute


class PhregError(Exception):
    """Base class of every deliberate failure."""


class ConfigError(PhregError):
    """A configuration, recipe or flag is wrong; all its problems are listed at once.

    Attributes:
        problems: One line a problem, each opening with its dotted key.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("" if len(self.problems) == 1 else "s")
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  {problem}" for problem in self.problems))


class UnsupportedModelError(PhregError):
    """The model is not a vision transformer that phreg can patch."""


class LoadError(PhregError):
    """A model, adapter or run could not be found, fetched or trusted."""


class PushError(PhregError):
    """A model could not be put on the hub."""


class DataError(PhregError):
    """The images cannot be read, or there are none."""


class CheckpointError(PhregError):
    """A run cannot be resumed, or its state cannot be written."""


class MaxDropError(PhregError):
    """A model fell further behind the baseline than `max_drop` allows.

    Attributes:
        results: What was measured, a `phreg.evaluation.results.Results`.
    """

    def __init__(self, message: str, results: Any) -> None:
        self.results = results
        super().__init__(message)


class Interrupted(PhregError):
    """The user stopped the work; what was done is kept, and the message says how to go on."""


class TrainingError(PhregError):
    """The training loop met a value it must not go on with, such as a NaN loss."""


def __getattr__(name: str) -> Any:
    """Finds a class by its old name, with a warning."""
    if (new := current_attribute(__name__, name)) is not None:
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
