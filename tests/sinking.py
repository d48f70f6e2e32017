"""Models with sinks of a known cause: a hidden unit, edited so that it answers to one patch, or another."""

import numpy as np
import torch
from torch import Tensor, nn

from phreg import demo
from phreg.backbones.base import Backbone


def photographs(every: int = 3) -> Tensor:
    """Some of the demonstration's squares, as its model wants them."""
    squares = demo.demo_images()[::every]
    return torch.stack([torch.from_numpy(np.array(square)) for square in squares]).movedim(-1, 1) / 127.5 - 1


def faint(backbone: Backbone, count: int = 12, size: tuple[int, int] | None = None) -> Tensor:
    """Images of hardly any contrast, in which a random model sees positions above all."""
    generator = torch.Generator().manual_seed(1)
    return 0.005 * torch.randn(count, 3, *(size or backbone.spec.input_size), generator=generator)


@torch.no_grad()
def plant(
    backbone: Backbone, block: int, unit: int, images: Tensor, patch: int = 0, write: Tensor | None = None
) -> None:
    """Edits a hidden unit so that it answers to one patch of the grid alone, whatever the images show.

    What it reads is the linear map that best tells that patch from all others; its threshold lies halfway.

    Args:
        write: What the unit writes where its activation is 1; None means a long random vector.
    """
    mlp = backbone.mlp(block)
    read: list[Tensor] = []
    handle = mlp.up[0].register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    backbone.run(images)
    handle.remove()
    tokens = read[0].double()
    layout = backbone.layout(images)
    wanted = torch.zeros(tokens.shape[:2], dtype=torch.float64)
    wanted[:, layout.num_tokens - layout.num_patches + patch] = 1
    tokens = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1).flatten(0, 1)
    *weight, bias = torch.linalg.lstsq(tokens, wanted.flatten(), driver="gelsd").solution.tolist()
    for parameter, rows in mlp.rows(torch.tensor([unit])):
        # 10 at that patch, -10 elsewhere, where GELU and SiLU are next to zero.
        row = torch.tensor(weight) if parameter.dim() == 2 else torch.tensor(bias - 0.5)
        parameter[rows] = 20 * row
    if write is None:
        write = 100 * torch.randn(backbone.spec.width, generator=torch.Generator().manual_seed(2))
    mlp.down.weight[:, unit] = write


def pushed(attention: nn.Module, token: int, strength: float = 1000.0) -> None:
    """Lets an attention write a huge value into one token."""

    def push(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, token, 0] += strength
        return output

    attention.register_forward_hook(push)
