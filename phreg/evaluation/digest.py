"""A digest of what was measured: results of one digest may stand in one table, others are not comparable.

It is a hash of the task, the data, the precision and all settings that can change a figure, and of nothing
that tells one model from another. Seeds are left out, as tables give the spread over them. So is the name of
a published protocol: its numbers are in the settings.

Data are known by the names and sizes of their files, relative to the folder, so that the digest is the same
on another machine; files that settings name, such as a list of words, by their contents. Figures at artifacts
depend on the baseline too, which the digest does not hold.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phreg.config import Config
from phreg.settings import flatten

FORMAT = 1
"""Raised when a task computes another figure from the same settings."""

NAMES = ("settings.published", "settings.differs")
"""Settings that say what others are called."""


def what_decides(task: str, contents: str, settings: Config, precision: str) -> dict[str, Any]:
    """Lists what decides a figure beside the model, by dotted key.

    Args:
        task: Name of the task.
        contents: Hash of the data, by `hash_contents`.
        settings: Its settings.
        precision: Of the forwards.
    """
    flat = flatten({"settings": settings.model_dump(mode="json")})
    asked = {key: _by_contents(value) for key, value in flat.items() if not key.startswith(NAMES)}
    return {"format": FORMAT, "task": task, "data": contents, "precision": precision, **asked}


def digest(decides: Mapping[str, Any]) -> str:
    """Hashes what decides a figure, to 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def hash_contents(files: Iterable[tuple[str, int]]) -> str:
    """Hashes the names and sizes of files, to 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(sorted(files)).encode()).hexdigest()[:12]


def differing(decides: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """Says in what one result was measured otherwise than another, a text a key."""
    keys = dict.fromkeys([*decides, *others])
    return [
        f"{key} is {decides.get(key)}, not {others.get(key)}"
        for key in keys
        if decides.get(key) != others.get(key)
    ]


def _by_contents(value: Any) -> Any:
    """Replaces the path of a file by a hash of what it holds."""
    # By this, as a name may be longer than a path can be, or hold what none can.
    if isinstance(value, str) and os.path.isfile(value):  # noqa: PTH113
        return f"file {hashlib.sha256(Path(value).read_bytes()).hexdigest()[:12]}"
    return value
