"""The folders phreg writes: what tells them, and how a file of theirs is written, whole or not at all.

    phreg.json          beside adapter.safetensors (an adapter) or phreg.safetensors (a model saved whole)
    phreg_export.json   beside the files of any other format

Every write goes to a temporary name first, is flushed to the disk and then renamed, so that a crash leaves
the old file or the new one.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from phreg.errors import PhregError

ADAPTER_FILE = "phreg.json"
"""The file that makes a folder one of phreg's own formats, and names the format."""

EXPORT_FILE = "phreg_export.json"
"""The file, unknown to stock loaders, that says what was exported and how equal it is."""

ADAPTER_FORMAT = "phreg-adapter"
"""The tensors that differ from a base checkpoint."""

MODEL_FORMAT = "phreg-model"
"""All tensors, and the config of the class: the `merged` export, which a patched transformers model's own
`save_pretrained` writes too."""

ADAPTER_TENSORS, MODEL_TENSORS = "adapter.safetensors", "phreg.safetensors"
"""The files of tensors beside `phreg.json`, of either."""

OWN_FORMATS: dict[str, str] = {ADAPTER_FORMAT: "adapter", MODEL_FORMAT: "merged"}
"""phreg's own formats: what a record calls them -> what `phreg.formats.FORMATS` does."""

FORMAT_VERSION = 2
"""Newest version of either file that this phreg reads, and the one that it writes."""


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which then takes the place of `folder` at once.

    Raises:
        OSError: The disk does not take it; an old folder of that name is still whole.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a write that was killed
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file atomically: a temporary one beside it, flushed to the disk, renamed.

    Args:
        path: The file.
        write: Writes the content to the path that it is given.

    Raises:
        OSError: The disk does not take it; an old file of that name is still whole.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        let_others_read(temporary)
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically.

    Raises:
        OSError: The disk does not take it; an old file of that name is still whole.
    """
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


@contextmanager
def writing(path: Path, advice: str, error: type[PhregError] = PhregError) -> Iterator[None]:
    """Turns the failure of a write inside into one clear error.

    Args:
        path: What is written, a file or a folder.
        advice: What the user can do about it. Whoever calls words it, since not every command has the same
            flags.
        error: Kind of the error.
    """
    try:
        yield
    except (OSError, SafetensorError) as problem:
        raise error(f"cannot write {path} ({problem}); {advice}") from problem


def resume_command(folder: Path) -> str:
    """Writes the command that goes on with a run, as a shell takes it."""
    return f"phreg distill --output {shlex.quote(str(folder))} --resume"


def let_others_read(path: Path) -> None:
    """Gives a file the permissions of any new file; safetensors lets nobody but the owner read its files."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def flush(path: Path) -> None:
    """Waits until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
