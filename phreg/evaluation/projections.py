"""Queries, keys and values: what a block's attention makes of the tokens that enter it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.errors import PhregError


@contextmanager
def block_inputs(blocks: Sequence[nn.Module], indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects the tokens that enter blocks, by index, registers included, while the model runs."""
    found: dict[int, Tensor] = {}

    def collector(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def collect(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = (*args, *kwargs.values())[0]

        return collect

    # Behind any hook that inserts the registers ahead of the first block.
    handles = [
        blocks[index].register_forward_pre_hook(collector(index), with_kwargs=True) for index in indices
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def project(
    backbone: Backbone,
    index: int,
    tokens: Float[Tensor, "batch tokens width"],
    source: Literal["queries", "keys", "values"],
    *,
    bias: bool,
) -> Float[Tensor, "batch tokens width"]:
    """Computes queries, keys or values of a block, heads merged.

    Args:
        backbone: The model.
        index: The block.
        tokens: What enters it.
        source: Which of them.
        bias: Whether to keep the bias of the projection.

    Raises:
        PhregError: The bias cannot be taken off.
    """
    attention = backbone.attention(index)
    to_heads: Callable[[Tensor], Tensor] = getattr(attention, source)
    normed = attention.norm(tokens)
    heads = to_heads(normed)
    if not bias:
        probe = normed[:1, :1]
        offset = to_heads(torch.zeros_like(probe))
        once, twice = to_heads(probe) - offset, to_heads(2 * probe) - offset
        # An affine map, less its value at 0, doubles with its argument; a norm of queries or keys does not.
        if not torch.allclose(twice, 2 * once, rtol=0.02, atol=0.02 * float(once.abs().max())):
            raise PhregError(
                f"{source} without bias asked of {backbone.describe()}, which norms them after the "
                "projection, so that their bias cannot be taken off; set bias=true, or read values"
            )
        heads = heads - offset
    return heads.transpose(1, 2).flatten(2)
