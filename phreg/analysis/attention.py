"""Reads attention weights off a running model, without asking it for another implementation.

Vision transformers of all three libraries end in one function of torch, which is given queries and keys with
everything done to them: norms, rotary positions, scale, mask. Listening there gives the weights of any model,
and only the rows of the queries that are asked for are ever computed.

    block i ──► scaled_dot_product_attention(q, k, v) ──► as ever
                              └──► softmax(q[rows] kᵀ) ──► weights of block i
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from phreg.backbones.base import Backbone
from phreg.errors import UnsupportedModelError


@torch.no_grad()
def attention_weights(
    backbone: Backbone,
    images: Float[Tensor, "batch 3 height width"],
    queries: slice = slice(None),
    reduce: Callable[[Tensor], Tensor] = lambda weights: weights,
) -> list[Tensor]:
    """Runs the model and returns the attention weights of every block, in fp32.

    Tokens lie as they do inside the blocks: prefix, registers, patches (`Backbone.layout`).

    Args:
        backbone: The model, in eval mode.
        images: Normalised images on the model's device.
        queries: Tokens whose attention is wanted; `slice(0, 1)` is CLS where there is one.
        reduce: What to keep of each block's weights (batch, heads, queries, tokens), such as their mean over
            heads; all blocks together need much memory.

    Raises:
        UnsupportedModelError: The model computes attention in another way, which cannot be listened to.
    """
    tokens = backbone.layout(images).num_tokens
    with _listening(queries, tokens, reduce) as found:
        backbone.run(images)
    depth = len(backbone.blocks)
    if len(found) < depth:
        raise UnsupportedModelError(
            f"attention weights asked of {backbone.describe()}, whose {depth} blocks called torch's "
            f"scaled_dot_product_attention {len(found)} times; load it with sdpa (transformers: "
            'attn_implementation="sdpa"; timm: fused attention on)'
        )
    return found[:depth]  # a pooling head attends after the blocks


@contextmanager
def _listening(queries: slice, tokens: int, reduce: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Collects the weights of every self-attention over `tokens` tokens, in the order of the calls."""
    found: list[Tensor] = []
    original = functional.scaled_dot_product_attention

    def listen(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **other: Any,
    ) -> Tensor:
        if query.shape[-2] == key.shape[-2] == tokens:
            scores = query[..., queries, :].float() @ key.float().transpose(-2, -1)
            scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
            if attn_mask is not None:
                mask = attn_mask.expand(*attn_mask.shape[:-2], tokens, tokens)[..., queries, :]
                scores = (
                    scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
                )
            found.append(reduce(scores.softmax(-1)))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **other)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's shortcut goes past the function
    functional.scaled_dot_product_attention = listen
    try:
        yield found
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast)
