"""Low-rank changes of weights, as two factors that give the same bits on every machine.

    changed weight = weight + up @ down

A product of floats depends on the order in which it is summed, and so on the machine. Here each factor is
rounded to so few bits of its largest value that the product, summed over the rank, fits into the 53 bits of a
double: it is exact in any order. Up to rank 128 that leaves 23 bits, about what fp32 has.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

DOUBLE, SINGLE = 53, 23
"""Bits of a sum in double precision, and those that a value in fp32 has at most beside its largest one."""

DOWN, UP = ".lora_A", ".lora_B"
"""What the names of factors end in, in files; as PEFT names them."""


class Factors(NamedTuple):
    """The factors of a change.

    Attributes:
        down: From inputs to the rank.
        up: From the rank to outputs, scaled.
    """

    down: Float[Tensor, "rank inputs"]
    up: Float[Tensor, "outputs rank"]

    def rounded(self) -> "Factors":
        """Returns the same change, rounded so that its product is exact; on the CPU, in fp32."""
        bits = bits_for(len(self.down))
        return Factors(_rounded(self.down, bits), _rounded(self.up, bits))


def changed(weight: Float[Tensor, "outputs inputs"], factors: Factors) -> Float[Tensor, "outputs inputs"]:
    """Returns a weight with rounded factors added, in its own precision and on its device."""
    product = factors.up.cpu().double() @ factors.down.cpu().double()
    # First to fp32, in which weights are trained, whatever precision they are kept in.
    return (weight.detach().cpu().double() + product).float().to(weight.dtype).to(weight.device)


def bits_for(rank: int) -> int:
    """Returns how many bits each value may have, so that sums of `rank` products are exact."""
    return min(SINGLE, (DOUBLE - math.ceil(math.log2(rank))) // 2)


def _rounded(factor: Tensor, bits: int) -> Tensor:
    factor = factor.detach().cpu().double()
    largest = factor.abs().max()
    if not largest > 0:
        return factor.float()
    step = torch.exp2(largest.log2().ceil() - bits)
    return ((factor / step).round() * step).float()
