"""Adds register tokens to a model, and removes them again.

Registers are extra tokens. They take part in attention inside the block stack and do not exist outside of it.
They hold the global information that a large vision transformer otherwise writes over patches (Darcet et al.
2024, arXiv 2309.16588).
"""

import math
from typing import Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone, unit_movers
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.rollback import rollback_on_error

Init = Literal["randn", "trunc-normal", "zeros"]
_Model = TypeVar("_Model", bound=nn.Module)


def initial_registers(
    count: int, width: int, init: Init = "randn", seed: int = 0
) -> Float[Tensor, "count width"]:
    """Draws register tokens, on the CPU whatever torch's default device is.

    Args:
        count: Number of registers.
        width: Channels of a token.
        init: `randn`: normal of std 1 / sqrt(width) (PH-Reg); `trunc-normal`: truncated normal of std 0.02;
            `zeros`.
        seed: Seed of the draw, which uses no global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    match init:
        case "randn":
            return torch.randn(count, width, generator=generator, device="cpu") / math.sqrt(width)
        case "trunc-normal":
            empty = torch.empty(count, width, device="cpu")
            return nn.init.trunc_normal_(empty, std=0.02, generator=generator)
        case "zeros":
            return torch.zeros(count, width, device="cpu")


def add_registers(model: _Model, count: int, init: Init = "randn", seed: int = 0) -> _Model:
    """Adds register tokens to a vision transformer of transformers, timm or open_clip, in place.

    Args:
        model: The model, of its library's class, or a `phreg` backbone.
        count: Number of registers; 0 changes nothing.
        init: Initial values: `randn`, `trunc-normal` or `zeros`.
        seed: Seed of the draw.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: The model is not one that phreg can patch.
        PhregError: The count is negative, or the model has phreg registers already.
    """
    backbone = model if isinstance(model, Backbone) else adapt(model)
    if count < 0:
        raise PhregError(f"asked for {count} registers; use 0 or more")
    if backbone.num_registers:
        raise PhregError(
            f"asked for registers on {backbone.describe()}, which has {backbone.num_registers} from phreg; "
            "call phreg.remove_registers(model) first"
        )
    if count:
        with rollback_on_error(backbone):
            insert(backbone, initial_registers(count, backbone.spec.width, init, seed))
    return model


def insert(backbone: Backbone, tokens: Float[Tensor, "registers width"]) -> None:
    """Puts register tokens into a model.

    Raises:
        PhregError: Its weights are offloaded, so that new ones would be lost.
    """
    for name, module in backbone.model.named_modules():
        hook = getattr(module, "_hf_hook", None)  # accelerate's
        if any(getattr(one, "offload", False) for one in getattr(hook, "hooks", [hook])):
            raise PhregError(
                f"asked for registers on {backbone.describe()}, whose weights accelerate has offloaded, such "
                f"as {name}: new ones would be lost with the next forward; add registers first, then offload"
            )
    backbone.insert_registers(tokens)


def remove_registers(model: _Model) -> _Model:
    """Removes phreg's registers from a model, in place. This is the exact inverse of `add_registers`.

    Hooks of test-time registers are removed too.

    Returns:
        The same model. A model without phreg registers stays unchanged.
    """
    backbone = model if isinstance(model, Backbone) else adapt(model)
    for mover in unit_movers(backbone.model):
        mover.remove()
    if backbone.num_registers:
        backbone.remove_registers()
    return model
