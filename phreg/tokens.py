"""Where each kind of token lies in a vision transformer's sequence.

    sequence   [ prefix | registers | patches ]          (batch, tokens, width)
    grid       patches alone, row by row                 (batch, rows, cols, width)

The prefix is what the model came with (CLS, distillation token, native registers); the registers are the ones
phreg added.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

ImageBatch = Float[Tensor, "_ 3 _ _"]
"""Normalised images. The shape binds no size, since the last batch can be smaller than the others."""


@dataclass(frozen=True)
class TokenLayout:
    """The three parts of a token sequence.

    Attributes:
        num_prefix: Tokens before the registers: CLS and whatever else the model came with.
        num_registers: Registers added by phreg.
        grid: Patch rows and columns.
    """

    num_prefix: int
    num_registers: int
    grid: tuple[int, int]

    @property
    def num_patches(self) -> int:
        """Patch tokens in the sequence."""
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """All tokens in the sequence."""
        return self.num_prefix + self.num_registers + self.num_patches

    def prefix(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch prefix width"]:
        """Takes the tokens the model came with, CLS first."""
        return tokens[:, : self.num_prefix]

    def registers(
        self, tokens: Float[Tensor, "batch tokens *width"]
    ) -> Float[Tensor, "batch registers *width"]:
        """Takes the registers phreg added."""
        return tokens[:, self.num_prefix : self.num_prefix + self.num_registers]

    def patches(self, tokens: Float[Tensor, "batch tokens *width"]) -> Float[Tensor, "batch patches *width"]:
        """Takes the patch tokens, row by row."""
        return tokens[:, self.num_prefix + self.num_registers :]

    def to_grid(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch rows cols width"]:
        """Takes the patch tokens and lays them out as the image lies.

        Raises:
            ValueError: The sequence is not as long as the layout says.
        """
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"expected {self.num_tokens} tokens, {self.num_prefix} + {self.num_registers} + "
                f"{self.grid[0]}x{self.grid[1]} (prefix, registers, patches), got {tokens.shape[1]}"
            )
        return self.patches(tokens).unflatten(1, self.grid)
