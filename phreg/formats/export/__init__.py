"""Patched models as folders that other libraries load without phreg, proven equal before they are there.

A format (one module each, see `phreg.formats.export.spec`) says what goes into the folder; the rest is the
same for all. The folder is written beside its place, loaded back by the format's own loader, and run against
the patched model on random images. Only if it is equal at the model's own size does it take its place; at
other sizes it is measured, and claimed where it holds.

    backbone ──contents──► .NAME.tmp/ ──its loader──► model ──same images──► equal? ──► NAME/
                                                                                 no └──► nothing
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from phreg.backbones.base import Backbone, packed_types
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats import FORMATS
from phreg.formats.export.equality import measure, other_sizes
from phreg.formats.export.folder import appearing, write, write_settings
from phreg.formats.export.spec import Contents, FormatSpec, Graph, find_spec
from phreg.record import Base, Equality, RunRecord, versions, weights_sha256, without_paths, write_record
from phreg.run_summary import RunSummary
from phreg.sinks import test_time
from phreg.storage import FORMAT_VERSION


def export(
    backbone: Backbone,
    folder: Path,
    format: str,
    *,
    base: Base,
    sizes: Sequence[tuple[int, int]] | None = None,
    run: RunSummary | None = None,
) -> list[Equality]:
    """Writes a patched model as a folder, and checks that the format's own loader makes the same model of it.

    Args:
        backbone: The patched model; left as it is.
        folder: Folder to write; created, and must not hold anything.
        format: One of `phreg.formats.FORMATS`.
        base: What the model was made from, for the record.
        sizes: Image sizes to measure besides the model's own, (height, width); None means those of the run, a
            smaller and a larger one, where the export takes any.
        run: How the run went that made the model.

    Returns:
        How equal the folder's model is to this one, at the model's own size first.

    Raises:
        PhregError: The model cannot take the format, the folder holds something or cannot be written, or the
            folder's model would be another. Nothing is left behind then.
    """
    spec = _choose(backbone, format)
    for size in sizes or ():
        backbone.check_size(size)
    with appearing(folder.resolve()) as unfinished:
        contents = spec.contents(backbone)
        write(contents, unfinished)
        exported = _read_back(backbone, spec, unfinished)
        # As loaded: measuring may change its precision.
        sha256 = weights_sha256(exported.disk_state()) if isinstance(exported, Backbone) else None
        figures = _measure(backbone, exported, spec, sizes, contents, trained_sizes(run))
        write_settings(contents, unfinished, folder.resolve())
        record = RunRecord(
            format=format,
            format_version=FORMAT_VERSION,
            model_class=type(backbone.model).__name__,
            base=base,
            registers=backbone.num_registers,
            mean=backbone.spec.mean,
            std=backbone.spec.std,
            tolerance=contents.tolerance,
            equality=figures,
            versions=versions(),
            sha256=sha256,
            run=run,
        )
        own = contents.record
        record = record if own is None else record.overlaid(own)
        # Paths of this disk are told only where the base has to be found again.
        write_record(unfinished / spec.record_file, record if spec.needs_base else without_paths(record))
    return figures


def unsupported_reason(backbone: Backbone, format: str) -> str | None:
    """Says why a model cannot take one of `Format`; None where it can."""
    spec = find_spec(format)
    packed = packed_types(backbone.model)
    if packed and not spec.carries_packed:
        return (
            f"its weights are quantised ({', '.join(packed)}), and packed so that no other class reads them; "
            "export the model before it is quantised"
        )
    if not spec.carries_hooks and backbone.readout != "plain":
        return (
            f"its last block is read {backbone.readout}, and stock classes, which have no such read-out, "
            "would give other features; set it to plain (phreg.backbones.readout.set_readout), or keep it"
        )
    if not spec.carries_hooks and test_time.installed(backbone):
        return (
            "its test-time registers work by hooks, which no stock class has; any format takes what "
            'phreg.distill(method="relocate") makes'
        )
    missing = [name for name in spec.packages if importlib.util.find_spec(name) is None]
    if missing:
        return f"that takes {', '.join(missing)}, not installed here (pip install 'phreg[{spec.extra}]')"
    return spec.unsupported_reason(backbone)


def trained_sizes(run: RunSummary | None) -> list[tuple[int, int]]:
    """Lists the image sizes that a run trained at, (height, width), where it tells any."""
    if run is None:
        return []
    told = [run.setting("size"), *(run.setting("mixed_sizes") or ())]
    return [(size, size) if isinstance(size, int) else (size[0], size[1]) for size in told if size]


# -- steps of an export --------------------------------------------------------------------------------------


def _choose(backbone: Backbone, format: str) -> FormatSpec:
    """Finds a format, if the model can take it."""
    asked = f"asked to export {backbone.describe()} as {format!r}"
    if format not in FORMATS:
        raise PhregError(f"{asked}; the formats there are: {', '.join(FORMATS)}")
    reason = unsupported_reason(backbone, format)
    if reason:
        raise PhregError(f"{asked}: {reason}. {_alternative(backbone, format)}")
    return find_spec(format)


def _read_back(backbone: Backbone, spec: FormatSpec, folder: Path) -> Backbone | Graph:
    try:
        return spec.read_back(folder)
    except (LoadError, UnsupportedModelError) as error:
        found = f"what was written does not load: {error}"
        raise PhregError(_another(backbone, spec.name, found)) from error


def _measure(
    backbone: Backbone,
    exported: Backbone | Graph,
    spec: FormatSpec,
    sizes: Sequence[tuple[int, int]] | None,
    contents: Contents,
    trained: Sequence[tuple[int, int]],
) -> list[Equality]:
    """Measures at the model's own size, where it must be equal, at those it was trained at, and at others."""
    any_size = exported.spec.any_size if isinstance(exported, Backbone) else exported.any_size
    any_size = any_size and backbone.spec.any_size
    if sizes and not any_size:
        raise PhregError(_another(backbone, spec.name, "it takes the model's own size alone"))
    others = [*trained, *other_sizes(backbone)] if sizes is None and any_size else sizes or ()
    wanted = dict.fromkeys([backbone.spec.input_size, *others])
    figures = measure(backbone, exported, spec, [*wanted], contents.tolerance)
    if not figures[0].claimed:
        found = (
            f"at its own size, the model loaded back differs by {figures[0].relative:.1e} of the largest "
            f"value, and {contents.tolerance:.0e} would count as equal"
        )
        raise PhregError(_another(backbone, spec.name, found))
    return figures


def _alternative(backbone: Backbone, format: str) -> str:
    others = [name for name in FORMATS if name != format and not unsupported_reason(backbone, name)]
    if others:
        return f"It can be exported as {' or '.join(others)}."
    return "No other format takes it; share the phreg adapter, which phreg.load reads."


def _another(backbone: Backbone, format: str, found: str) -> str:
    """Words the failure of an export that would be another model."""
    return (
        f"asked to export {backbone.describe()} as {format!r}, and the folder would hold another model: "
        f"{found}. The model may have been changed after it was built, in a way its class does not know: "
        f"undo that. {_alternative(backbone, format)}"
    )
