"""Reads attention weights off a running model, without asking it for another implementation.

Vision transformers of all three libraries end in one function of torch, which is given queries and keys with
everything done to them: norms, rotary positions, scale, mask. Listening there gives the weights of any model,
and only the rows of the queries that are asked for are ever computed.

    block i ──► scaled_dot_product_attention(q, k, v) ──► as ever
                              └──► softmax(q[rows] kᵀ) ──► weights of block i ──► maps over the patches

Who looks is what a model reads its answer from: CLS and the registers; where there is no CLS, the patches,
all of them taken together. What they look at are the patches.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from phreg.backbones.base import Backbone
from phreg.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class AttentionReport:
    """Where a model's special tokens look.

    Attributes:
        queries: Who looks: see `query_names`.
        focus: Attention in the last block, mean over images and heads (Darcet et al. 2024, arXiv 2309.16588,
            figure 16). What is missing to a sum of 1 falls on CLS and registers.
        share: Block by block, the share of the first query's attention that falls on outliers, mean over
            images and heads.
        fair: The share that attention spread evenly over all tokens would give them.
    """

    queries: tuple[str, ...]
    focus: Float[Tensor, "queries rows cols"]
    share: tuple[float, ...]
    fair: float

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON can hold it."""
        return {
            "queries": list(self.queries),
            "focus": self.focus.tolist(),
            "share": list(self.share),
            "fair": self.fair,
        }


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
    with capture_attention(queries, tokens, lambda weights, _values: reduce(weights)) as found:
        backbone.run(images)
    return complete_capture(backbone, found)


@torch.no_grad()
def attention_maps(
    backbone: Backbone, images: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, "batch queries heads rows cols"]:
    """Runs the model and returns where it looks in the last block, head by head, in fp32.

    Args:
        backbone: The model, in eval mode.
        images: Normalised images on the model's device.

    Returns:
        The attention that `query_names` pay to each patch.

    Raises:
        UnsupportedModelError: The model computes attention in another way, which cannot be listened to.
    """
    with capture_maps(backbone, images) as found:
        backbone.run(images)
    return complete_capture(backbone, found)[-1]


def query_names(backbone: Backbone) -> tuple[str, ...]:
    """Names the queries of attention maps: CLS, or without one `patches`, their mean; then the others."""
    return backbone.special_tokens if backbone.class_tokens else ("patches", *backbone.special_tokens)


@contextmanager
def capture_maps(backbone: Backbone, images: Float[Tensor, "batch 3 height width"]) -> Iterator[list[Tensor]]:
    """Collects where the model looks while it runs, block by block: (batch, queries, heads, rows, cols)."""
    layout = backbone.layout(images)
    special = layout.num_tokens - layout.num_patches
    from_patches = not backbone.class_tokens

    def to_maps(weights: Tensor, _values: Tensor) -> Tensor:
        if from_patches:
            mean = weights[:, :, special:].mean(dim=2, keepdim=True)
            weights = torch.cat([mean, weights[:, :, :special]], dim=2)
        return weights[..., special:].transpose(1, 2).unflatten(-1, layout.grid)

    queries = slice(None) if from_patches else slice(0, special)
    with capture_attention(queries, layout.num_tokens, to_maps) as found:
        yield found


def complete_capture(backbone: Backbone, found: list[Tensor]) -> list[Tensor]:
    """Takes the attention of each block, once it is checked that all blocks were captured.

    Args:
        backbone: The model that ran.
        found: What was collected, in the order of the calls.

    Raises:
        UnsupportedModelError: There is less than a model of this depth gives: it computes attention in
            another way.
    """
    depth = len(backbone.blocks)
    if len(found) < depth:
        raise UnsupportedModelError(
            f"attention weights asked of {backbone.describe()}, whose {depth} blocks called torch's "
            f"scaled_dot_product_attention {len(found)} times; load it with sdpa (transformers: "
            'attn_implementation="sdpa"; timm: fused attention on)'
        )
    return found[:depth]  # a pooling head attends after the blocks


def attention_report(
    queries: tuple[str, ...],
    focus: Float[Tensor, "queries rows cols"],
    first: Float[Tensor, "blocks images rows cols"],
    outliers: Bool[Tensor, "images rows cols"],
    num_tokens: int,
) -> AttentionReport:
    """Sums up what was captured, once it is known which patches are outliers.

    Args:
        queries: Who looks.
        focus: Attention in the last block, mean over images and heads.
        first: Attention of the first query in every block, mean over heads.
        outliers: The patches whose share is wanted.
        num_tokens: Tokens that attention is divided among, CLS and registers included.
    """
    return AttentionReport(
        queries=queries,
        focus=focus,
        share=tuple((first * outliers).sum(dim=(2, 3)).mean(dim=1).tolist()),
        fair=float(outliers.sum()) / len(outliers) / num_tokens,
    )


@contextmanager
def capture_attention(
    queries: slice, tokens: int, reduce: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[list[Tensor]]:
    """Collects what is wanted of every self-attention while a model runs, in the order of the calls.

    Args:
        queries: Tokens whose attention is wanted.
        tokens: Tokens of a self-attention; others are passed over.
        reduce: What to keep of its weights (batch, heads, queries, tokens) in fp32, and of its values (batch,
            heads, tokens, width).
    """
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
            found.append(reduce(scores.softmax(-1), value))
        return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **other)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # nn.MultiheadAttention's shortcut goes past the function
    functional.scaled_dot_product_attention = listen
    try:
        yield found
    finally:
        functional.scaled_dot_product_attention = original
        torch.backends.mha.set_fastpath_enabled(fast)
