"""How a check fails: with the law that is broken, and what was found."""

from torch import Tensor

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of a tensor, that counts as rounding.

A masked register adds exact zeros to the softmax, but the sums run over longer rows, so fp32 results differ
in their last bits (1e-7 a block), and massive activations pass some of that on to small values. A register
that leaks moves outputs by 1e-2.
"""


def expect(holds: bool, law: str, found: str) -> None:
    """Raises where a law does not hold.

    Raises:
        AssertionError: With the law and what was found.
    """
    if not holds:
        raise AssertionError(f"{law} is broken: {found}")


def expect_close(found: Tensor, expected: Tensor, law: str, name: str) -> None:
    """Compares shapes, and values up to `TOLERANCE`."""
    expect(
        found.shape == expected.shape,
        law,
        f"{name} has shape {tuple(found.shape)}, was {tuple(expected.shape)}",
    )
    difference, limit = (found - expected).abs().max().item(), TOLERANCE * expected.abs().max().item()
    expect(
        difference <= limit, law, f"{name} differs by up to {difference:.3g}, rounding explains {limit:.3g}"
    )
