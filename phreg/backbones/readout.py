"""Dense read-outs of CLIP-type models: other ways through the last block, after which patches match text.

A CLIP's last block was trained to fill CLS, and its patches match text poorly. Both read-outs leave out the
block's residual and its MLP. The model itself is changed, so whatever runs it, its own library or phreg,
gets the read-out; meanwhile its pooled output means nothing. Final norm and projection come after, in
`Backbone.forward`.

    plain        x + attention(norm(x)), + MLP naclip       out(softmax(keys·keys * scale + omega) · values)
    omega: a Gaussian of patches' distances value-only   out(values)

NACLIP is Hajimiri et al., arXiv 2404.08181; value-only is MaskCLIP, Zhou et al., arXiv 2112.01071; PH-Reg
(arXiv 2505.21501) distils the first into the second.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Attention, Backbone
from phreg.errors import PhregError

Readout = Literal["plain", "naclip", "value-only"]

GAUSSIAN_STD = 5.0
"""Standard deviation of NACLIP's Gaussian, in patches."""


def set_readout(backbone: Backbone, readout: Readout) -> None:
    """Changes how the last block of a CLIP-type model is read, in place; `plain` undoes any other exactly.

    Args:
        backbone: A model with a projection from tokens to the joint space.
        readout: `naclip`, `value-only`, or `plain`: as the model came.

    Raises:
        PhregError: The model is not of CLIP's type, or `naclip` cannot see its grid; nothing has changed
        then.
    """
    if readout != "plain" and backbone.projection is None:
        raise PhregError(
            f"read-out {readout} asked of {backbone.describe()}, which has no projection from its tokens to "
            "a space shared with text; leave target.teacher_readout and target.student_readout at plain"
        )
    block, last = backbone.blocks[-1], len(backbone.blocks) - 1
    overrides: dict[nn.Module, Callable[..., Tensor]] = {}
    if readout == "value-only":
        overrides = {block: DenseForward(backbone.attention(last), grid=None)}
    elif readout == "naclip":
        grid = GridForward(_patch_convolution(backbone))
        overrides = {block: DenseForward(backbone.attention(last), grid), grid.convolution: grid}
    for module in backbone.model.modules():
        if isinstance(vars(module).get("forward"), DenseForward | GridForward):
            del module.forward
    for module, forward in overrides.items():
        module.forward = forward
    backbone.readout = readout


@dataclass
class GridForward:
    """A patch embedding's `forward` that notes the grid, which the last block cannot tell from its tokens.

    Like `DenseForward` it is an object, not a closure, so that copies of the model have one of their own.
    """

    convolution: nn.Conv2d
    shape: tuple[int, int] = (0, 0)

    def __call__(self, images: Tensor) -> Tensor:
        """Makes patches as the convolution does."""
        patches = type(self.convolution).forward(self.convolution, images)
        self.shape = (patches.shape[-2], patches.shape[-1])
        return patches


@dataclass
class DenseForward:
    """A last block's `forward`: NACLIP's where there is a grid, the values alone where there is none."""

    attention: Attention
    grid: GridForward | None

    def __call__(
        self, tokens: Float[Tensor, "batch tokens width"], *_: Any, **__: Any
    ) -> Float[Tensor, "batch tokens width"]:
        """Reads tokens that enter the block."""
        normed = self.attention.norm(tokens)
        heads = self.attention.values(normed)
        if self.grid is not None:
            keys = self.attention.keys(normed)
            omega = _omega(self.grid.shape, tokens.shape[1], keys.device, keys.dtype)
            heads = nn.functional.scaled_dot_product_attention(
                keys, keys, heads, omega, scale=self.attention.scale
            )
        return self.attention.out(heads.transpose(1, 2).flatten(2))


def gaussian_bias(
    grid: tuple[int, int], num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "num_tokens num_tokens"]:
    """Computes NACLIP's omega: what is added to the attention scores of each pair of tokens.

    Between patches it is exp(-d² / (2 · 5²)), d their distance in patches; it is zero for the tokens ahead
    of the patches.
    """
    rows, cols = torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
    places = torch.cartesian_prod(rows, cols).float()
    squares = (places[:, None] - places[None]).square().sum(-1)
    ahead = num_tokens - len(places)
    return nn.functional.pad(torch.exp(-squares / (2 * GAUSSIAN_STD**2)), (ahead, 0, ahead, 0)).to(dtype)


@lru_cache(maxsize=8)
def _cached_bias(grid: tuple[int, int], num_tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # what is made in inference mode could not be used in training later
        return gaussian_bias(grid, num_tokens, device, dtype)


def _omega(grid: tuple[int, int], num_tokens: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    # A compiler traces with stand-ins for tensors, which must not get into the cache.
    bias = gaussian_bias if torch.compiler.is_compiling() else _cached_bias
    return bias(grid, num_tokens, device, dtype)


def _patch_convolution(backbone: Backbone) -> nn.Conv2d:
    """Finds the convolution that makes patches; its output has the shape of the grid."""
    owners = {name.rpartition(".")[0] for name in backbone.roles()["patch_embed"]}
    modules = [backbone.model.get_submodule(owner) for owner in owners]
    convolutions = [module for module in modules if isinstance(module, nn.Conv2d)]
    if len(convolutions) != 1:
        raise PhregError(
            f"read-out naclip asked of {backbone.describe()}, whose patches come from {len(convolutions)} "
            "convolutions, so that their grid is unknown; use value-only"
        )
    return convolutions[0]
