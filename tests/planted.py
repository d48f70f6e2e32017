"""A backbone small enough to read, with artifacts planted where a test wants them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from phreg.backbones.base import Backbone, Spec

PATCH, WIDTH, DEPTH = 4, 16, 4
SPEC = Spec("timm", "planted", (PATCH, PATCH), WIDTH, 1, 1, (32, 32), True, (0.5,) * 3, (0.5,) * 3)


class Push(nn.Module):
    """A block that adds `strength` to the first channel of some tokens."""

    def __init__(self, at: Sequence[int], strength: float) -> None:
        super().__init__()
        self.at, self.strength = list(at), strength

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[:, self.at, 0] += self.strength
        return tokens


class Tower(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module], registers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.norm = nn.LayerNorm(WIDTH)
        # A trained norm that plays the artifacts' channel down, as those of real models do.
        self.norm.weight.data[0] = 0.01
        self.extra = nn.Parameter(torch.full((1, 1 + registers, WIDTH), 1e4))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.extra.expand(len(images), -1, -1), patches], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]


class Planted(Backbone):
    """A tower of four blocks, the identity but for those in `pushes`: block -> (patches, strength).

    Its CLS token and registers have norms far beyond every patch's, so that counting them shows.
    """

    def __init__(
        self, pushes: dict[int, tuple[Sequence[int], float]] | None = None, registers: int = 0
    ) -> None:
        torch.manual_seed(0)
        blocks = [Push(*(pushes or {}).get(i, ((), 0.0))) for i in range(DEPTH)]
        for block in blocks:
            block.at = [1 + registers + patch for patch in block.at]
        super().__init__(Tower(blocks, registers), SPEC)
        self._registers = registers

    blocks = property(lambda self: self.model.blocks)
    final_norm = property(lambda self: self.model.norm)
    num_registers = property(lambda self: self._registers)
    registers = property(lambda self: None)

    def run(self, images: Tensor) -> Tensor:
        return self.model(images)

    def insert_registers(self, tokens: Tensor) -> None:
        raise NotImplementedError

    remove_registers = attention = insert_registers

    def roles(self) -> dict[str, list[str]]:
        return {"patch_embed": ["embed.weight", "embed.bias"]}

    def mlp(self, index: int) -> None:
        return None


def pictures(count: int = 12, size: int = 32) -> Tensor:
    """Images of noise, the same at every call."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


CORNERS = (0, 7, 56, 63)
"""The corner patches of the 8 x 8 grid of `pictures()`."""
