"""Reads JSON and TOML. Whatever is wrong with a text is a `ValueError`, nesting without end too.

All of phreg reads both here, so that a damaged or hostile file is one kind of error, which each reader words.
"""

import json
import re
import tomllib
from typing import Any

DEEPEST = 100
"""Levels that a text may have; those that phreg and the model libraries write have a dozen at most."""

LARGE = 2**24
"""Characters from which on a JSON text is data, such as the boxes of COCO, which nothing walks down in."""


def parse_json(text: str | bytes) -> Any:
    """Reads a JSON text.

    Raises:
        ValueError: It is no JSON, no UTF-8, or nested too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if len(text) < LARGE:
        _check_depth(value)
    return value


def parse_toml(text: str) -> dict[str, Any]:
    """Reads a TOML text.

    Raises:
        ValueError: It is no TOML, or nested too deep.
    """
    # Of a dotted key tomllib keeps every beginning, which takes memory by the square of its length.
    words = re.split(r"[=,{}\[\]\s]", re.sub(r"[ \t]*\.[ \t]*", ".", text))
    if any(word.count(".") > DEEPEST for word in words):
        raise ValueError(f"nested deeper than {DEEPEST} levels by a dotted key")
    try:
        table = tomllib.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    _check_depth(table)
    return table


def _check_depth(value: Any) -> None:
    """Refuses what later code, which goes down level by level, could not walk."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError(f"nested deeper than {DEEPEST} levels")
