"""An adapter: written beside its record, read, and put onto the model that it belongs to.

It holds the tensors that differ from the base checkpoint, under the names that the base's own library uses on
disk: whole, or as two factors where they changed at low rank (`phreg.low_rank`). It belongs to exact weights.
They are known by the hash of the whole base or, where a LLaVA, a depth model or a detector stands around it,
by that of the base's tower.

    adapter.safetensors ──hash──► tensors ──(renamed for the tower)─┐
    phreg.json ──hashes── same base? ──yes──► tried on a twin ──────┴── fits? ──yes──► model, patched in place
                               └──no──► error                           └──no──► error

All that can be refused is refused ahead of the first change to the model.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.errors import LoadError, PhregError
from phreg.formats.other_base import base_of as base_of
from phreg.formats.other_base import other_base
from phreg.low_rank import DOWN, UP, Factors, changed
from phreg.record import (
    Base,
    RecordError,
    RunRecord,
    Tower,
    read_record,
    versions,
    weights_sha256,
    write_record,
)
from phreg.registers import add_registers
from phreg.rollback import rollback_on_error, shallow_twin
from phreg.run_summary import RunSummary
from phreg.sinks import test_time
from phreg.storage import (
    ADAPTER_FILE,
    ADAPTER_FORMAT,
    ADAPTER_TENSORS,
    FORMAT_VERSION,
    flush,
    let_others_read,
    replacing,
    write_text,
)

logger = logging.getLogger(__name__)

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
"""Endings of files that may hold pickled objects."""

TOWER_PRECISIONS = ("float32", "float16", "bfloat16")
"""Precisions that a base's vision tower is known again in."""

Fit = Literal["whole", "tower"]
"""What of a model an adapter was made for."""


def save_adapter(
    folder: Path,
    backbone: Backbone,
    base: Base,
    base_state: Mapping[str, Tensor],
    run: RunSummary | None,
    card: Callable[[RunRecord], str],
    *,
    tower: Tower | None = None,
) -> None:
    """Writes the patched model as an adapter, whole or not at all.

    Args:
        folder: Folder to write; an earlier adapter there is replaced.
        backbone: The patched model.
        base: What it was made from.
        base_state: The base's tensors under their on-disk names.
        run: How the run went; None where there was none.
        card: Writes the model card, given the whole record.
        tower: The base's vision tower; without, the adapter goes onto the whole base alone.

    Raises:
        OSError, SafetensorError: The disk does not take it; an earlier adapter there is still whole.
    """
    tensors, moved = _differing(backbone, base_state), test_time.installed(backbone)
    record = RunRecord(
        format=ADAPTER_FORMAT,
        format_version=FORMAT_VERSION,
        model_class=type(backbone.model).__name__,
        base=base,
        tower=tower,
        family=backbone.spec.family,
        registers=backbone.num_registers,
        insertion="after position embedding, before any norm",
        input_size=backbone.spec.input_size,
        mean=backbone.spec.mean,
        std=backbone.spec.std,
        readout=run.readout if run else "plain",
        test_time=moved.units if moved else None,
        test_time_size=moved.size if moved else None,
        versions=versions(),
        run=run,
    ).with_sums(tensors)
    with replacing(folder) as temporary:
        save_file(tensors, temporary / ADAPTER_TENSORS, metadata={"format": "pt"})
        let_others_read(temporary / ADAPTER_TENSORS)
        flush(temporary / ADAPTER_TENSORS)
        write_record(temporary / ADAPTER_FILE, record)
        write_text(temporary / "README.md", card(record))


def _differing(backbone: Backbone, base_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Lists the tensors that differ from the base's, as factors where these give the same bits."""
    own, state = backbone.model.state_dict(), backbone.disk_state()
    factors = {own[name].data_ptr(): factors for name, factors in backbone.low_rank.items()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        before, added = base_state.get(name), factors.get(tensor.data_ptr())
        if before is not None and torch.equal(tensor.cpu(), before.cpu()):
            continue
        # A weight that was joined with others on disk, or rounded in another way, has no factors here.
        if (
            added is not None
            and before is not None
            and torch.equal(tensor.cpu(), changed(before, added).cpu())
        ):
            tensors |= {name + DOWN: added.down, name + UP: added.up}
        else:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return tensors


def read_adapter(folder: Path) -> RunRecord:
    """Reads the record of an adapter.

    Raises:
        LoadError: It is none, says too little, or is of a newer version.
    """
    try:
        record = read_record(folder / ADAPTER_FILE)
    except RecordError as error:
        raise LoadError(f"asked for the adapter in {folder}, whose {error}") from error
    if record.format != ADAPTER_FORMAT:
        raise LoadError(
            f"asked for the adapter in {folder}, found format {record.format!r}; give a run or an adapter"
        )
    return record


def apply_adapter(folder: Path, backbone: Backbone) -> None:
    """Turns an unpatched base model, or a model built around its vision tower, into a patched one, in place.

    Around the same tower the adapter's other tensors, such as those of the base's own head, are left out.

    Raises:
        LoadError: The base's weights are not those the adapter was made from, or the adapter's tensors are
            unreadable or not those of the model. The model has not been touched then.
    """
    record = read_adapter(folder)
    tensors = read_own_tensors(folder / ADAPTER_TENSORS, record)
    kind = fit(record, backbone)
    if kind is None:
        why = other_base(record, _joined(tensors), _shaped(record, backbone), backbone)
        raise LoadError(f"the adapter in {folder} {why}")
    try:
        tensors = _tried(record, tensors, backbone, kind)
    except PhregError as error:
        raise LoadError(f"the adapter in {folder} does not fit: {error}") from error
    # Nothing is refused from here on; an interruption leaves the model as it was all the same.
    with rollback_on_error(backbone):
        target = _part(backbone, kind)
        take_shape(backbone, record)
        target.load_disk_state(tensors)
        if kind == "whole":
            backbone.adapter = folder


def take_shape(backbone: Backbone, record: RunRecord) -> None:
    """Gives an unpatched model the size, the registers and the hooks that a record tells of, and no weights.

    Raises:
        PhregError: It cannot have them.
    """
    if record.input_size is not None and record.input_size != backbone.spec.input_size:
        backbone.set_input_size(record.input_size)
    if record.test_time:
        test_time.install(backbone, record.test_time, record.registers, record.test_time_size)
    elif record.registers:
        add_registers(backbone, record.registers, "zeros")


def _shaped(record: RunRecord, backbone: Backbone) -> Backbone | None:
    """Shapes a twin of a model as a record tells; None where it cannot be."""
    twin = shallow_twin(backbone)
    try:
        take_shape(twin, record)
    except PhregError:
        return None
    return twin


def _tried(
    record: RunRecord, tensors: Mapping[str, Tensor], backbone: Backbone, kind: Fit
) -> dict[str, Tensor]:
    """Tries an adapter on a twin of its model.

    Returns:
        The tensors that go into that part of the model.

    Raises:
        PhregError: The model cannot take its shape, or the tensors are not those of the model in that shape.
    """
    twin = shallow_twin(backbone)
    target = _part(twin, kind)
    before = target.disk_state()
    take_shape(twin, record)
    own = target.disk_state()
    changes = _joined(tensors)
    if kind == "tower" and record.tower is not None:
        changes = _of_the_tower(changes, record.tower.prefix, own, backbone)
    whole = {name: _whole(name, change, before) for name, change in changes.items()}
    _check_tensors(whole, own, before, same_dtype=kind == "whole")
    return whole


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Factors]:
    """Puts the two factors of a change together, under the name of its weight.

    Raises:
        PhregError: One of them is missing.
    """
    joined: dict[str, Tensor | Factors] = {}
    for name, tensor in tensors.items():
        weight = name.removesuffix(DOWN).removesuffix(UP)
        if weight == name:
            joined[name] = tensor
        elif not {weight + DOWN, weight + UP} <= tensors.keys():
            raise PhregError(f"it has one factor of {weight} and lacks the other; fetch or train it again")
        else:
            joined[weight] = Factors(tensors[weight + DOWN], tensors[weight + UP])
    return joined


def _whole(name: str, change: Tensor | Factors, before: Mapping[str, Tensor]) -> Tensor:
    """Returns a tensor that is whole, or the base's with its factors added.

    Raises:
        PhregError: The model has no such tensor, or it has another shape.
    """
    if isinstance(change, Tensor):
        return change
    if name not in before:
        raise PhregError(f"its tensors name [{name!r}], which the model lacks; give its own base")
    (outputs, rank), (ranks, inputs) = change.up.shape, change.down.shape
    if rank != ranks or before[name].shape != (outputs, inputs):
        raise PhregError(
            f"the factors of {name} make a change of shape {(outputs, inputs)}, the model's tensor has "
            f"{tuple(before[name].shape)}; fetch or train it again"
        )
    return changed(before[name], change)


def _part(backbone: Backbone, kind: Fit) -> Backbone:
    return backbone if kind == "whole" else backbone.vision_tower()


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Reads a file of phreg's own tensors.

    Raises:
        LoadError: It is missing, broken, a pickle, or holds NaN or infinite values.
    """
    if not file.is_file():
        pickles = sorted(path.name for path in file.parent.iterdir() if path.suffix in PICKLES)
        others = f", only {', '.join(pickles)}; a pickle may hold code and is never read" if pickles else ""
        raise LoadError(f"asked for {file}, which is not there{others}; fetch the folder again, whole")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"cannot read {file} as safetensors ({error}); it is cut short, or another format, such as a "
            "pickle, which phreg never reads: fetch it again"
        ) from error
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise LoadError(f"{file} holds NaN or infinite values in {broken[:3]}; fetch or train it again")
    return tensors


def read_own_tensors(file: Path, record: RunRecord) -> dict[str, Tensor]:
    """Reads the tensors of one of phreg's own formats, and checks that they are those that were written.

    A record of an earlier phreg does not tell: they are then read with a warning.

    Raises:
        LoadError: As `read_tensors`, or they are not those of the record.
    """
    tensors = read_tensors(file)
    if record.tensors_sha256 is None or record.settings_sha256 is None:
        logger.warning(
            "%s has no sha256 of its tensors and settings, as earlier versions of phreg wrote none: damage "
            "to them would go unnoticed; save it again to have them checked", file.parent,
        )  # fmt: skip
    expected, found = record.tensors_sha256, weights_sha256(tensors)
    if expected is not None and found != expected:
        raise LoadError(
            f"asked for the tensors in {file}, which have sha256 {found[:12]}…, and {expected[:12]}… "
            "were written; they were damaged or changed since: fetch or train them again"
        )
    return tensors


def describe_tower(backbone: Backbone) -> Tower:
    """Tells an unpatched model's vision tower, in each precision that people run it in."""
    names, alone = backbone.disk_state().keys(), backbone.vision_tower().disk_state().keys()
    some = min(alone)
    prefixes = [name.removesuffix(some) for name in names if name.endswith(some)]
    prefix = next(prefix for prefix in prefixes if all(prefix + name in names for name in alone))
    state = backbone.tower_state()
    sums = {}
    for precision in TOWER_PRECISIONS:
        dtype = getattr(torch, precision)
        sums[precision] = weights_sha256({name: tensor.to(dtype) for name, tensor in state.items()})
    return Tower(prefix, sums)


def fit(record: RunRecord, backbone: Backbone) -> Fit | None:
    """Says what of an unpatched model an adapter was made for: the whole, its vision tower, or neither."""
    tower = record.tower
    same_class = type(backbone.model).__name__ == record.model_class
    # A whole vision-language model takes long to hash, and cannot be the base.
    if (same_class or not tower) and weights_sha256(backbone.disk_state()) == base_of(record).sha256:
        return "whole"
    if tower is not None:
        state = backbone.tower_state()
        precision = str(next(iter(state.values())).dtype).removeprefix("torch.")
        if tower.sha256.get(precision) == weights_sha256(state):
            return "tower"
    return None


def _of_the_tower(
    tensors: Mapping[str, Tensor | Factors], prefix: str, own: Mapping[str, Tensor], backbone: Backbone
) -> dict[str, Tensor | Factors]:
    """Takes the tensors of the tower, named as it names them alone, and tells which are left out."""
    found = {name: tensor for name, tensor in tensors.items() if name.removeprefix(prefix) in own}
    left_out = sorted(tensors.keys() - found.keys())
    if left_out:
        logger.warning(
            "%s has only the vision tower of the adapter's base; left out: %s",
            backbone.describe(), ", ".join(left_out),
        )  # fmt: skip
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def _check_tensors(
    tensors: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    *,
    same_dtype: bool,
) -> None:
    """Refuses tensors that the model has not or has of another kind, and registers without values."""
    new = [name for name in own if name not in before or own[name].shape != before[name].shape]
    lacking = sorted(name for name in new if name not in tensors)
    if lacking:
        raise PhregError(f"it lacks {lacking[:3]}; fetch or train it again")
    unknown = sorted(tensors.keys() - own.keys())
    if unknown:
        raise PhregError(f"its tensors name {unknown[:3]}, which the model lacks; give its own base")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise PhregError(
                f"{name} has shape {tuple(tensor.shape)}, the model's {tuple(own[name].shape)}; fetch or "
                "train it again"
            )
        found, expected = tensor.dtype, own[name].dtype
        if found != expected if same_dtype else not found.is_floating_point:
            raise PhregError(f"{name} is of {found}, the model's of {expected}; fetch or train it again")
