"""The record that phreg writes beside a model: one type, one reader, one writer.

    phreg.json, of an adapter or a model saved whole ──┐
    phreg_export.json, of any other export ────────────┴─read_record─► RunRecord ─write_record─► either

A record says what the model is, what it was made from, how equal an export is, and how the run went that made
it. On disk the record of an adapter tells of its run side by side with the rest, and any other under `run`.
In memory it is under `run` always: nothing but the reader and the writer knows the difference.

Versions: a record without a version is of the first one. A newer version is refused. Keys that this phreg
does not know are kept, and written again with a copy.

This lies below all that writes models, since a patched model of transformers writes a record from within its
own `save_pretrained`. What is wrong with a file is a `RecordError`; whoever asked for the file says for what.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError
from torch import Tensor

from phreg import __version__
from phreg.backbones.base import Library, Readout
from phreg.errors import LoadError
from phreg.parsing import parse_json
from phreg.run_summary import Part, RunSummary
from phreg.short_table import ShortTable, shown_as_table
from phreg.storage import ADAPTER_FORMAT, FORMAT_VERSION, MODEL_FORMAT, write_text

LIBRARIES = ("torch", "timm", "transformers", "open_clip_torch")
"""Packages whose versions a record tells."""

SETTINGS = (
    *("format", "library", "class", "config", "tower", "registers", "input_size", "mean", "std"),
    *("readout", "test_time", "test_time_size"),
)
"""What decides how tensors become a model, by its name on disk; the rest is told to people."""

NEEDED: dict[str, tuple[str, ...]] = {
    ADAPTER_FORMAT: ("base", "input_size"),
    MODEL_FORMAT: ("library", "config"),
}
"""What the record of one of phreg's own formats must say; those of others are read by people."""


class RecordError(LoadError):
    """What is wrong with the file of a record, from its name on, and what to do."""


@dataclass(frozen=True)
class Base:
    """Which checkpoint a model is: enough to find the same one again, and to notice when it is another.

    Attributes:
        source: What to give to `load` to get it again (a folder by its absolute path), or `instance`.
        library: The library it belongs to.
        revision: The hub commit; None where it does not come from the hub.
        sha256: `weights_sha256` of its tensors, named as on disk.
    """

    source: str
    library: Library
    revision: str | None
    sha256: str


@dataclass(frozen=True)
class Tower:
    """The vision tower of a base, by which it is known again inside another model, such as a LLaVA.

    Attributes:
        prefix: What the names of its tensors open with in the base.
        sha256: `weights_sha256` of `Backbone.tower_state()`, by precision.
    """

    prefix: str
    sha256: dict[str, str]


@dataclass(frozen=True)
class Equality:
    """How close an exported model is to the patched one at one image size.

    Attributes:
        size: Image size in pixels, (height, width).
        difference: Largest absolute difference of any output: all tokens after the final norm, pooled, and,
            at the model's own size, what calling it returns; of a model that another library now builds, what
            calling it returns, at every size, in place of pooled.
        relative: The same, relative to the largest value of that output.
        claimed: Whether `relative` is within the tolerance, so that the export stands for the model there.
    """

    size: tuple[int, int]
    difference: float
    relative: float
    claimed: bool


@shown_as_table
class RunRecord(Part):
    """What phreg.json or phreg_export.json says.

    Attributes:
        format: Name of the format.
        format_version: Its version.
        model_class: Class of the model; `class` on disk.
        base: What the model was made from.
        tower: The base's vision tower.
        family: The model's architecture, as its library calls it.
        registers: Register tokens added.
        insertion: Where they are, in words.
        input_size: The model's own size in pixels, (height, width).
        mean: Mean of the input normalisation, RGB, on a scale of 0 to 1.
        std: Standard deviation of the input normalisation, RGB.
        library: The library that builds the class.
        config: What that library builds it of.
        readout: How dense features are meant to be read.
        test_time: Hidden units that test-time registers move, with their signs, by block.
        test_time_size: Size of the images that those were found on.
        tolerance: Largest relative difference that counted as equal.
        equality: How equal an export is, size by size.
        versions: Versions of the packages that wrote it, by name.
        sha256: `weights_sha256` of what an export loads as.
        run: How the run went; None where the model was made without one.
        tensors_sha256: `weights_sha256` of the tensors beside it.
        settings_sha256: Hash of its own `SETTINGS`.
    """

    format: str
    format_version: int = 1
    model_class: str = Field(validation_alias="class", serialization_alias="class")
    base: Base | None = None
    tower: Tower | None = None
    family: str | None = None
    registers: NonNegativeInt
    insertion: str | None = None
    input_size: tuple[PositiveInt, PositiveInt] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    library: str | None = None
    config: dict[str, Any] | None = None
    readout: Readout = "plain"
    test_time: dict[NonNegativeInt, list[tuple[NonNegativeInt, int]]] | None = None
    test_time_size: tuple[PositiveInt, PositiveInt] | None = None
    tolerance: float | None = None
    equality: list[Equality] = Field(default_factory=list)
    versions: dict[str, str] = Field(default_factory=dict)
    sha256: str | None = None
    run: RunSummary | None = None
    tensors_sha256: str | None = None
    settings_sha256: str | None = None

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show."""
        run = self.run or RunSummary()
        trained = f"{run.outcome.steps} steps" if run.outcome else "no run"
        rows = [
            ("class", self.model_class),
            ("base", self.base.source if self.base else "-"),
            ("registers", str(self.registers)),
            ("made by", f"{run.setting('method') or '-'}, {trained}"),
            ("failed checks", "; ".join(self.failures) or "-"),
        ]
        return ShortTable(f"{self.format}, version {self.format_version}", rows)

    @property
    def failures(self) -> list[str]:
        """What the run made worse than its gates allow, in words."""
        return self.run.gates.failures if self.run and self.run.gates else []

    @property
    def run_or_readout(self) -> RunSummary | None:
        """How the run went; of a model that was saved without its run no more than how it is read."""
        if self.run is None and "readout" in self.model_fields_set:
            return RunSummary(readout=self.readout)
        return self.run

    def with_sums(self, tensors: Mapping[str, Tensor]) -> "RunRecord":
        """Adds hashes of the tensors beside it and of its own settings, so that loading notices any damage.

        Args:
            tensors: The tensors, by their names in the file.
        """
        summed = self.model_copy(update={"tensors_sha256": weights_sha256(tensors)})
        return summed.model_copy(update={"settings_sha256": settings_sha256(summed.to_json())})

    def overlaid(self, other: "RunRecord") -> "RunRecord":
        """Takes over all that another record says."""
        return self.model_copy(update={name: getattr(other, name) for name in other.model_fields_set})

    def to_json(self) -> dict[str, Any]:
        """What stands in the file: what was said, and nothing that is merely assumed."""
        said = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        if self.format == ADAPTER_FORMAT:
            said |= said.pop("run", None) or {}
        absent = [name for name in ("sha256", "run") if not said.get(name)]
        said = {name: value for name, value in said.items() if name not in absent}
        if self.settings_sha256 is not None:
            said["settings_sha256"] = settings_sha256(said)
        return said


def read_record(file: Path) -> RunRecord:
    """Reads phreg.json or phreg_export.json, whatever its format.

    Raises:
        RecordError: It cannot be read, says too little, was changed since, or is of a version that this phreg
            does not read.
    """
    try:
        said = parse_json(file.read_bytes())
        kind, number = said["format"], said.get("format_version", 1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{file.name} cannot be read ({type(error).__name__}: {error}); copy or fetch it again"
        ) from error
    if type(number) is not int or not 1 <= number <= FORMAT_VERSION:
        raise RecordError(
            f"{file.name} is of format {kind!r} of version {number!r}; this phreg, {__version__}, reads "
            f"versions 1 to {FORMAT_VERSION}: "
            + ("upgrade phreg" if type(number) is int and number > 0 else "copy or fetch it again")
        )
    try:
        # As JSON, where a list may stand for a tuple, and nothing else for another type.
        record = RunRecord.model_validate_json(json.dumps(_with_its_run_apart(said)), strict=True)
    except ValidationError as error:
        problems = [f"{_place(found['loc'], said)}: {found['msg']}" for found in error.errors()]
    else:
        problems = [f"{name}: missing" for name in NEEDED.get(kind, ()) if getattr(record, name) is None]
        if not problems:
            _check_settings(file, said)
            return record
    raise RecordError(f"{file.name} is not whole ({'; '.join(problems)}); fetch it again")


def write_record(file: Path, record: RunRecord) -> None:
    """Writes a record, whole or not at all.

    Raises:
        OSError: The disk does not take it; an old file of that name is still whole.
    """
    write_text(file, json.dumps(record.to_json(), indent=2))


def read_format(file: Path) -> Any:
    """Reads no more of a record than which format it names, of whatever version; None where it names none.

    Raises:
        RecordError: It is no JSON object.
    """
    try:
        said = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecordError(f"{file.name} is not JSON ({error}); copy or download it again") from error
    if not isinstance(said, dict):
        raise RecordError(
            f"{file.name} should hold a JSON object, found something else; copy or download it again"
        )
    return said.get("format")


def versions() -> dict[str, str]:
    """Tells the versions of phreg and of the packages that models come from."""
    return {"phreg": __version__} | {name: version(name) for name in LIBRARIES}


def settings_sha256(said: Mapping[str, Any]) -> str:
    """Hashes those of `SETTINGS` that a record on disk has: SHA-256 of their ASCII JSON, keys sorted."""
    settings = {name: said[name] for name in SETTINGS if name in said}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    r"""Hashes named tensors, whatever file format, device or memory layout they came in.

    The recipe: SHA-256 over the tensors in the order of their names (by code point), each as one line of
    ASCII JSON, `["name", "dtype", [sizes]]` as `json.dumps` writes it, dtype as in `float32`; a newline
    (`\n`); the elements, little-endian, row by row. Any change of a name, dtype, shape or bit changes it.

    Args:
        tensors: Dense tensors by name, on any device; brought to the CPU one at a time.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header).encode() + b"\n")
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _with_its_run_apart(said: Mapping[str, Any]) -> dict[str, Any]:
    """Puts what an adapter's record tells of its run under `run`, where all others have it."""
    if not _is_flat(said):
        return dict(said)
    run = {name: said[name] for name in RunSummary.model_fields if name in said}
    rest = {name: value for name, value in said.items() if name == "readout" or name not in run}
    return rest | {"run": run or None}


def _is_flat(said: Mapping[str, Any]) -> bool:
    return said["format"] == ADAPTER_FORMAT and not said.get("run")


def _place(location: tuple[int | str, ...], said: Mapping[str, Any]) -> str:
    """Names a place in a record as the file has it."""
    inside = location[1:] if location[:1] == ("run",) and _is_flat(said) else location
    return ".".join(map(str, inside or location))


def _check_settings(file: Path, said: Mapping[str, Any]) -> None:
    """Checks that nothing was changed of what makes the tensors a model; on the very digits of the file."""
    if said.get("settings_sha256", found := settings_sha256(said)) != found:
        raise RecordError(
            f"{file.name} says other things of the model than were written: it was damaged or changed since; "
            "fetch it again. What is told of its base and its run may be changed"
        )


def without_paths(record: RunRecord) -> RunRecord:
    """Takes paths of this disk out of a record; what is left of one is its last part."""
    changed: dict[str, Any] = {}
    if record.base and Path(record.base.source).is_absolute():
        changed["base"] = replace(record.base, source=Path(record.base.source).name)
    if record.run:
        changed["run"] = record.run.model_copy(update=_run_without_paths(record.run))
    return record.model_copy(update=changed)


def _run_without_paths(run: RunSummary) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if run.recipe:
        recipe = {name: value for name, value in run.recipe.items() if name not in ("output", "device")}
        recipe |= {name: last_part(recipe[name]) for name in ("model", "images") if name in recipe}
        if run.setting("measure.source"):
            recipe["measure"] = recipe["measure"] | {"source": last_part(recipe["measure"]["source"])}
        changed["recipe"] = recipe
    if run.outcome:
        skipped = [last_part(name) for name in run.outcome.skipped]
        changed["outcome"] = run.outcome.model_copy(update={"skipped": skipped})
    return changed


def last_part(path: str) -> str:
    """Leaves the last part of what may be a path here; a hub id stays as it is."""
    return path if path.count("/") == 1 and not Path(path).exists() else Path(path).name
