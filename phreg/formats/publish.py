"""Putting together the folder that is pushed to the hub: what phreg wrote, a full card, and pictures.

What is nobody else's business stays behind: paths of this disk, photographs, checkpoints, logs.

    run or adapter ──phreg.json, adapter.safetensors──┐
    exported folder ──all of its files────────────────┴──► folder + README.md + report/*.png
                                     base's card ──licence──┘
"""

import json
import logging
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import metadata_load

from phreg.backbones import hub
from phreg.backbones.resolve import Located
from phreg.errors import LoadError, PushError
from phreg.formats.card import Illustration, License, model_card
from phreg.formats.export.spec import COMMON, all_specs, find_spec
from phreg.formats.load import record_of
from phreg.parsing import parse_json
from phreg.record import Base, RunRecord, without_paths, write_record
from phreg.report.html import read_pictures
from phreg.storage import ADAPTER_FILE, EXPORT_FILE, replacing, write_text
from phreg.training.checkpoint import RunFolder

logger = logging.getLogger(__name__)

OURS = (ADAPTER_FILE, EXPORT_FILE)
"""Files by which a repository is known as pushed by phreg."""

MAPS = re.compile(r"(norms|features) of image [1-4], ")
"""Maps of images beside a card, by what a report says that they show: two layers of the first four images."""


def assemble(found: Located, folder: Path, repository: str) -> RunRecord:
    """Writes the folder that is pushed, whole or not at all.

    Args:
        found: A run, an adapter, a patched model saved whole, or an exported folder.
        folder: Folder to write; it must not hold anything.
        repository: Hub id that the card speaks of.

    Returns:
        What phreg.json or phreg_export.json says there.

    Raises:
        PushError: The source is none of phreg's, or the folder holds something or cannot be written.
        LoadError: The source cannot be read.
    """
    record = record_of(found)
    if record is None:
        raise PushError(
            f"asked to push {found.source}, which phreg did not write; give a run, an adapter or an export"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PushError(f"asked to write {folder}, which is not empty; give a new or an empty folder")
    spec = find_spec(record.format)
    names = _visible(found.folder) if spec.pushed is None else [Path(name) for name in spec.pushed]
    license = base_license(record.base)
    if spec.needs_base:
        _tell_of_base(record)
    try:
        with replacing(folder.resolve()) as unfinished:
            record = without_paths(record)
            for name in names:
                (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(found.folder / name, unfinished / name)
            _point_to(repository, unfinished, found.folder)
            write_record(unfinished / spec.record_file, record)
            pictures = _write_pictures(RunFolder(found.folder.parent), unfinished / "report")
            card = model_card(record, repository=repository, license=license, pictures=pictures)
            write_text(unfinished / "README.md", card)
    except OSError as error:
        raise PushError(f"asked to write {folder} ({error}); free space, or give another folder") from error
    return record


def replaced() -> list[str]:
    """Lists what an earlier push may have left that another format does not write, as patterns."""
    return [*COMMON, *(pattern for spec in all_specs() for pattern in spec.leaves)]


def _tell_of_base(record: RunRecord) -> None:
    """Says what an adapter's base is to others, where it is no repository."""
    source = record.base.source if record.base else ""
    if Path(source).is_absolute():
        logger.warning(
            "the base is a folder here, %s: others find it where timm or a hub has the same weights by that "
            "name, and else load the adapter by phreg.load(…, into=model)",
            Path(source).name,
        )


def base_license(base: Base | None) -> License:
    """Reads a base's licence in its own card or config; unknown where neither says it or is at hand."""
    if base is None:
        return License()
    source, revision = base.source.removeprefix("hf-hub:"), base.revision
    folder = Path(source)
    if revision:
        try:
            folder = hub.snapshot(source, revision, ["README.md", "config.json"])
        except LoadError as error:
            logger.warning("the licence of %s is not known: %s", source, error)
            return License()
    try:
        card = (metadata_load(folder / "README.md") if (folder / "README.md").is_file() else None) or {}
        config = (
            parse_json((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
        )
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        logger.warning("the licence of %s is not known: its card or config is broken (%s)", source, error)
        return License()
    if card.get("license"):
        return License(str(card["license"]), card.get("license_name"), card.get("license_link"))
    declared = config.get("pretrained_cfg", {}).get("license") or config.get("license")
    return License(str(declared)) if declared else License()


def _point_to(repository: str, folder: Path, written_for: Path) -> None:
    """Has configs that name the folder they were written for, as open_clip's do, name the repository."""
    here = json.dumps(f"local-dir:{written_for}")[1:-1]
    for config in folder.glob("*.json"):
        text = config.read_text(encoding="utf-8")
        if here in text:
            write_text(config, text.replace(here, f"hf-hub:{repository}"))


def _visible(folder: Path) -> list[Path]:
    """Lists the files of a folder and of those in it, hidden ones left out."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [name for name in files if not any(part.startswith(".") for part in name.parts)]


def _write_pictures(run: RunFolder, folder: Path) -> list[Illustration]:
    """Writes the charts and the first images' maps of a run's report, where there is one."""
    page = run.report / "report.html"
    if not (run.recipe.is_file() and page.is_file()):
        return []
    found = read_pictures(page)
    shown = [(alt, content) for alt, content in found if " of image " not in alt or MAPS.match(alt)]
    folder.mkdir()
    pictures = []
    for number, (alt, content) in enumerate(shown, start=1):
        path = folder / f"{number:02}.png"
        path.write_bytes(content)
        pictures.append(Illustration(path.relative_to(folder.parent), alt))
    return pictures
