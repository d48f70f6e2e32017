"""The flags of `phreg distill`, built from `phreg.config`, and the settings of a task given as KEY=VALUE.

Only given flags are passed on, so a flag wins over a recipe, and a recipe over what its method implies.
"""

from collections.abc import Callable, Sequence
from inspect import signature
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

from pydantic import BaseModel
from tyro.conf import arg

from phreg import config
from phreg.deprecated import current_name
from phreg.errors import ConfigError
from phreg.methods import METHODS
from phreg.parsing import parse_toml

COMMON = ("images", "output", "method", "registers", "size", "epochs", "batch_size", "device")
"""What most runs set; the help begins with it."""


def unset(metavar: str) -> Any:
    """Describes a flag whose help says itself what leaving it out means."""
    return arg(metavar=metavar, help_behavior_hint="")


def _flags(section: type[BaseModel] = config.DistillConfig, prefix: str = "") -> Any:
    """Builds the type of distill's flags from the settings: a dictionary of given flags, by section."""
    flags: dict[str, Any] = {}
    rank = {name: place for place, name in enumerate(COMMON)}
    for name, field in sorted(section.model_fields.items(), key=lambda item: rank.get(item[0], len(rank))):
        kind: Any = field.annotation
        if prefix + name == "model":
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            flags[name] = _flags(kind, f"{prefix}{name}.")
            continue
        # A flag that is not given is unset; none needs a way to say None.
        kinds = tuple(kind for kind in get_args(kind) if kind is not NoneType)
        kind = Union[kinds] if get_origin(kind) in (Union, UnionType) else kind  # noqa: UP007
        if prefix + name == "mixed_sizes":
            kind = tuple[int, ...]  # of numbers alone nobody could tell which two are one size
        description = field.description
        if prefix + name == "method":
            kind = Literal[tuple(METHODS)]
            description = f"{description} {' '.join(f'{m.name}: {m.summary}.' for m in METHODS.values())}"
        text = " ".join(f"{description} {default_text(prefix + name, field.default)}".split())
        flags[name] = Annotated[kind, arg(help=text, help_behavior_hint="")]
    make: Any = TypedDict
    made = make(section.__name__, flags, total=False)
    made.__doc__ = section.__doc__
    return made


def default_text(key: str, default: Any) -> str:
    """Tells the default of a setting, which is the default method's, and the methods that imply another."""

    def text(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    usual = METHODS[config.DistillConfig.model_fields["method"].default].settings.get(key, default)
    others: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        # A method that trains nothing leaves most settings unused.
        value = method.settings.get(key, default if method.trains else usual)
        if value != usual and value not in (None, ()):
            others.setdefault(text(value), []).append(name)
    parts = [] if usual in (None, ()) else [f"default: {text(usual)}"]
    parts += [f"{', '.join(names)}: {value}" for value, names in others.items()]
    return f"({'; '.join(parts)})" if parts else ""


if TYPE_CHECKING:
    Settings = dict[str, Any]
else:
    Settings = _flags()


def task_settings(given: Sequence[str], command: Callable[..., None]) -> dict[str, Any]:
    """Reads settings of a task given as KEY=VALUE; those that are flags of the command are refused."""
    parameters = signature(command).parameters
    flags = [name for name, flag in parameters.items() if flag.kind != flag.POSITIONAL_ONLY]
    problems = [f"{text}: expected KEY=VALUE" for text in given if not text.partition("=")[2]]
    keys = [text.partition("=")[0] for text in given]
    for key in dict.fromkeys(keys):
        if (flag := current_name("evaluate", key)) in flags:
            problems.append(f"{key}: no setting of a task; give it by --{flag.replace('_', '-')}")
        elif key == "observe":
            problems.append(f"{key}: unknown key")  # of phreg.evaluate alone
        if keys.count(key) > 1:
            problems.append(f"{key}: given {keys.count(key)} times; keep one")
    if problems:
        raise ConfigError("--set", problems)
    return {key: _value(text) for key, _, text in (item.partition("=") for item in given)}


def _value(text: str) -> Any:
    """Reads lists and tables as TOML; all else stays a text, which the setting makes sense of, commas too."""
    if text[0] not in "[{" or text == "{}":  # which is a template, and no table
        return text
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
