"""Reading back whatever phreg wrote: one table of formats, each with what reads it.

    run, adapter, merged ──phreg.json──────┐
    any other export ──phreg_export.json───┴► format ──FORMATS──► Backbone + Base
    any of them on the hub ──resolve.locate──► folder

A model that was saved whole is built again of its library's config, and never by code from its folder:

    config ──library──► model of random weights ──registers of zeros──► ──every tensor──► the patched model

A new format is a row of `FORMATS` and a reader. What phreg did not write is a base model: see
`phreg.backbones.resolve`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from phreg import __version__, demo
from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Located, adapt
from phreg.errors import LoadError, PhregError, UnsupportedModelError
from phreg.formats.adapter import apply_adapter, base_of, fit, read_own_tensors, read_tensors, take_shape
from phreg.record import Base, RecordError, RunRecord, read_record, weights_sha256
from phreg.storage import ADAPTER_FILE, ADAPTER_FORMAT, EXPORT_FILE, MODEL_FORMAT, MODEL_TENSORS, OWN_FORMATS

Reader = Callable[[Located, RunRecord], tuple[Backbone, Base]]

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
    if record.format not in FORMATS:
        raise LoadError(
            f"asked for {found.source}, an export of the format {record.format!r}; phreg loads back "
            f"{', '.join(FORMATS)}: upgrade phreg, or load it with the library it was made for"
        )
    return record


def open_model(
    source: str | os.PathLike[str] | nn.Module,
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
    backbone, base = _open(source, revision)
    resolve.settle_normalisation(backbone, mean, std)
    return backbone, base


def _open(source: str | os.PathLike[str] | nn.Module, revision: str | None) -> tuple[Backbone, Base]:
    if isinstance(source, nn.Module):
        return resolve.load(source)
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
    backbone, base = FORMATS[record.format](found, record)
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


def open_into(found: Located, model: nn.Module) -> Backbone:
    """Applies an adapter to a model at hand, or to the vision tower inside of it.

    Raises:
        LoadError: It is no adapter, or was made for other weights; the model is left as it was.
        UnsupportedModelError: There is no vision tower in the model that phreg can patch.
    """
    record = record_of(found)
    if record is None or record.format != ADAPTER_FORMAT:
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
    """Warns of a model whose run failed its gates, and names them."""
    record = record_of(found)
    if record is not None and record.failures:
        logger.warning("%s failed its gates: %s", found.source, "; ".join(record.failures))


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


# -- readers -------------------------------------------------------------------------------------------------


def _read_adapter(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Finds the base again and patches it."""
    base = base_of(record)
    if base.source == "instance":
        raise LoadError(
            f"the adapter in {found.folder} was made from a model instance, which cannot be found again; "
            "build that model and pass it: phreg.load(path, into=model), which phreg.export takes too"
        )
    try:
        backbone, _ = _open(base.source, base.revision)
    except (LoadError, UnsupportedModelError) as error:
        raise type(error)(
            f"the base of the adapter in {found.folder} cannot be opened: {error}. With that base at hand: "
            "phreg.load(path, into=model)"
        ) from error
    apply_adapter(found.folder, backbone)
    return backbone, base


def _read_patched(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Builds a model that the `merged` export or a transformers model's own `save_pretrained` wrote whole."""
    tensors = read_own_tensors(found.folder / MODEL_TENSORS, record)
    try:
        backbone = resolve.build(str(record.library), record.model_class, record.config or {})
        take_shape(backbone, record)
        missing = sorted(backbone.disk_state().keys() - tensors.keys())
        if missing:
            raise LoadError(f"it lacks {missing[:3]}")
        backbone.load_disk_state(tensors)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, PhregError) as error:
        raise LoadError(
            f"patched model in {found.folder} cannot be loaded ({error}); save or copy it again"
        ) from error
    backbone.eval()
    return backbone, _whole(backbone, found)


def _read_remote_code(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Builds the stock class under the code of the folder, which is not run."""
    from phreg.backbones.transformers import load_remote_code

    # The class in the folder, unlike the stock class, has no other names on disk than in memory.
    _check_unchanged(found, record, weights_sha256(read_tensors(found.folder / "model.safetensors")))
    backbone = load_remote_code(found.folder)
    backbone.eval()
    return backbone, _whole(backbone, found)


def _refuse_graph(found: Located, _record: RunRecord) -> tuple[Backbone, Base]:
    raise LoadError(
        f"asked for the model in {found.source}, which is a graph (onnx) and no model of a library any "
        "more: run it with onnxruntime, or load the run or adapter that it was made from"
    )


def _whole(backbone: Backbone, found: Located) -> Base:
    sha256 = weights_sha256(backbone.disk_state())
    return Base(found.source, backbone.spec.library, found.revision, sha256)


def _read_stock(found: Located, record: RunRecord) -> tuple[Backbone, Base]:
    """Builds a stock model, and checks that it is the one that was exported."""
    if not any(path.suffix == ".safetensors" for path in found.folder.iterdir()):
        raise LoadError(
            f"asked for the export in {found.source}, which has no .safetensors file; phreg exports write no "
            "other kind, and a pickle may hold code: fetch it again, whole"
        )
    backbone, base = resolve.load(found)
    _check_unchanged(found, record, base.sha256)
    return backbone, base


def _check_unchanged(found: Located, record: RunRecord, sha256: str) -> None:
    if record.sha256 is None:
        logger.warning(
            "%s has no sha256 of its weights: damage to them would go unnoticed; export it again to have "
            "them checked", found.source,
        )  # fmt: skip
    elif sha256 != record.sha256:
        raise LoadError(
            f"asked for the export in {found.source}, whose weights have sha256 {sha256[:12]}…, and "
            f"{record.sha256[:12]}… were written; it was changed since: fetch or export it again"
        )


FORMATS: dict[str, Reader] = {
    ADAPTER_FORMAT: _read_adapter,
    MODEL_FORMAT: _read_patched,
    "timm": _read_stock,
    "transformers": _read_stock,
    "open_clip": _read_stock,
    "remote-code": _read_remote_code,
    "onnx": _refuse_graph,
}
"""What reads each format, by the name in phreg.json or phreg_export.json."""
