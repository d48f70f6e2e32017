"""Result files that several processes may write at once: a protocol, and rows by key.

{"protocol": {…}, "rows": {"relocate/0": {…}, …}}
"""

import fcntl
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from phreg.training.checkpoint import write_text

Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """Reads a result file."""
    return json.loads(path.read_text())


def add(
    path: Path,
    protocol: Mapping[str, Any],
    rows: Mapping[str, Row],
    order: Callable[[str], Any],
    growing: tuple[str, ...] = (),
) -> dict[str, Row]:
    """Adds rows to a result file, in the place of those with the same keys, and returns all.

    Args:
        path: The file; it is made where there is none.
        protocol: What all rows have in common.
        rows: Rows by key.
        order: Sorts keys.
        growing: Parts of the protocol that may have got entries since; those that are there are the same.

    Raises:
        SystemExit: The file is of another protocol.
    """
    protocol = json.loads(json.dumps(protocol))
    path.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{path}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = read(path) if path.exists() else {"protocol": protocol, "rows": {}}
        before = known["protocol"] | {name: protocol[name] | known["protocol"][name] for name in growing}
        if before != protocol:
            raise SystemExit(f"{path} is of another model, data or protocol; choose another --output")
        merged = known["rows"] | rows
        merged = {key: merged[key] for key in sorted(merged, key=order)}
        if rows or not path.exists():
            write_text(path, json.dumps({"protocol": protocol, "rows": merged}, indent=1) + "\n")
        return merged
