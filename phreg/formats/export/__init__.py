"""Patched models as folders that other libraries load without phreg, proven equal before they are there.

A format (one module each) says what goes into the folder; the rest is the same for all. The folder is written
beside its place, loaded back by the format's own loader, and run against the patched model on random
images. Only if it is equal at the model's own size does it take its place; at other sizes it is measured, and
claimed where it holds.

    backbone ──contents──► .NAME.tmp/ ──its loader──► model ──same images──► equal? ──► NAME/
                                                                                 no └──► nothing
"""

import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from phreg.backbones.base import Backbone, packed_types
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats.export.base import FOLDER, TOLERANCE, Contents, Graph, StockFormat
from phreg.record import Base, Equality, RunRecord, RunSummary, versions, weights_sha256, write_record
from phreg.seeding import keyed_generator
from phreg.sinks import test_time
from phreg.storage import ADAPTER_FILE, EXPORT_FILE, FORMAT_VERSION, Format, flush, let_others_read, replacing

CARRY_HOOKS: frozenset[Format] = frozenset({"onnx", "merged", "adapter"})
"""Formats that carry what works by hooks, as no stock class does: a dense read-out, test-time registers."""


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
        format: One of `Format`.
        base: What the model was made from, for the record.
        sizes: Image sizes to measure besides the model's own, (height, width); None means a smaller and a
            larger one, where the export takes any.
        run: How the run went that made the model.

    Returns:
        How equal the folder's model is to this one, at the model's own size first.

    Raises:
        PhregError: The model cannot take the format, the folder holds something or cannot be written, or the
            folder's model would be another. Nothing is left behind then.
    """
    stock = _stock(backbone, format)
    for size in sizes or ():
        backbone.check_size(size)
    with _appearing(folder.resolve()) as unfinished:
        contents = stock.contents(backbone)
        _write(contents, unfinished)
        try:
            exported = stock.load(unfinished)
        except (LoadError, UnsupportedModelError) as error:
            raise PhregError(
                _another(backbone, format, f"what was written does not load: {error}")
            ) from error
        sha256 = None
        if isinstance(exported, Backbone):
            any_size = exported.spec.any_size
            sha256 = weights_sha256(exported.disk_state())  # as loaded: measuring may change its precision
        else:
            any_size = exported.any_size
        any_size = any_size and backbone.spec.any_size
        if sizes and not any_size:
            raise PhregError(_another(backbone, format, "it takes the model's own size alone"))
        others = _other_sizes(backbone) if sizes is None and any_size else sizes or ()
        figures = _measure(backbone, exported, stock, [backbone.spec.input_size, *others], contents.tolerance)
        if not figures[0].claimed:
            found = (
                f"at its own size, the model loaded back differs by {figures[0].relative:.1e} of the largest "
                f"value, and {contents.tolerance:.0e} would count as equal"
            )
            raise PhregError(_another(backbone, format, found))
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
        _write_settings(contents, unfinished, folder.resolve())
        if contents.record is None:
            write_record(unfinished / EXPORT_FILE, record)
        else:
            write_record(unfinished / ADAPTER_FILE, record.overlaid(contents.record))
    return figures


def unsupported_reason(backbone: Backbone, format: str) -> str | None:
    """Says why a model cannot take one of `Format`; None where it can."""
    packed = packed_types(backbone.model)
    if packed and format != "adapter":  # whose tensors are copied from the one it was loaded from
        return (
            f"its weights are quantised ({', '.join(packed)}), and packed so that no other class reads them; "
            "export the model before it is quantised"
        )
    if format not in CARRY_HOOKS and backbone.readout != "plain":
        return (
            f"its last block is read {backbone.readout}, and stock classes, which have no such read-out, "
            "would give other features; set it to plain (phreg.backbones.readout.set_readout), or keep it"
        )
    if format not in CARRY_HOOKS and test_time.installed(backbone):
        return (
            "its test-time registers work by hooks, which no stock class has; any format takes what "
            'phreg.distill(method="relocate") makes'
        )
    return _module(format).unsupported_reason(backbone)


# -- formats -------------------------------------------------------------------------------------------------


def _stock(backbone: Backbone, format: str) -> StockFormat:
    """Finds a format's module, if the model can take the format."""
    asked = f"asked to export {backbone.describe()} as {format!r}"
    if format not in get_args(Format):
        raise PhregError(f"{asked}; the formats there are: {', '.join(get_args(Format))}")
    reason = unsupported_reason(backbone, format)
    if reason:
        raise PhregError(f"{asked}: {reason}. {_alternative(backbone, format)}")
    return _module(format)


def _alternative(backbone: Backbone, format: str) -> str:
    others = [name for name in get_args(Format) if name != format and not unsupported_reason(backbone, name)]
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


def _module(format: str) -> StockFormat:
    """Imports a format, and with it its library, which takes seconds."""
    return cast(StockFormat, importlib.import_module(f"phreg.formats.export.{format.replace('-', '_')}"))


# -- equality ------------------------------------------------------------------------------------------------


def _other_sizes(backbone: Backbone) -> list[tuple[int, int]]:
    """Picks a smaller and a larger size, neither of them square."""
    (high, wide), (height, width) = backbone.spec.patch_size, backbone.spec.input_size
    rows, cols = height // high, width // wide
    smaller = (max(1, rows * 3 // 4) * high, max(1, cols // 2) * wide)
    larger = ((rows * 5 // 4) * high, (cols * 3 // 2) * wide)
    return [smaller, larger]


def _measure(
    backbone: Backbone,
    exported: Backbone | Graph,
    stock: StockFormat,
    sizes: Sequence[tuple[int, int]],
    tolerance: float = TOLERANCE,
) -> list[Equality]:
    # Libraries differ in what they count as the head and what they call pooled. Where one's model became
    # another's, what calling it returns is compared instead, at every size.
    converted = isinstance(exported, Backbone) and exported.spec.library != backbone.spec.library
    if isinstance(exported, Backbone):
        exported.to(backbone.device, backbone.dtype)
    figures = []
    with _evaluating(backbone.model), torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, *size, generator=keyed_generator("export", *size))
            images = images.to(backbone.device, backbone.dtype)
            if isinstance(exported, Backbone):
                pairs = list(zip(_outputs(exported, images), _outputs(backbone, images), strict=True))
                if converted:
                    pairs.pop()
                if converted or size == backbone.spec.input_size:
                    pairs.append((stock.answer(exported, images), stock.answer(backbone, images)))
            else:
                pairs = list(zip(exported(images), backbone(images), strict=True))
            figures.append(_compare(size, pairs, tolerance))
    return figures


def _outputs(backbone: Backbone, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
    """Reads all tokens behind the last block, prefix and registers among them, and the pooled output."""
    last = len(backbone.blocks) - 1
    with backbone.tap([last]) as found:
        pooled = backbone.run(images)
    return backbone.final_norm(found[last]), pooled


def _compare(
    size: tuple[int, int], pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float = TOLERANCE
) -> Equality:
    differences, relative = [], []
    for found, expected in pairs:
        difference = (found - expected).abs().max().double()
        largest = expected.abs().max().double()
        differences.append(difference)
        relative.append(difference / largest.clamp_min(torch.finfo(torch.float32).tiny))
    # torch's maximum, unlike Python's, is NaN where any is, and NaN is never within the tolerance.
    worst = torch.stack(relative).max().item()
    return Equality(size, torch.stack(differences).max().item(), worst, worst <= tolerance)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, and afterwards each part back in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# -- files ---------------------------------------------------------------------------------------------------


def _write(contents: Contents, folder: Path) -> None:
    for file, tensors in contents.tensors.items():
        # Copies, since tied weights are two names of one tensor, which safetensors does not write.
        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(plain, folder / file, metadata={"format": "pt"})
    for name, write in contents.files.items():
        write(folder / name)
    _write_settings(contents, folder, folder)
    if contents.record is not None:
        write_record(folder / ADAPTER_FILE, contents.record)


def _write_settings(contents: Contents, folder: Path, place: Path) -> None:
    """Writes the settings into a folder that will be found at `place`."""
    path = json.dumps(str(place))[1:-1]
    for name, settings in contents.settings.items():
        text = json.dumps(settings, indent=2).replace(FOLDER, path)
        (folder / name).write_text(text + "\n", encoding="utf-8")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
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
