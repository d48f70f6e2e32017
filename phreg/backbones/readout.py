"""Dense read-outs of CLIP-type models: other ways through the last block, after which patches match text.

A CLIP's last block was trained to fill CLS, and its patches match text poorly. These read-outs change which
patches a patch attends to: those whose keys or queries are like its own, or itself alone. All but SCLIP's
also leave out the block's residual and its MLP. A read-out changes the model itself: its own library gets it
as well as phreg. Meanwhile the pooled output means nothing. Final norm and projection follow in
`Backbone.forward`.

Models keep their stock forward. `use_readout(backbone)` switches the last block for a time, by default to the
read-out used in training.

    plain        x + attention(norm(x)), + MLP
    naclip       out(softmax(keys·keys * scale + omega) · values)     omega: a Gaussian of patches' distances
    value-only   out(values)
    clearclip    out(softmax(queries·queries * scale) · values)
    sclip        x + out((softmax(queries·queries * scale) + softmax(keys·keys * scale)) · values), + MLP

NACLIP is Hajimiri et al., arXiv 2404.08181; value-only is MaskCLIP, Zhou et al., arXiv 2112.01071; PH-Reg
(arXiv 2505.21501) distils the first into the second. ClearCLIP is Lan et al., arXiv 2407.12442; SCLIP is Wang
et al., arXiv 2312.01597, whose two attentions are added, not averaged.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Attention, Backbone, Readout
from phreg.errors import PhregError

GAUSSIAN_STD = 5.0
"""Standard deviation of NACLIP's Gaussian, in patches."""

RUNNING = "phreg_running_module"
"""Keyword by which the `forward` of a read-out is given the module that runs."""


def set_readout(backbone: Backbone, readout: Readout) -> None:
    """Changes how the last block of a CLIP-type model is read, in place; `plain` undoes any other exactly.

    Args:
        backbone: A model with a projection from tokens to the joint space.
        readout: One of those above; `plain` is as the model came.

    Raises:
        PhregError: The model is not of CLIP's type, or `naclip` cannot see its grid; nothing has changed
        then.
    """
    check_readout(backbone, readout)
    block, last = backbone.blocks[-1], len(backbone.blocks) - 1
    overrides: dict[nn.Module, Callable[..., Tensor]] = {}
    if readout in ("value-only", "clearclip"):
        overrides = {block: DenseForward(block, backbone.attention(last), readout)}
    elif readout == "naclip":
        grid = GridForward(_patch_convolution(backbone))
        dense = DenseForward(block, backbone.attention(last), readout, grid)
        overrides = {block: dense, grid.convolution: grid}
    elif readout == "sclip":
        attention = backbone.attention(last)
        overrides = {attention.module: CorrelativeForward(attention)}
    for module in backbone.model.modules():
        if isinstance(vars(module).get("forward"), DenseForward | GridForward | CorrelativeForward):
            del module.forward
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook == TellModule()]:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    for module, forward in overrides.items():
        module.forward = forward
        module.register_forward_pre_hook(TellModule(), with_kwargs=True)
    backbone.readout = readout


def check_readout(backbone: Backbone, readout: Readout) -> None:
    """Refuses to read a model that is not of CLIP's type in another way than plain.

    Raises:
        PhregError: It has no projection from tokens to the joint space.
    """
    if readout != "plain" and backbone.projection is None:
        raise PhregError(
            f"read-out {readout} asked of {backbone.describe()}, which has no projection from its tokens to "
            "a space shared with text; leave target.teacher_readout and target.student_readout, or a task's "
            "readout or head, at plain"
        )


def dense_readout(backbone: Backbone) -> Readout:
    """Says how a model's dense features are meant: as its read-out was set, or else as phreg trained it."""
    return backbone.readout if backbone.readout != "plain" else backbone.trained_readout


@contextmanager
def use_readout(backbone: Backbone, readout: Readout | None = None) -> Iterator[None]:
    """Reads a model in a certain way for a while; it comes back as it was.

    Args:
        backbone: The model.
        readout: None means as its dense features are meant, see `dense_readout`.

    Raises:
        PhregError: It cannot be read so.
    """
    before, asked = backbone.readout, readout or dense_readout(backbone)
    if asked == before:
        yield
        return
    set_readout(backbone, asked)
    try:
        yield
    finally:
        set_readout(backbone, before)


def read_as(backbone: Backbone, readout: Readout | None = None) -> AbstractContextManager[None]:
    """The old name of `use_readout`; it goes with version 0.3."""
    warnings.warn("phreg.backbones.readout.read_as is now use_readout", DeprecationWarning, stacklevel=2)
    return use_readout(backbone, readout)


@dataclass(frozen=True)
class TellModule:
    """A forward pre-hook that tells a read-out's `forward` which module runs.

    Without it, replicas of a model, which DataParallel makes with weights of their own, would all use those
    of the module that the `forward` was made for.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds the module to the keywords."""
        return args, kwargs | {RUNNING: module}


@dataclass
class GridForward:
    """A patch embedding's `forward` that notes the grid, which the last block cannot tell from its tokens.

    Like `DenseForward` it is an object, not a closure, so that copies of the model have one of their own.
    Replicas of a model share it: they get parts of one batch, whose images have one size.
    """

    convolution: nn.Conv2d
    shape: tuple[int, int] = (0, 0)

    def __call__(self, images: Tensor, **running: Any) -> Tensor:
        """Makes patches as the convolution does."""
        convolution = running.get(RUNNING, self.convolution)
        patches = type(convolution).forward(convolution, images)
        self.shape = (patches.shape[-2], patches.shape[-1])
        return patches


@dataclass
class DenseForward:
    """A last block's `forward` that gives what its attention does, without residual and MLP."""

    block: nn.Module
    attention: Attention
    readout: Readout
    grid: GridForward | None = None
    """Where there is one, patches near each other attend more."""

    def __call__(
        self, tokens: Float[Tensor, "batch tokens width"], *_: Any, **running: Any
    ) -> Float[Tensor, "batch tokens width"]:
        """Reads tokens that enter the block."""
        attention, bias = _attention_of(running.get(RUNNING, self.block), self.block, self.attention), None
        if self.grid is not None:
            bias = _omega(self.grid.shape, tokens.shape[1], tokens.device, tokens.dtype)
        return _mix(attention, attention.norm(tokens), self.readout, bias)


@dataclass
class CorrelativeForward:
    """An attention's `forward` that is SCLIP's; the block around it stays as it is."""

    attention: Attention

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the attention does, normed tokens first, without its weights."""
        own = self.attention.module
        module = kwargs.pop(RUNNING, own)
        output = type(module).forward(module, *args, **kwargs)  # its form differs between libraries
        mixed = _mix(_attention_of(module, own, self.attention), (*args, *kwargs.values())[0], "sclip")
        return (mixed, *(None for _ in output[1:])) if isinstance(output, tuple) else mixed


def _attention_of(running: nn.Module, own: nn.Module, attention: Attention) -> Attention:
    """Takes the parts of an attention from the module that runs, a replica of the one that has them."""
    if running is own:
        return attention
    names = {module: name for name, module in own.named_modules()}
    replica = copy.copy(attention)
    for part, module in vars(attention).items():
        if isinstance(module, nn.Module) and module in names:
            vars(replica)[part] = running.get_submodule(names[module])
    return replica


def _mix(
    attention: Attention,
    normed: Float[Tensor, "batch tokens width"],
    readout: Readout,
    bias: Tensor | None = None,
) -> Float[Tensor, "batch tokens width"]:
    """Mixes the values of tokens by how much their queries, keys or both are like each other."""
    values = attention.values(normed)
    if readout == "value-only":
        heads = values
    else:
        projections = {
            "naclip": (attention.keys,),
            "clearclip": (attention.queries,),
            "sclip": (attention.queries, attention.keys),
        }[readout]
        mask = None if bias is None else bias.to(values.dtype)  # which under autocast is not the tokens'
        mixed = [
            nn.functional.scaled_dot_product_attention(part, part, values, mask, scale=attention.scale)
            for part in (project(normed) for project in projections)
        ]
        heads = sum(mixed[1:], start=mixed[0])
    return attention.out(heads.transpose(1, 2).flatten(2))


def gaussian_bias(
    grid: tuple[int, int], num_tokens: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "num_tokens num_tokens"]:
    """Computes NACLIP's omega: what is added to the attention scores of each pair of tokens.

    Between patches it is exp(-d² / (2 · 5²)), d their distance in patches; it is zero for the tokens ahead
    of the patches.
    """
    rows, cols = torch.arange(grid[0], device=device), torch.arange(grid[1], device=device)
    positions = torch.cartesian_prod(rows, cols).float()
    squares = (positions[:, None] - positions[None]).square().sum(-1)
    ahead = num_tokens - len(positions)
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
    convolutions = [module for module in backbone.owners("patch_embed") if isinstance(module, nn.Conv2d)]
    if len(convolutions) != 1:
        raise PhregError(
            f"read-out naclip asked of {backbone.describe()}, whose patches come from {len(convolutions)} "
            "convolutions, so that their grid is unknown; use value-only"
        )
    return convolutions[0]
