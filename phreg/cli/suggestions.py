"""What a mistyped command line may have meant, said after the parser's own message."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from typing import Any, get_args

from phreg.formats import Format
from phreg.methods import METHODS
from phreg.settings import fields, nearest

CHOICES = {"method": tuple(METHODS), "format": get_args(Format)}
"""Values of flags that have few."""


def suggestions(words: Sequence[str], commands: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Compares a command line with what there is.

    Args:
        words: The command line.
        commands: Functions of the commands, by name.

    Returns:
        A line for each name that does not exist and has one near it, and where a command's flags are listed.
    """
    if not words or words[0].startswith("-"):
        return []
    command = words[0]
    if command not in commands:
        near = difflib.get_close_matches(command, commands, n=1)
        return [f"There is no command {command}; did you mean phreg {near[0]}?"] if near else []
    known = _flags(commands[command])
    lines, key, unknown = [], "", False
    for word in words[1:]:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag:
            key = flag.removeprefix("--").replace("-", "_")
            if _on(key) not in known:
                unknown, near = True, nearest(_on(key), known)
                hint = f"; did you mean --{near.replace('_', '-')}?" if near else ""
                lines.append(f"{flag}: no flag of phreg {command}{hint}")
        if equals or not flag:
            choices = CHOICES.get(key, ())
            if value not in choices and (near := difflib.get_close_matches(value, choices, n=1)):
                lines.append(f"--{key} {value}: did you mean {near[0]}?")
            key = ""
    return [*lines, f"All flags: phreg {command} --help"] if unknown else lines


def _flags(command: Callable[..., Any]) -> list[str]:
    """Lists the flags of a command; those of `settings` are the settings of phreg.config."""
    named = [
        name for name, flag in signature(command).parameters.items() if flag.kind != Parameter.POSITIONAL_ONLY
    ]
    return [
        *(name for name in named if name != "settings"),
        *(fields() if "settings" in named else ()),
        "help",
    ]


def _on(key: str) -> str:
    """Names the flag that `--no-flag` or `--section.no-flag` switches off."""
    section, dot, leaf = key.rpartition(".")
    return f"{section}{dot}{leaf.removeprefix('no_')}"
