"""Putting an adapter onto the model that it belongs to, or onto one built around the same vision tower.

An adapter belongs to exact weights. They are known by the hash of the whole base or, where a LLaVA, a depth
model or a detector stands around it, by that of the base's tower.

    adapter.safetensors ──checks──► tensors ──(renamed for the tower)──► model, patched in place
    phreg.json ──hashes── same base? ──no──► error, the model as it was
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from phreg.backbones.base import Backbone, packed_types
from phreg.backbones.resolve import weights_sha256
from phreg.errors import LoadError, PhregError
from phreg.rollback import rollback_on_error
from phreg.sinks import test_time
from phreg.training.checkpoint import Tower, read_adapter

logger = logging.getLogger(__name__)

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
"""Endings of files that may hold pickled objects."""

TOWER_PRECISIONS = ("float32", "float16", "bfloat16")
"""Precisions that a base's vision tower is known again in."""


def apply_adapter(folder: Path, backbone: Backbone) -> None:
    """Turns an unpatched base model, or a model built around its vision tower, into a patched one, in place.

    Around the same tower the adapter's other tensors, such as those of the base's own head, are left out.

    Raises:
        LoadError: The base's weights are not those the adapter was made from, or the adapter's tensors are
            unreadable or not those of the model. The model is left as it was.
    """
    record = read_adapter(folder)
    tensors = read_own_tensors(folder / "adapter.safetensors", record)
    kind = fit(record, backbone)
    if kind is None:
        raise LoadError(_other_base(folder, record["base"], backbone))
    target = backbone if kind == "whole" else backbone.vision_tower()
    wanted = tuple(record["input_size"])
    with rollback_on_error(backbone) as state:
        state.work_on_copies()
        before = target.disk_state()
        try:
            if wanted != backbone.spec.input_size:
                backbone.set_input_size(wanted)
            if record["registers"]:
                backbone.insert_registers(torch.zeros(record["registers"], backbone.spec.width))
            own = target.disk_state()
            if kind == "tower":
                tensors = _of_the_tower(tensors, record["tower"]["prefix"], own, backbone)
            _check_tensors(tensors, own, before, same_dtype=kind == "whole")
            target.load_disk_state(tensors)
            if record.get("test_time"):
                test_time.attach(backbone, record["test_time"], record.get("test_time_size"))
        except PhregError as error:
            raise LoadError(f"the adapter in {folder} does not fit: {error}") from error
        if kind == "whole":
            backbone.adapter = folder


def _other_base(folder: Path, base: Mapping[str, Any], backbone: Backbone) -> str:
    """Words why an adapter was not made for a model."""
    made = f"the adapter in {folder} was made for {base['source']}"
    packed = packed_types(backbone.model)
    if packed:
        return (
            f"{made}, and the weights of {backbone.describe()} are quantised ({', '.join(packed)}), which "
            "hides whether they are the same; load the adapter onto the base in fp32, fp16 or bf16, and "
            "quantise it then"
        )
    return (
        f"{made} with weights sha256 {base['sha256'][:12]}…, but {backbone.describe()} has "
        f"{weights_sha256(backbone.disk_state())[:12]}…, and neither is its vision tower the same; load it "
        "onto that base" + (f" (revision {base['revision']})" if base["revision"] else "")
    )


def fits(folder: Path, backbone: Backbone) -> bool:
    """Tells whether an adapter was made for a model's weights, or for those of its vision tower."""
    return fit(read_adapter(folder), backbone) is not None


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


def read_own_tensors(file: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads the tensors of one of phreg's own formats, and checks that they are those that were written.

    A record of an earlier phreg does not tell: they are then read with a warning.

    Raises:
        LoadError: As `read_tensors`, or they are not those of the record.
    """
    tensors = read_tensors(file)
    if "tensors_sha256" not in record or "settings_sha256" not in record:
        logger.warning(
            "%s has no sha256 of its tensors and settings, as earlier versions of phreg wrote none: damage "
            "to them would go unnoticed; save it again to have them checked", file.parent,
        )  # fmt: skip
    expected, found = record.get("tensors_sha256"), weights_sha256(tensors)
    if expected is not None and found != expected:
        raise LoadError(
            f"asked for the tensors in {file}, which have sha256 {found[:12]}…, and {str(expected)[:12]}… "
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
    return Tower(
        prefix, {name: weights_sha256(_cast(state, getattr(torch, name))) for name in TOWER_PRECISIONS}
    )


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def fit(record: Mapping[str, Any], backbone: Backbone) -> Literal["whole", "tower"] | None:
    """Says what of an unpatched model an adapter was made for: the whole, its vision tower, or neither."""
    tower = record.get("tower")
    same_class = type(backbone.model).__name__ == record["class"]
    # A whole vision-language model takes long to hash, and cannot be the base.
    if (same_class or not tower) and weights_sha256(backbone.disk_state()) == record["base"]["sha256"]:
        return "whole"
    if tower is not None:
        state = backbone.tower_state()
        precision = str(next(iter(state.values())).dtype).removeprefix("torch.")
        if tower["sha256"].get(precision) == weights_sha256(state):
            return "tower"
    return None


def _of_the_tower(
    tensors: Mapping[str, Tensor], prefix: str, own: Mapping[str, Tensor], backbone: Backbone
) -> dict[str, Tensor]:
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
    """Refuses tensors of another kind than the model's, and registers without values."""
    new = [name for name in own if name not in before or own[name].shape != before[name].shape]
    lacking = sorted(name for name in new if name not in tensors)
    if lacking:
        raise PhregError(f"it lacks {lacking[:3]}; fetch or train it again")
    for name in tensors.keys() & own.keys():
        found, expected = tensors[name].dtype, own[name].dtype
        if found != expected if same_dtype else not found.is_floating_point:
            raise PhregError(f"{name} is of {found}, the model's of {expected}; fetch or train it again")
