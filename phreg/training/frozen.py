"""Frozen weights that are kept in bf16 while a run trains.

Under bf16 autocast a matrix product rounds its weights at every forward, and keeps the rounded copy for the
backward pass. A matrix that does not train can as well be kept rounded. Outputs and gradients are the same to
the bit, and the fp32 matrix and the copies are gone from the device:

    before     fp32, shared by student and teacher
    inside     bf16 on the device, shared as before         fp32 in host memory
    after      fp32, the same bits: results are made of these

Rounded are the linear layers of the blocks, nearly all of a model's weights. Norms, biases and embeddings
stay in fp32, as autocast does not round them. So does fused attention (`nn.MultiheadAttention`), whose
weights PEFT writes at each forward.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phreg.backbones.base import Backbone

logger = logging.getLogger(__name__)


@contextmanager
def frozen_weights(
    dtype: Literal["fp32", "bf16"], *backbones: Backbone
) -> Iterator[AbstractContextManager[Any]]:
    """Keeps the frozen matrices of backbones in a precision inside the context.

    Args:
        dtype: The precision.
        backbones: Models that may share tensors, and then do so inside too.

    Yields:
        A context for forward passes that are not under autocast already. With bf16 it is that of autocast;
        without it, tokens in fp32 would meet weights in bf16.
    """
    if dtype == "fp32":
        yield nullcontext()
        return
    device = backbones[0].device
    sharing: dict[int, list[Tensor]] = {}
    for weight in chain(*map(frozen_matrices, backbones)):
        sharing.setdefault(weight.data_ptr(), []).append(weight)
    before: list[tuple[list[Tensor], Tensor]] = []
    size = 0
    try:
        for weights in sharing.values():  # one by one: a device need not hold all of them twice
            before.append((weights, weights[0].data.to("cpu")))
            _share(weights, weights[0].data.to(torch.bfloat16))
            size += weights[0].nbytes
        logger.info("%d frozen matrices are in bf16 while training: %.0f MiB", len(before), size / 2**20)
        yield torch.autocast(device.type, torch.bfloat16)
    finally:
        while before:
            weights, data = before.pop()
            _share(weights, data.to(device))


def _share(weights: list[Tensor], data: Tensor) -> None:
    for weight in weights:
        weight.data = data


def frozen_matrices(backbone: Backbone) -> list[Tensor]:
    """Lists the fp32 weights of a model's blocks that do not train and that autocast rounds at each use."""
    linear = [
        module
        for block in backbone.blocks
        for module in _outside_fused_attention(block)
        if isinstance(module, nn.Linear)
    ]
    return [
        layer.weight
        for layer in linear
        if not layer.weight.requires_grad and layer.weight.dtype == torch.float32
    ]


def _outside_fused_attention(module: nn.Module) -> Iterator[nn.Module]:
    """Walks through a module and what it holds, not into fused attention or what PEFT makes of it."""
    yield module
    for child in module.children():
        base = getattr(child, "base_layer", child)
        if not isinstance(base, nn.MultiheadAttention):
            yield from _outside_fused_attention(child)
