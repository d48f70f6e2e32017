"""The methods of `phreg distill`, by name. A new one is a module here and a line in `METHODS`."""

import os
from collections.abc import Mapping
from typing import Any

from phreg.config import DistillConfig, UnlockConfig
from phreg.errors import ConfigError
from phreg.methods import auto, denoise, paper, relocate, test_time
from phreg.methods.base import Method
from phreg.settings import read_settings, validate

METHODS: dict[str, Method] = {
    method.name: method
    for method in (auto.METHOD, relocate.METHOD, denoise.METHOD, paper.METHOD, test_time.METHOD)
}


def resolve(
    recipe: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    clip: bool = False,
    written_by_phreg: bool = False,
) -> DistillConfig:
    """Builds the configuration of a run.

    Args:
        recipe: Name of a shipped recipe, or path of a TOML file.
        overrides: Settings that win over the recipe, by dotted key (`{"optim.lr": 1e-3}`) or nested.
        clip: Whether the model is CLIP-type. A method can imply other settings for those.
        written_by_phreg: Whether the recipe is that of a run; old names in it are then no reason to warn.

    Raises:
        ConfigError: Any setting is wrong; all problems are listed.
    """
    source, given = read_settings(recipe, overrides, written_by_phreg=written_by_phreg)
    name = given.get("method", DistillConfig.model_fields["method"].default)
    method = METHODS.get(name)
    problems = []
    if method is None:
        *others, last = map(repr, METHODS)
        problems.append(f"method: should be {', '.join(others)} or {last}, found {name!r}")
    elif not method.trains:
        problems += [
            f"{key}: method {name} trains nothing, found {given[key]}; leave it out, or choose another method"
            for key in ("steps", "epochs", "mixed_sizes")
            if given.get(key) not in (None, (), [])
        ]
    implied = dict(method.implied(clip=clip)) if method is not None else {}
    if "steps" in given:  # which set the length too
        implied.pop("epochs", None)
    try:
        config = validate(_lora_for_blocks(implied, given), source=source)
    except ConfigError as error:
        raise ConfigError(source, [*problems, *error.problems]) from error
    if problems:
        raise ConfigError(source, problems)
    return config


def _lora_for_blocks(implied: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Joins settings; LoRA and whole blocks exclude each other, unless the user named both.

    LoRA that the user asks for replaces the blocks. LoRA that a method implies gives way to roles.
    The result names all roles, so that a run which is resumed, or repeated from its recipe, trains the same.
    """
    settings = {**implied, **given}
    if "unlock.roles" in given:
        if "unlock.lora.rank" not in given:
            settings["unlock.lora.rank"] = 0
    elif settings.get("unlock.lora.rank"):
        roles = settings.get("unlock.roles", UnlockConfig.model_fields["roles"].default)
        settings["unlock.roles"] = tuple(role for role in roles if not role.startswith("block"))
    return settings
