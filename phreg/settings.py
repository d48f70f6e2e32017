"""Settings are read, checked and written here: recipe files, dotted keys, and the trees of `phreg.config`.

recipe.toml, {"optim.lr": 1e-3} ──► by dotted key, current names ──► checked ──► a tree of `phreg.config`
"""

import difflib
import os
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from phreg.config import Config, DistillConfig
from phreg.deprecated import current_names
from phreg.errors import ConfigError
from phreg.parsing import parse_toml

AnyConfig = TypeVar("AnyConfig", bound=Config)


def read_settings(
    recipe: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    written_by_phreg: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Lays overrides over a recipe. Old names are replaced, with a warning.

    Args:
        recipe: Name of a shipped recipe, or path of a TOML file.
        overrides: Settings that win over the recipe, by dotted key (`{"optim.lr": 1e-3}`) or nested.
        written_by_phreg: Whether the recipe is that of a run; old names in it are then no reason to warn.

    Returns:
        What to call the source of the settings in messages, and the settings by dotted key, unchecked.

    Raises:
        ConfigError: The recipe is not there, or not TOML, or gives a setting by its old and its new name.
    """
    given = with_current_names(overrides or {}, source="settings")
    if recipe is None:
        return "settings", given
    path = find_recipe(recipe)
    settings = with_current_names(read_toml(path), source=os.fspath(path), quiet=written_by_phreg)
    return os.fspath(path), settings | given


def with_current_names(settings: Mapping[str, Any], *, source: str, quiet: bool = False) -> dict[str, Any]:
    """Lists settings by dotted key, old names replaced.

    Raises:
        ConfigError: A setting is given by its old and its new name.
    """
    current, problems = current_names("distill", flatten(settings), quiet=quiet)
    if problems:
        raise ConfigError(source, problems)
    return current


def validate(settings: Mapping[str, Any], *, source: str) -> DistillConfig:
    """Checks settings given by dotted key and builds the tree.

    Raises:
        ConfigError: Any setting is wrong; all problems are listed.
    """
    return build(DistillConfig, settings, source=source)


MEANINGS = {
    "bs": "batch_size",
    "data": "images",
    "dataset": "images",
    "decay": "optim.weight_decay",
    "dtype": "precision",
    "ema_decay": "optim.ema",
    "grad_clip": "optim.clip_norm",
    "gradient_accumulation_steps": "optim.accumulate",
    "image_size": "size",
    "img_size": "size",
    "input_size": "size",
    "learning_rate": "optim.lr",
    "lora": "unlock.lora.rank",
    "max_grad_norm": "optim.clip_norm",
    "max_steps": "steps",
    "mixed_precision": "precision",
    "num_epochs": "epochs",
    "num_registers": "registers",
    "num_train_epochs": "epochs",
    "num_views": "views.count",
    "num_workers": "data.workers",
    "optimizer": "optim.name",
    "output_dir": "output",
    "per_device_train_batch_size": "batch_size",
    "r": "unlock.lora.rank",
    "report_to": "trackers",
    "resolution": "size",
    "save_steps": "checkpoint_every",
    "scheduler": "optim.schedule",
    "views": "views.count",
    "warmup": "optim.warmup_steps",
}
"""Settings by names that other tools have for them, or people try."""


def build(kind: type[AnyConfig], settings: Mapping[str, Any], *, source: str) -> AnyConfig:
    """Checks settings given by dotted key and builds a tree of any kind, as `validate` does.

    Raises:
        ConfigError: Any setting is wrong; all problems are listed.
    """
    known = fields(kind)
    problems = [_unknown(key, known) for key in settings if key not in known]
    try:
        tree = _nest({key: value for key, value in settings.items() if key in known})
        config = kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(source, problems + [_problem(details) for details in error.errors()]) from error
    if problems:
        raise ConfigError(source, problems)
    return config


def fields(model: type[BaseModel] = DistillConfig, prefix: str = "") -> dict[str, Any]:
    """Lists every setting by dotted key, as pydantic field descriptions."""
    found: dict[str, Any] = {}
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            found |= fields(info.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = info
    return found


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested settings into dotted keys; keys that are dotted already stay. Paths become text."""

    def items() -> Iterator[tuple[str, Any]]:
        for key, value in settings.items():
            if isinstance(value, BaseModel):
                value = value.model_dump(exclude_unset=True)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            if isinstance(value, Mapping):
                yield from flatten(value, f"{prefix}{key}.").items()
            else:
                yield prefix + key, value

    return dict(items())


def to_toml(config: DistillConfig) -> str:
    """Writes the resolved configuration as TOML that reads back to the same tree."""
    import tomli_w

    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True))


def recipes() -> dict[str, Path]:
    """Lists the shipped recipes by name."""
    packaged = Path(str(resources.files("phreg"))) / "recipes"
    folder = packaged if packaged.is_dir() else Path(__file__).parents[1] / "recipes"
    return {path.stem: path for path in sorted(folder.glob("[!.]*.toml"))}


def find_recipe(recipe: str | os.PathLike[str]) -> Path:
    """Finds a shipped recipe by name, or a recipe file by path.

    Raises:
        ConfigError: There is neither.
    """
    shipped = recipes()
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    if Path(recipe).is_file():
        return Path(recipe)
    near = difflib.get_close_matches(str(recipe), shipped, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped)}"
    raise ConfigError("settings", [f"recipe: no recipe or file {str(recipe)!r}; {hint}"])


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        ConfigError: It cannot be read, or is not TOML.
    """
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(os.fspath(path), [f"cannot be read: {error}"]) from error
    except ValueError as error:
        raise ConfigError(os.fspath(path), [f"not TOML: {error}"]) from error


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = value
    return tree


def nearest(key: str, known: Collection[str]) -> str | None:
    """Finds the setting that an unknown name means: by meaning, by spelling, by its last part's spelling."""
    leaf = key.rsplit(".", 1)[-1]
    meant = MEANINGS.get(leaf)
    if meant in known:
        return meant
    leaves = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1)
    near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, n=1)]
    return near[0] if near else None


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    near = nearest(key, known)
    return f"{key}: unknown key" + (f"; did you mean {near}?" if near else "")


def _problem(details: Any) -> str:
    key = ".".join(
        str(part)
        for part in details["loc"]
        if isinstance(part, str) and "[" not in part and part != "NoneType"
    )
    message = details["msg"].removeprefix("Value error, ")
    if not key:
        return message
    message = message.replace("Input should be", "should be").partition(", unable")[0]
    return f"{key}: {message}, found {details['input']!r}"
