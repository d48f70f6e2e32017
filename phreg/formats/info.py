"""What a run, an adapter, an export or a hub id is, without building the model.

folder ──phreg.json or phreg_export.json──┐
──headers of *.safetensors─────────┴► ModelInfo ◄──fits?── base, if it is at hand
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from phreg.backbones import hub, resolve
from phreg.backbones.resolve import Base
from phreg.deprecated import current_attribute
from phreg.errors import LoadError
from phreg.evaluation.before_after import Row, table
from phreg.formats.adapter import base_of, fit
from phreg.formats.export.spec import needs_base
from phreg.formats.load import Model, open_model, record_of
from phreg.record import RunRecord
from phreg.run_summary import RunSummary
from phreg.short_table import ShortTable, shown_as_table

Fits = Literal["whole", "tower", "no", "unknown"]


@shown_as_table
@dataclass(frozen=True)
class ModelInfo:
    """What phreg wrote somewhere.

    Attributes:
        source: What was asked for.
        format: `phreg-adapter`, `phreg-model`, or the format of an export.
        format_version: Version of that format.
        model_class: Class of the model.
        base: What it was made from; None where it does not say.
        registers: Register tokens added.
        method: The method of the run; None where it does not say.
        steps: Optimizer steps of the run; None where it does not say.
        figures: Before and after; empty where nothing was measured.
        failures: What the run made worse than its gates allow, in words.
        sizes: Image sizes (height, width) that an export was measured at, and whether it is the model there.
        tensors: Tensors in its files.
        num_bytes: Bytes that they take.
        versions: Versions of the packages that wrote it, by name.
        fits: Whether the base at hand is the one it was made from: as a `whole`, its `tower` alone, or `no`;
            `unknown` where there is none at hand, or none is needed.
    """

    source: str
    format: str
    format_version: int
    model_class: str
    base: Base | None
    registers: int
    method: str | None
    steps: int | None
    figures: tuple[Row, ...]
    failures: tuple[str, ...]
    sizes: tuple[tuple[tuple[int, int], bool], ...]
    tensors: int
    num_bytes: int
    versions: Mapping[str, str]
    fits: Fits

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show."""
        rows = [
            ("format", f"{self.format}, version {self.format_version}"),
            ("class", self.model_class),
            ("base", self.base.source if self.base else "-"),
            ("registers", str(self.registers)),
            ("method", "-" if self.method is None else f"{self.method}, {self.steps} steps"),
            ("failed checks", "; ".join(self.failures) or "-"),
            *((row.name, " → ".join(row.texts)) for row in self.figures),
        ]
        return ShortTable(self.source, rows)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self) | {"figures": [row._asdict() for row in self.figures]}


def info(
    source: str | os.PathLike[str], *, revision: str | None = None, base: Model | None = None
) -> ModelInfo:
    """Says what a run, an adapter, an export, or a hub id of one is.

    Args:
        source: Its folder or hub id.
        revision: Hub commit, branch or tag of it.
        base: A model in any form, to be checked as its base; None takes the one it names, if that is on this
            disk already.

    Raises:
        LoadError: phreg did not write it, or it cannot be read.
    """
    if not Path(source).expanduser().exists() and "/" not in os.fspath(source):
        raise LoadError(
            f"asked what {source} is: there is no such folder; give a run, an adapter or an export, or the "
            "owner/name of one on the hub"
        )
    found = resolve.locate(source, revision)
    record = record_of(found)
    if record is None:
        raise LoadError(
            f"asked what {source} is: it is a {found.library} model that phreg did not write; "
            "`phreg inspect` looks into such a model"
        )
    run = record.run or RunSummary()
    tensors, num_bytes = _count(found.folder)
    return ModelInfo(
        source=str(source),
        format=record.format,
        format_version=record.format_version,
        model_class=record.model_class,
        base=record.base,
        registers=record.registers,
        method=run.setting("method"),
        steps=run.outcome.steps if run.outcome else None,
        figures=tuple(table(run.figures.model_dump())) if run.figures else (),
        failures=tuple(record.failures),
        sizes=tuple((size.size, size.claimed) for size in record.equality),
        tensors=tensors,
        num_bytes=num_bytes,
        versions=record.versions,
        fits=_fits(record, base),
    )


def _count(folder: Path) -> tuple[int, int]:
    """Counts tensors and their bytes by the headers of a folder's files."""
    tensors = num_bytes = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as opened:
                slices = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118  # no dictionary
        except (OSError, SafetensorError) as error:
            raise LoadError(f"cannot read {file} as safetensors ({error}); fetch it again") from error
        tensors += len(slices)
        num_bytes += sum(math.prod(part.get_shape()) * WIDTHS[part.get_dtype()] for part in slices)
    return tensors, num_bytes


def _fits(record: RunRecord, base: Model | None) -> Fits:
    if not needs_base(record.format):
        return "unknown"
    at_hand = _at_hand(base_of(record)) if base is None else (base, None)
    if at_hand is None:
        return "unknown"
    return fit(record, open_model(*at_hand)[0]) or "no"


def _at_hand(base: Base) -> tuple[str, str | None] | None:
    """Finds the base again, if nothing has to be fetched for it."""
    if base.revision is not None:
        config = resolve.LAYOUTS[base.library].config
        here = hub.is_cached(base.source.removeprefix("hf-hub:"), base.revision, config)
    else:
        here = base.source == "demo" or Path(base.source).is_dir()
    return (base.source, base.revision) if here else None


WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of an element, by safetensors' names of types."""


def __getattr__(name: str) -> Any:
    """Finds a class by its old name, with a warning."""
    if (new := current_attribute(__name__, name)) is not None:
        return globals()[new]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
