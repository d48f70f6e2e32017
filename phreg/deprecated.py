"""Names of the previous version, and the names that replaced them. Old names work for one version, and warn.

`RENAMED` is the only place where an old name stands. Each door that a user's names come through looks there:

    phreg VERB --flag            phreg.cli       current_command_line
    recipe, keyword arguments    phreg.config    current_names
    arguments of other verbs     phreg.api       accept_old_arguments
    phreg.NAME, module.NAME      __getattr__     current_attribute
"""

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

RENAMED: dict[str, dict[str, str]] = {
    # Verbs and other public names.
    "phreg": {"show": "info"},
    "phreg.analysis.class_probe.TokenAccuracy": {"spread": "std"},
    "phreg.config": {"GateConfig": "ChecksConfig"},
    "phreg.errors": {"GateError": "MaxDropError"},
    "phreg.evaluation.features": {"Reading": "FeatureConfig"},
    "phreg.evaluation.record.Summary": {"spread": "std"},
    "phreg.evaluation.results.Difference": {"beyond_spread": "beyond_std", "spread": "std"},
    "phreg.evaluation.results.Results": {"check_gate": "check_max_drop"},
    "phreg.formats.info": {"Shown": "ModelInfo"},
    "phreg.sinks.locate": {"locate": "find_sinks"},
    "phreg.sinks.units.Unit": {
        "kind": "cluster",
        "level": "sink_level",
        "ordinary": "baseline",
    },
    # Settings by dotted key, whole sections, and values as key=value.
    "distill": {
        "gate": "checks",
        "target.keep": "target.cache",
        "views.fill=surroundings": "views.fill=context",
    },
    # Arguments in Python, and flags.
    "inspect": {"against": "baseline", "queries": "texts"},
    "evaluate": {"gate": "max_drop"},
}
"""New names by old ones: by verb for its arguments, by module or class for its attributes."""

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class OldNameWarning(DeprecationWarning):
    """An old name was used; the message says the new one."""


def warn(old: str, new: str) -> None:
    """Warns the caller outside phreg that a name is old."""
    level, frame = 2, sys._getframe(1)  # of `warnings`: 1 is this function
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "phreg":
        level, frame = level + 1, frame.f_back
    text = f"{old} is called {new} now; the next version drops the old name"
    warnings.warn(text, OldNameWarning, stacklevel=level)


def current_name(verb: str, name: str) -> str:
    """Gives the current name of an argument or dotted key; a section's new name counts for its keys too."""
    names = RENAMED.get(verb, {})
    if name in names:
        return names[name]
    section, dot, key = name.partition(".")
    return f"{names.get(section, section)}{dot}{key}"


def current_value(verb: str, name: str, value: Any) -> Any:
    """Gives the current spelling of a value, given the current name of its setting."""
    renamed = RENAMED.get(verb, {}).get(f"{name}={value}") if isinstance(value, str) else None
    return value if renamed is None else renamed.partition("=")[2]


def current_names(
    verb: str, given: Mapping[str, Any], *, quiet: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Replaces old names and values among arguments or dotted keys.

    Args:
        verb: The verb that they are given to.
        given: Values by name.
        quiet: Whether not to warn, since phreg itself wrote them.

    Returns:
        The values by current name, and a problem for each name that is given in both spellings.
    """
    current: dict[str, Any] = {}
    problems = []
    for old, value in given.items():
        name = current_name(verb, old)
        spelled = current_value(verb, name, value)
        if name != old and name in given:
            problems.append(f"{old}: is the old name of {name}, which is given too; keep {name}")
        elif not quiet and name != old:
            warn(old, name)
        elif not quiet and spelled is not value:
            warn(f"{name} = {value}", f"{name} = {spelled}")
        current[name] = spelled
    return current, problems


def accept_old_arguments(
    verb: str,
) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Lets a function take old names of its keyword arguments.

    Args:
        verb: Its name in `RENAMED`.
    """

    def accept(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        @functools.wraps(function)
        def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            current, problems = current_names(verb, kwargs)
            if problems:
                raise TypeError(f"{verb}: {'; '.join(problems)}")
            return function(*args, **current)

        return call

    return accept


def current_attribute(owner: str, name: str) -> str | None:
    """Gives the new name of an attribute and warns of the old one; None where it is no old name."""
    new = RENAMED[owner].get(name)
    if new is not None:
        warn(f"{owner}.{name}", f"{owner}.{new}")
    return new


def current_command_line(arguments: Sequence[str]) -> list[str]:
    """Replaces an old verb, and old flags and values of a verb, and warns of each."""
    if not arguments:
        return []
    verb = current_name("phreg", arguments[0])
    if verb != arguments[0]:
        warn(f"phreg {arguments[0]}", f"phreg {verb}")
    words, key = [verb], ""
    for word in arguments[1:]:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag:
            old = flag.removeprefix("--").replace("-", "_")
            key = _current_key(verb, old)
            if key != old:
                warn(flag, _flag(key))
                flag = _flag(key)
        spelled = current_value(verb, key, value)
        if spelled != value:
            warn(f"{_flag(key)} {value}", f"{_flag(key)} {spelled}")
        words.append(f"{flag}{equals}{spelled}")
    return words


def _current_key(verb: str, old: str) -> str:
    """Gives the current key of a flag; `--section.no-key` switches `section.key` off."""
    section, dot, leaf = old.rpartition(".")
    off = "no_" if leaf.startswith("no_") else ""
    section, dot, leaf = current_name(verb, f"{section}{dot}{leaf.removeprefix(off)}").rpartition(".")
    return f"{section}{dot}{off}{leaf}"


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"
