"""Reading back whatever phreg wrote: its record names the format, and the format builds the model.

    run, adapter, merged ──phreg.json──────┐
    any other export ──phreg_export.json───┴► RunRecord ──format──► FormatSpec.open ──► Backbone + Base
    any of them on the hub ──resolve.locate──► folder

What phreg did not write is a base model: see `phreg.backbones.resolve`.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from phreg import __version__, demo
from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import Located, adapt
from phreg.errors import LoadError, PhregError
from phreg.formats.adapter import apply_adapter, fit
from phreg.formats.export.spec import find_spec, needs_base, recorded_names
from phreg.record import Base, RecordError, RunRecord, read_record, weights_sha256
from phreg.sinks import test_time
from phreg.storage import ADAPTER_FILE, EXPORT_FILE, OWN_FORMATS

Model = str | os.PathLike[str] | nn.Module
"""What a user may call a model: a name, a folder, or an instance."""

logger = logging.getLogger(__name__)


def record_of(found: Located) -> RunRecord | None:
    """Reads what phreg wrote beside a model; None where the model is none of phreg's.

    Raises:
        LoadError: It is broken, of a newer version, or of a format that this phreg does not know.
    """
    own = (found.folder / ADAPTER_FILE).is_file()
    file = found.folder / (ADAPTER_FILE if own else EXPORT_FILE)
    if not file.is_file():
        return None
    try:
        record = read_record(file)
    except RecordError as error:
        raise LoadError(f"asked for what is in {found.folder}, whose {error}") from error
    if own and record.format not in OWN_FORMATS:
        raise LoadError(
            f"asked for the adapter in {found.folder}, found format {record.format!r}; this phreg, "
            f"{__version__}, knows {' and '.join(OWN_FORMATS)}: upgrade phreg, or load the folder with what "
            "wrote it"
        )
    if record.format not in recorded_names():
        raise LoadError(
            f"asked for {found.source}, an export of the format {record.format!r}; phreg loads back "
            f"{', '.join(recorded_names())}: upgrade phreg, or load it with the library it was made for"
        )
    return record


def open_model(
    source: Model,
    revision: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[Backbone, Base]:
    """Opens whatever a user may call a model, patched ones included, in eval mode.

    Args:
        source: A model in any form, `demo`, a run, an adapter, or an exported folder.
        revision: Hub commit, branch or tag.
        mean: Mean of the input normalisation, RGB on a scale of 0 to 1; None means the model's own.
        std: Its standard deviation, likewise.

    Raises:
        LoadError: It cannot be found, fetched or trusted.
        UnsupportedModelError: phreg cannot patch it.
    """
    backbone, base = open_as_it_is(source, revision)
    resolve.settle_normalisation(backbone, mean, std)
    return backbone, base


def open_as_it_is(
    source: str | os.PathLike[str] | nn.Module, revision: str | None = None
) -> tuple[Backbone, Base]:
    """Opens a model as `open_model` does, but does not settle how its images are normalised."""
    if isinstance(source, nn.Module):
        return resolve.load(source)
    resolve.refuse_meta_device(source)
    if os.fspath(source) == "demo":
        backbone = adapt(demo.demo_model())
        return backbone, Base("demo", backbone.spec.library, None, weights_sha256(backbone.disk_state()))
    found = resolve.locate(source, revision)
    backbone, base = resolve.load(found) if record_of(found) is None else open_saved(found)
    warn_failed_checks(found)
    backbone.eval()
    return backbone, base


def open_saved(found: Located) -> tuple[Backbone, Base]:
    """Opens what phreg wrote, its base found again where it needs one.

    Raises:
        LoadError: phreg did not write it, or it cannot be read or trusted.
    """
    record = record_of(found)
    if record is None:
        raise LoadError(
            f"asked for the patched model in {found.source}, which is a {found.library} model without "
            f"registers of phreg; load it with {found.library}"
        )
    spec = find_spec(record.format)
    if spec.open is None:
        raise LoadError(
            f"asked for the model in {found.source}, which is a graph ({spec.name}) and no model of a "
            f"library any more: run it with {spec.card.library}, or load the run or adapter that it was made "
            "from"
        )
    backbone, base = spec.open(found, record)
    if hasattr(backbone.model, "name_or_path"):  # which PEFT notes as the model that its adapter goes onto
        vars(backbone.model)["name_or_path"] = found.source
    backbone.trained_readout = record.readout
    _normalise_as(record, backbone, found)
    broken = [name for name, tensor in backbone.disk_state().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise LoadError(
            f"asked for the patched model in {found.source}, which holds NaN or infinite values in "
            f"{broken[:3]}; fetch or train it again"
        )
    return backbone, base


def open_as_trained(folder: Path) -> Backbone:
    """Opens what phreg wrote to a folder of this disk, and sets the read-out that it was trained with."""
    backbone, _ = open_saved(resolve.locate(folder))
    set_readout(backbone, backbone.trained_readout)
    return backbone


def open_as_class(
    found: Located, backbone: Backbone, model_class: type | None, settings: Mapping[str, Any]
) -> Backbone:
    """Turns a patched model of transformers that was just opened into one of another class.

    Args:
        found: Where it was found.
        backbone: The model; not to be used any more.
        model_class: The class; None means its own.
        settings: What the class's `from_pretrained` takes.

    Raises:
        LoadError: It is of another library, or the class cannot hold it.
    """
    if backbone.spec.library != "transformers":
        raise LoadError(
            f"asked to load {found.source} with {', '.join(['cls'] * bool(model_class) + sorted(settings))}, "
            f"and it is a {backbone.describe()}; these are for models of transformers: load it as it is, and "
            "change its head by its own library, in timm by model.reset_classifier(classes)"
        )
    from phreg.backbones.transformers_classes import as_class  # which imports transformers

    moved, path = test_time.installed(backbone), vars(backbone.model)["name_or_path"]
    other = as_class(backbone, model_class, settings)  # pyright: ignore[reportArgumentType]
    vars(other.model)["name_or_path"] = path
    if moved is not None:
        test_time.UnitMover(other, moved.units, moved.size)
    return other


def open_into(found: Located, model: nn.Module) -> Backbone:
    """Applies an adapter to a model at hand, or to the vision tower inside of it.

    Raises:
        LoadError: It is no adapter, or was made for other weights; the model is left as it was.
        UnsupportedModelError: There is no vision tower in the model that phreg can patch.
    """
    record = record_of(found)
    if record is None or not needs_base(record.format):
        what = "a model without registers of phreg" if record is None else f"a whole model ({record.format})"
        raise LoadError(
            f"asked to load {found.source} into a {type(model).__name__}, and it is {what}; only an adapter "
            "goes into a model at hand, so leave `into` out, or give the run or adapter"
        )
    towers = resolve.adapt_inside(model)
    if len(towers) > 1:
        towers = [tower for tower in towers if fit(record, tower)]
        if len(towers) != 1:
            raise LoadError(
                f"asked to load {found.source} into a {type(model).__name__}, in which the adapter fits "
                f"{len(towers)} vision towers; give the tower itself"
            )
    (tower,) = towers
    apply_adapter(found.folder, tower)
    tower.trained_readout = record.readout
    _normalise_as(record, tower, found)
    for around in model.modules():
        if tower.model in around.modules() and around not in tower.model.modules():
            _guard(around, tower)
    return tower


def _normalise_as(record: RunRecord, backbone: Backbone, found: Located) -> None:
    """Takes over the normalisation that a record tells, and notes it on the model; older ones tell none."""
    if record.mean is not None and record.std is not None:
        try:
            resolve.settle_normalisation(backbone, record.mean, record.std)
        except PhregError as error:
            raise LoadError(f"asked for {found.source}, whose record is damaged: {error}") from error
        backbone.note_normalisation()


def warn_failed_checks(found: Located) -> None:
    """Warns of a model whose run failed its checks, and names them."""
    record = record_of(found)
    if record is not None and record.failures:
        logger.warning("%s failed its checks: %s", found.source, "; ".join(record.failures))


@dataclass(frozen=True, repr=False)
class RefuseSaving:
    """Stands in for `save_pretrained` on a model around a patched tower of another library.

    What it would write loads again without the registers, and nobody would notice.
    """

    model: nn.Module
    tower: Backbone

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Does what the model's class does once the registers are gone.

        Raises:
            PhregError: The tower has registers.
        """
        if not self.tower.num_registers:
            return type(self.model).save_pretrained(self.model, *arguments, **options)  # pyright: ignore
        raise PhregError(
            f"save_pretrained asked of {type(self.model).__name__}, whose {self.tower.describe()} has "
            "registers, which would be lost on loading; save the model before patching it, keep the adapter "
            "beside it, and put them together again by phreg.load(adapter, into=model)"
        )


def _guard(around: nn.Module, tower: Backbone) -> None:
    if hasattr(around, "save_pretrained"):
        vars(around)["save_pretrained"] = RefuseSaving(around, tower)
