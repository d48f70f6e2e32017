"""The program around the commands: log lines, signals, errors and the exit status."""

import logging
import os
import select
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from phreg import __version__
from phreg.cli.commands import ABOUT, CHECK_FAILED, COMMANDS, app
from phreg.cli.printing import PLAIN, console, say
from phreg.cli.suggestions import suggestions
from phreg.deprecated import OldNameWarning, current_command_line
from phreg.errors import Interrupted, MaxDropError, PhregError
from phreg.storage import resume_command

logger = logging.getLogger("phreg")

REFUSED = 2
"""Exit status of a command line that is wrong, as argparse and tyro set it."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells set it."""

READER_GONE = 141
"""Exit status where the output's reader has left, as shells set it for SIGPIPE."""

TERMINATED = 143
"""Exit status after SIGTERM, as shells set it, and after the signals that Slurm sends before a time limit."""

ENDING_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
"""Signals that end the program."""


@contextmanager
def _old_names_logged() -> Iterator[None]:
    """Logs each old name that is used, once, in place of Python's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", OldNameWarning)
        show, logged = warnings.showwarning, set[str]()

        def log(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, OldNameWarning):
                show(message, category, *where, **more)
            elif str(message) not in logged:
                logged.add(str(message))
                logger.warning("%s", message)

        warnings.showwarning = log
        yield


def _reader_is_gone() -> bool:
    """Tells whether who read the output has left, as `head` does, and writes no more to them."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    gone = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(gone)


def _parse_and_run(words: list[str]) -> None:
    """Runs a command; a command line that is refused gets suggestions."""
    try:
        app.cli(prog="phreg", description=ABOUT, args=words)
    except SystemExit as end:
        if end.code == REFUSED:
            for line in suggestions(words, COMMANDS):
                say(line, to=Console(stderr=True, **PLAIN))
        raise


def _say_how_to_go_on(words: list[str]) -> None:
    """Says that the work was stopped, and by which command to go on with it."""
    again = shlex.join(["phreg", *words])
    kept = ""
    if words[:1] == ["distill"] and (run := _begun_run(words)) is not None:
        again = resume_command(run)
        kept = " The run goes on from its last checkpoint."
    elif words[:1] == ["evaluate"]:
        kept = " Finished runs and features are kept."
    say(f"stopped.{kept} To go on: {again}", alarm="phreg: ", to=Console(stderr=True, **PLAIN))


def _begun_run(words: list[str]) -> Path | None:
    """Finds the run folder that a command line names, if the run has logged a step."""
    given = [after for word, after in pairwise(words) if word == "--output"]
    given += [word.removeprefix("--output=") for word in words if word.startswith("--output=")]
    log = Path(given[-1]) / "log.jsonl" if given else None
    return log.parent if log is not None and log.is_file() and log.stat().st_size else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a deliberate error is printed without a traceback."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", datefmt="[%X]",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False)],
    )  # fmt: skip
    logger.setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # which warns of fonts that no chart needs
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        console.print(f"phreg {__version__}")
        return
    # They end as an exception does, so that what was begun is tidied up.
    before = {number: signal.signal(number, lambda *_: sys.exit(TERMINATED)) for number in ENDING_SIGNALS}
    try:
        with _old_names_logged():
            _parse_and_run(current_command_line(words))
    except PhregError as error:
        say(str(error), alarm="phreg: ", to=Console(stderr=True, **PLAIN))
        if isinstance(error, MaxDropError):
            sys.exit(CHECK_FAILED)
        sys.exit(INTERRUPTED if isinstance(error, Interrupted) else 1)
    except KeyboardInterrupt:
        _say_how_to_go_on(words)
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if end.code == TERMINATED:
            _say_how_to_go_on(words)
        raise
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        sys.exit(READER_GONE)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
