"""Words why an adapter does not fit a model: quantised weights, another architecture, or other weights."""

from collections.abc import Mapping

from torch import Tensor

from phreg.backbones.base import Backbone, packed_types
from phreg.errors import LoadError
from phreg.low_rank import Factors
from phreg.record import Base, RunRecord, weights_sha256


def other_base(
    record: RunRecord, tensors: Mapping[str, Tensor | Factors], shaped: Backbone | None, backbone: Backbone
) -> str:
    """Says why an adapter was not made for a model, as a sentence that goes on after the adapter.

    Args:
        record: The adapter's record, with a base.
        tensors: Its tensors.
        shaped: A twin of the model with the registers and the size that the record tells of; None where the
            model cannot have them.
        backbone: The model, unpatched.
    """
    base = base_of(record)
    made = f"was made for {base.source}"
    packed = packed_types(backbone.model)
    if packed:
        return (
            f"{made}, and the weights of {backbone.describe()} are quantised ({', '.join(packed)}), which "
            "hides whether they are the same; load the adapter onto the base in fp32, fp16 or bf16, and "
            "quantise it then"
        )
    found = type(backbone.model).__name__
    onto = "load it onto that base" + (f" (revision {base.revision})" if base.revision else "")
    if record.model_class != found:
        return (
            f"{made}, a {record.model_class}; the model is a {found}, whose vision tower, if it has one, has "
            f"another architecture or other weights; {onto}"
        )
    if difference := _architecture(tensors, shaped):
        return f"{made}, which is of another architecture than this {found}: {difference}; {onto}"
    return (
        f"{made} with weights sha256 {base.sha256[:12]}…, but {backbone.describe()} has "
        f"{weights_sha256(backbone.disk_state())[:12]}…, and neither is its vision tower the same; {onto}"
    )


def _architecture(tensors: Mapping[str, Tensor | Factors], shaped: Backbone | None) -> str:
    """Says in what the architectures differ, as far as tensors show; empty where they do not."""
    if shaped is None:
        return "it takes no such size or registers"
    own = shaped.disk_state()
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else (len(tensor.up), tensor.down.shape[1])
        if name not in own:
            return f"it lacks {name}"
        if shape != tuple(own[name].shape):
            return f"its {name} has shape {tuple(own[name].shape)}, the adapter's {shape}"
    return ""


def base_of(record: RunRecord) -> Base:
    """Names the base of an adapter; raises a LoadError where its record tells none."""
    if record.base is None:
        raise LoadError(f"asked for the base of a {record.format}, whose record names none; give an adapter")
    return record.base
