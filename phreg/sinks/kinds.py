"""Tells kinds of sinks apart: what writes them, and what attention does with them.

    written by    units        up to eight hidden units
                  many units   more of them, together
                  MLP          an MLP; no units of it were found to explain them
                  attention
                  input        they enter the block where they emerge with most of what they hold

    attention     parked       it looks there and reads next to nothing: values are small (NOP)
                  read         it looks there, and reads what many tokens then hold (broadcast)
                  ignored      it hardly looks there

The first is measured by cutting: the MLP of the block writes into sinks what it writes into other patches.
What is lost of the sink level was the MLP's. The second is by weight and length of values (arXiv 2606.08105).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from phreg.analysis.attention import capture_attention, complete_capture
from phreg.backbones.base import Backbone
from phreg.errors import UnsupportedModelError
from phreg.sinks.directions import SinkDirection
from phreg.sinks.units import ahead_of
from phreg.tokens import ImageBatch

Writer = Literal["units", "many units", "MLP", "attention", "input"]
AttentionRole = Literal["parked", "read", "ignored"]

MEASURED = 16
"""Images that a kind is measured on."""

AT_ONCE = 4
"""Images a pass."""

FEW = 8
"""Most units that are few."""

LOOKS = 3.0
"""Attention on sinks, as a multiple of their share of the tokens, from which on a head looks there."""

SMALL = 0.25
"""Length of a sink's values, in those of other tokens, below which attention is parked there."""


@dataclass(frozen=True)
class Kind:
    """What makes a population of sinks, and what becomes of it.

    Attributes:
        writer: What writes most of what they hold.
        mlp: Share of the sink level that the MLP of the emergence block writes.
        attention: The same for its attention.
        input: Share that was there before that block. The three add up to 1.
        role: What attention does with them; None where it cannot be read.
        looked_at: Share of the attention of other tokens on sinks, in the head with most, over all later
            blocks; None where it cannot be read.
        value: Length of what that head reads from a sink, in lengths of what it reads from other tokens; None
            where it reads from sinks alone.
    """

    writer: Writer | None
    mlp: float | None
    attention: float | None
    input: float | None
    role: AttentionRole | None
    looked_at: float | None
    value: float | None

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)


@torch.no_grad()
def kind_of(
    backbone: Backbone,
    batches: Sequence[ImageBatch],
    masks: Sequence[Bool[Tensor, "_ patches"]],
    direction: SinkDirection | None,
    emergence: int,
    num_units: int,
) -> Kind:
    """Says what makes a population of sinks, and what attention does with them.

    Args:
        backbone: The model.
        batches: Normalised images.
        masks: The sinks among their patches.
        direction: What they hold after the block where they emerge; None where they have nothing in common.
        emergence: Index of that block.
        num_units: Hidden units that were found to cause them.
    """
    few = list(_with_sinks(batches, masks))
    mlp, attention, before = _writers(backbone, few, direction) if direction is not None else (None,) * 3
    role, looked_at, value = _role(backbone, few, emergence)
    return Kind(_writer(mlp, attention, before, num_units), mlp, attention, before, role, looked_at, value)


def _with_sinks(
    batches: Sequence[ImageBatch], masks: Sequence[Bool[Tensor, "_ patches"]]
) -> Iterator[tuple[ImageBatch, Bool[Tensor, "_ patches"]]]:
    """Takes the first images that have sinks, a few at once."""
    left = MEASURED
    for images, mask in zip(batches, masks, strict=True):
        chosen = mask.any(dim=1).nonzero().flatten()[:left]
        left -= len(chosen)
        for part in chosen.split(AT_ONCE) if len(chosen) else ():
            yield images[part], mask[part]


def _writers(
    backbone: Backbone, few: Sequence[tuple[ImageBatch, Tensor]], direction: SinkDirection
) -> tuple[float | None, float | None, float | None]:
    """Measures the shares of MLP, attention and input in the sink level, at the direction's block."""
    block, mlp = direction.block, backbone.mlp(direction.block)
    whole, cut, before = torch.zeros(3, dtype=torch.float64)
    for images, mask in few:
        patches = backbone.layout(images).patches

        def held(tokens: Tensor, mask: Tensor = mask, patches: Any = patches) -> Tensor:
            return direction.share(patches(tokens))[mask].double().sum().cpu()

        entered: list[Tensor] = []
        with ahead_of(backbone.blocks[block], lambda _module, args, kept=entered: kept.append(args[0])):
            whole += held(backbone.block_tokens(images, [block])[block])
        before += held(entered.pop())
        if mlp is not None:
            with _alike(mlp.down, mask, backbone):
                cut += held(backbone.block_tokens(images, [block])[block])
    input_share = float(before / whole)
    if mlp is None:
        return None, None, input_share
    mlp_share = 1 - float(cut / whole)
    return mlp_share, 1 - mlp_share - input_share, input_share


@contextmanager
def _alike(down: nn.Module, mask: Bool[Tensor, "images patches"], backbone: Backbone) -> Iterator[None]:
    """Lets an MLP write into marked patches what it writes into the others on average."""
    start = backbone.spec.num_prefix + backbone.num_registers

    def hook(_module: nn.Module, _args: Any, written: Tensor) -> Tensor:
        patches = written[:, start:].clone()
        patches[mask] = patches[~mask].mean(dim=0)
        return torch.cat([written[:, :start], patches], dim=1)

    handle = down.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _writer(
    mlp: float | None, attention: float | None, before: float | None, num_units: int
) -> Writer | None:
    """Names what writes most."""
    if mlp is None or attention is None or before is None:
        return "units" if 0 < num_units <= FEW else "many units" if num_units else None
    if before > max(mlp, attention):
        return "input"
    if attention > mlp:
        return "attention"
    return "MLP" if not num_units else "units" if num_units <= FEW else "many units"


def _role(
    backbone: Backbone, few: Sequence[tuple[ImageBatch, Tensor]], emergence: int
) -> tuple[AttentionRole | None, float | None, float | None]:
    """Measures attention on sinks after the block where they emerge, and how long what is read there is."""
    if emergence + 1 == len(backbone.blocks):  # no block attends to them
        return None, None, None
    sums: list[Tensor] = []
    fair = []
    for images, mask in few:
        layout = backbone.layout(images)
        on_sinks = torch.cat([mask.new_zeros(len(mask), layout.num_tokens - mask.shape[1]), mask], dim=1)

        def reduce(weights: Tensor, values: Tensor, on_sinks: Tensor = on_sinks) -> Tensor:
            looking = weights.transpose(1, 2)[~on_sinks]  # (tokens that are no sinks, heads, tokens)
            image = (~on_sinks).nonzero()[:, 0]
            there = on_sinks[image][:, None]
            length = values.float().norm(dim=-1)[image]
            read = looking * length
            return torch.stack(
                [(looking * there).mean(0).sum(-1), (read * there).mean(0).sum(-1), read.mean(0).sum(-1)]
            )

        with capture_attention(slice(None), layout.num_tokens, reduce) as found:
            backbone.run(images)
        try:
            sums.append(torch.stack(complete_capture(backbone, found)[emergence + 1 :]))
        except UnsupportedModelError:
            return None, None, None
        fair.append(float(mask.sum()) / len(mask) / layout.num_tokens)
    looked, read, whole = torch.stack(sums).mean(0).transpose(0, 1).flatten(1)  # (3, blocks x heads)
    head = int(looked.argmax())
    share = float(looked[head])
    there, elsewhere = (float(part[head]) for part in (read, whole - read))
    value = None  # of a head that reads from sinks alone there is nothing to compare with
    if not there:
        value = 0.0
    elif elsewhere > 0:
        value = there / share / (elsewhere / (1 - share))
    if share < LOOKS * sum(fair) / len(fair):
        return "ignored", share, value
    return ("parked" if value is not None and value < SMALL else "read"), share, value
