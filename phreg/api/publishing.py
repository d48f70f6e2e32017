"""Exports a patched model to other formats, and pushes it to the Hugging Face hub.

    export   run or model ► folder of another library's format ► loaded back and compared
    push     run or export ► (export) ► folder with model card ► hub

The formats are described in `phreg.formats.export`.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from phreg.backbones import hub, resolve
from phreg.backbones.readout import set_readout
from phreg.errors import PushError
from phreg.formats import export as exports
from phreg.formats import publish
from phreg.formats.export.spec import find_spec
from phreg.formats.load import Model, open_model, record_of, warn_failed_checks
from phreg.record import Equality
from phreg.rollback import unchanged


def export(
    model: Model,
    path: str | os.PathLike[str],
    format: str,
    *,
    revision: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[Equality]:
    """Writes a patched model as a folder that its format's own library loads, and checks that it does.

    Args:
        model: A run, an adapter, or a patched model instance, which stays as it is.
        path: Folder to write; it must not hold anything.
        format: `timm` (most models), `transformers` (DINOv2, as DINOv2 with registers) or `open_clip` (its
            own, text tower included), which load as they are; `remote-code` (any model of transformers, with
            the code to load it); `onnx`; `merged` (for `load` without the base) or `adapter` (for `load` with
            it). See phreg/formats/export/README.md.
        revision: Hub commit, branch or tag of the adapter.
        mean: Mean that images are normalised with, RGB on a scale of 0 to 1, to be written into the folder;
            None means as the model or its record says.
        std: Standard deviation, likewise.

    Returns:
        How equal the written model is at its own size and at others, as measured on loading it back.

    Raises:
        PhregError: The format cannot carry this model; the message names those that can.
    """
    record = None
    if not isinstance(model, nn.Module) and os.fspath(model) != "demo":
        record = record_of(resolve.locate(model, revision))
    backbone, base = open_model(model, revision, mean, std)
    run = None
    if record is not None:  # an instance keeps the read-out that it has
        set_readout(backbone, backbone.trained_readout)
        run = record.run_or_readout
    with unchanged(*([backbone] if isinstance(model, nn.Module) else [])):
        return exports.export(backbone, Path(path), format, base=base, run=run)


@dataclass(frozen=True)
class Pushed:
    """What `push` did.

    Attributes:
        repository: Hub id.
        commit: Address of the commit; None for a dry run.
        folder: The folder that a dry run wrote.
        files: Names of the files.
        num_bytes: Their size together.
    """

    repository: str
    commit: str | None
    folder: Path | None
    files: tuple[str, ...]
    num_bytes: int


def push(
    model: str | os.PathLike[str],
    repository: str,
    *,
    format: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: str | os.PathLike[str] | None = None,
) -> Pushed:
    """Puts a run's adapter, or an export, on the Hugging Face hub, with a model card that fills itself.

    Paths of this disk, photographs, logs and checkpoints stay here.

    Args:
        model: A run, an adapter, or an exported folder.
        repository: Hub id to push to, `owner/name`; created where there is none.
        format: A format of `export` that a run is written in first; None takes what `model` is.
        private: Whether nobody else may see the repository.
        revision: Branch to commit to, created where there is none; None means the main branch.
        dry_run: Folder to write what would be pushed to, instead of pushing.

    Raises:
        PushError: Token, permission or network is missing, or a folder or repository holds something else.
        PhregError: The model cannot be read, or cannot take the format.
    """
    if repository.count("/") != 1:
        raise PushError(f"asked to push to {repository!r}, which is no name of a repository; give owner/name")
    found = resolve.locate(model)
    record = record_of(found)
    kind = find_spec(record.format).name if record else None
    with tempfile.TemporaryDirectory() as scratch:
        if format not in (None, kind):
            export(model, Path(scratch) / "export", format=format)
            found = resolve.locate(Path(scratch) / "export")
        else:
            warn_failed_checks(found)
        folder = Path(scratch) / "push" if dry_run is None else Path(dry_run)
        written = publish.assemble(found, folder, repository)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        commit = None
        if dry_run is None:
            message = f"{written.format} by phreg {written.versions.get('phreg', '')}".strip()
            commit = hub.upload(
                folder,
                repository,
                message=message,
                private=private,
                branch=revision,
                replace=publish.replaced(),
                ours=publish.OURS,
            )
        names = tuple(path.relative_to(folder).as_posix() for path in files)
        size = sum(path.stat().st_size for path in files)
    return Pushed(repository, commit, Path(dry_run) if dry_run is not None else None, names, size)
