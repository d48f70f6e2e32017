"""Patched models as folders that stock libraries load without phreg, proven equal before they are there.

A format (one module each) says what goes into the folder; the rest is the same for all. The folder is written
beside its place, loaded back by the stock library's own loader, and run against the patched model on random
images. Only if it is equal at the model's own size does it take its place; at other sizes it is measured, and
claimed where it holds.

    backbone ──contents──► .NAME.tmp/ ──stock loader──► model ──same images──► equal? ──► NAME/
                                                                                 no └──► nothing
"""

import importlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from phreg import __version__
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base
from phreg.checkpoint import LIBRARIES
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.exports.base import Contents, Reader, StockFormat
from phreg.seeding import keyed_generator

Format = Literal["timm", "transformers", "remote-code", "onnx", "merged", "adapter"]
"""The formats there are, the ones that ask least of whoever loads them first."""

CARRY_READOUT: frozenset[Format] = frozenset({"onnx", "merged", "adapter"})
"""Formats that carry a dense read-out of the last block; stock classes have none."""

RECORD = "phreg_export.json"
"""The file, unknown to stock loaders, that says what was exported and how equal it is."""

TOLERANCE = 1e-5
"""Largest difference that counts as equal, relative to the largest value: the rounding of fp32 over a deep
network. Both models run the same kernels on the same weights, so the difference is mostly zero."""


@dataclass(frozen=True)
class Equality:
    """How close an exported model is to the patched one at one image size.

    Attributes:
        size: Image size in pixels, (height, width).
        difference: Largest absolute difference of any output: all tokens after the final norm, pooled, and,
            at the model's own size, what calling it returns.
        relative: The same, relative to the largest value of that output.
        claimed: Whether `relative` is within `TOLERANCE`, so that the export stands for the model there.
    """

    size: tuple[int, int]
    difference: float
    relative: float
    claimed: bool


def export(
    backbone: Backbone,
    folder: Path,
    format: str,
    *,
    base: Base,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Equality]:
    """Writes a patched model as a folder that its library, or another one, loads without phreg.

    Args:
        backbone: The patched model; left as it is.
        folder: Folder to write; created, and must not hold anything.
        format: One of `Format`.
        base: What the model was made from, for the record.
        sizes: Image sizes to measure besides the model's own, (height, width); None means a smaller and a
            larger one, where the export takes any.

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
        _write(stock.contents(backbone), unfinished)
        try:
            exported = stock.load(unfinished)
        except (LoadError, UnsupportedModelError) as error:
            raise PhregError(
                _another(backbone, format, f"what was written does not load: {error}")
            ) from error
        any_size = exported.spec.any_size if isinstance(exported, Backbone) else exported.any_size
        if sizes and not any_size:
            raise PhregError(_another(backbone, format, "it takes the model's own size alone"))
        others = _other_sizes(backbone) if sizes is None and any_size else sizes or ()
        figures = _measure(backbone, exported, stock, [backbone.spec.input_size, *others])
        if not figures[0].claimed:
            found = (
                f"at its own size, the model loaded back differs by {figures[0].relative:.1e} of the largest "
                f"value, and {TOLERANCE:.0e} would count as equal"
            )
            raise PhregError(_another(backbone, format, found))
        record = {
            "format": format,
            "class": type(backbone.model).__name__,
            "base": asdict(base),
            "registers": backbone.num_registers,
            "tolerance": TOLERANCE,
            "equality": [asdict(figure) for figure in figures],
            "versions": {"phreg": __version__} | {name: version(name) for name in LIBRARIES},
        }
        (unfinished / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
    return figures


# -- formats -------------------------------------------------------------------------------------------------


def _stock(backbone: Backbone, format: str) -> StockFormat:
    """Finds a format's module, if the model can take the format."""
    asked = f"asked to export {backbone.describe()} as {format!r}"
    if format not in get_args(Format):
        raise PhregError(f"{asked}; the formats there are: {', '.join(get_args(Format))}")
    if backbone.readout != "plain" and format not in CARRY_READOUT:
        raise PhregError(
            f"{asked}, whose last block is read {backbone.readout}: stock classes have no such read-out, and "
            "would give other features. Set it to plain first (phreg.backbones.readout.set_readout). "
            f"{_alternative(backbone, format)}"
        )
    stock = _module(format)
    reason = stock.why_not(backbone)
    if reason:
        raise PhregError(f"{asked}: {reason}. {_alternative(backbone, format)}")
    return stock


def _alternative(backbone: Backbone, format: str) -> str:
    others = [
        name
        for name in get_args(Format)
        if name != format
        and (backbone.readout == "plain" or name in CARRY_READOUT)
        and not _module(name).why_not(backbone)
    ]
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
    return cast(StockFormat, importlib.import_module(f"phreg.exports.{format.replace('-', '_')}"))


# -- equality ------------------------------------------------------------------------------------------------


def _other_sizes(backbone: Backbone) -> list[tuple[int, int]]:
    """Picks a smaller and a larger size, neither of them square."""
    (high, wide), (height, width) = backbone.spec.patch_size, backbone.spec.input_size
    rows, cols = height // high, width // wide
    smaller = (max(1, rows * 3 // 4) * high, max(1, cols // 2) * wide)
    larger = ((rows * 5 // 4) * high, (cols * 3 // 2) * wide)
    return [smaller, larger]


def _measure(
    backbone: Backbone, exported: Backbone | Reader, stock: StockFormat, sizes: Sequence[tuple[int, int]]
) -> list[Equality]:
    weight = next(backbone.model.parameters())
    if isinstance(exported, Backbone):
        exported.to(weight.device, weight.dtype)
    figures = []
    with _evaluating(backbone.model), torch.no_grad():
        for size in sizes:
            images = torch.randn(2, 3, *size, generator=keyed_generator("export", *size)).to(weight)
            if not isinstance(exported, Backbone):
                figures.append(_compare(size, list(zip(exported(images), backbone(images), strict=True))))
                continue
            pairs = list(zip(_outputs(exported, images), _outputs(backbone, images), strict=True))
            if size == backbone.spec.input_size:
                pairs.append((stock.answer(exported, images), stock.answer(backbone, images)))
            figures.append(_compare(size, pairs))
    return figures


def _outputs(backbone: Backbone, images: Float[Tensor, "batch 3 height width"]) -> tuple[Tensor, Tensor]:
    """Reads all tokens behind the last block, prefix and registers among them, and the pooled output."""
    last = len(backbone.blocks) - 1
    with backbone.tap([last]) as found:
        pooled = backbone.run(images)
    return backbone.final_norm(found[last]), pooled


def _compare(size: tuple[int, int], pairs: Sequence[tuple[Tensor, Tensor]]) -> Equality:
    differences, relative = [], []
    for found, expected in pairs:
        difference = (found - expected).abs().max().double()
        largest = expected.abs().max().double()
        differences.append(difference)
        relative.append(difference / largest.clamp_min(torch.finfo(torch.float32).tiny))
    # torch's maximum, unlike Python's, is NaN where any is, and NaN is never within the tolerance.
    worst = torch.stack(relative).max().item()
    return Equality(size, torch.stack(differences).max().item(), worst, worst <= TOLERANCE)


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
    # Copies, since tied weights are two names of one tensor, which safetensors does not write.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in contents.tensors.items()}
    if plain:
        save_file(plain, folder / contents.weights, metadata={"format": "pt"})
    for name, settings in contents.settings.items():
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for name, write in contents.files.items():
        write(folder / name)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder to fill, which becomes `folder` at once, or goes away if anything fails.

    Raises:
        PhregError: There is something in `folder` already, or the disk does not take it.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise PhregError(f"asked to export to {folder}, which {what}; give a new or an empty folder")
        shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in unfinished.iterdir():
            with file.open("rb") as content:
                os.fsync(content.fileno())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except (OSError, SafetensorError) as error:
        raise PhregError(
            f"asked to export to {folder}, which cannot be written ({error}); free space, or give another "
            "folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
