"""The folder of an export: filled beside its place, and there whole or not at all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from phreg.errors import PhregError
from phreg.formats.export.spec import FOLDER, Contents
from phreg.record import write_record
from phreg.storage import ADAPTER_FILE, flush, let_others_read, replacing


def write(contents: Contents, folder: Path) -> None:
    """Writes all that a folder holds, but what is only known once it was read back."""
    for file, tensors in contents.tensors.items():
        # Copies, since tied weights are two names of one tensor, which safetensors does not write.
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(plain, folder / file, metadata={"format": "pt"})
    for name, write in contents.files.items():
        write(folder / name)
    write_settings(contents, folder, folder)
    if contents.record is not None:
        write_record(folder / ADAPTER_FILE, contents.record)


def write_settings(contents: Contents, folder: Path, place: Path) -> None:
    """Writes the settings into a folder that will be found at `place`."""
    path = json.dumps(str(place))[1:-1]
    for name, settings in contents.settings.items():
        text = json.dumps(settings, indent=2).replace(FOLDER, path)
        (folder / name).write_text(text + "\n", encoding="utf-8")


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `folder` at once, or goes away if anything fails.

    Raises:
        PhregError: There is something in `folder` already, or the disk does not take it.
    """
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise PhregError(f"asked to export to {folder}, which {what}; give a new or an empty folder")
        with replacing(folder) as unfinished:
            yield unfinished
            for file in unfinished.iterdir():
                let_others_read(file)
                flush(file)
            if folder.exists():  # fails where something has come into it meanwhile
                folder.rmdir()
    except (OSError, SafetensorError) as error:
        raise PhregError(
            f"asked to export to {folder}, which cannot be written ({error}); free space, or give another "
            "folder"
        ) from error
