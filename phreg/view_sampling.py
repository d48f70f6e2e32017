"""Draws views: which shifts, mirrorings and scales the images of a batch are seen under.

    ViewsConfig, grid ──range of shifts──► offsets, flips ──► Views, or AffineViews where views are resampled

All random numbers come from a CPU generator, so a draw is the same on every device. How a view is made and
undone stands in `phreg.views`.
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from phreg.backbones.base import Spec
from phreg.config import ViewsConfig
from phreg.errors import PhregError
from phreg.views import AffineViews, Fill, ViewGroup, Views

POOL_FACTOR = 10
"""Offsets drawn for each one that farthest-point sampling selects (PH-Reg code)."""


def sample_views(
    config: ViewsConfig, spec: Spec, size: tuple[int, int], batch: int, generator: torch.Generator
) -> list[ViewGroup]:
    """Draws the views of a batch. Each image has its own; the first one is always the unmoved image.

    Args:
        config: Count, range, sampler, flips and fill.
        spec: The model's patch size and normalisation.
        size: Height and width of the images, in pixels.
        batch: Number of images.
        generator: A CPU generator; nothing else decides the draw.

    Returns:
        Groups of views of equal shape, usually one group.

    Raises:
        PhregError: More views are asked for than there are different ones.
    """
    grid = (size[0] // spec.patch_size[0], size[1] // spec.patch_size[1])
    crop = config.fill == "valid-crop"
    low, high, window = _shifts(config, grid)
    different = check_different(config, spec, size)
    offsets = sample_offsets(config, low, high, batch, generator)
    flips = torch.rand(batch, config.count, generator=generator) < config.flip
    offsets[:, 0], flips[:, 0] = 0, False
    fill, margin = _fill_value(config, spec), _margin(config, grid)
    exact = Views(offsets, flips, grid, grid, margin, fill)
    if not crop and different is not None:
        return [exact]
    everything = slice(None)
    unmoved = exact.part(everything, slice(0, 1))
    if config.count == 1:
        return [unmoved]
    moved = exact.part(everything, slice(1, None))
    if crop:
        return [unmoved, replace(moved, window=window)]
    shifts = moved.offsets.float()
    if config.subpatch:
        shifts = shifts + torch.rand(shifts.shape, generator=generator) - 0.5
    scales = 1 + config.scale * (2 * torch.rand(shifts.shape[:2], generator=generator) - 1)
    return [unmoved, AffineViews(shifts, scales, moved.flips, grid, margin, fill)]


def distinct_views(
    config: ViewsConfig,
    spec: Spec,
    size: tuple[int, int],
    batch: int,
    count: int,
    generator: torch.Generator,
) -> Views:
    """Draws moved views without repetition; the image as it is is none of them.

    Args:
        config: Range and fill; shifts are of whole patches, and `count` and `sampler` are not used.
        spec: The model's patch size and normalisation.
        size: Height and width of the images, in pixels.
        batch: Number of images; each has its own draw.
        count: Views, or all there are if there are fewer.
        generator: A CPU generator; nothing else decides the draw.
    """
    grid = (size[0] // spec.patch_size[0], size[1] // spec.patch_size[1])
    low, high, window = _shifts(config, grid)
    down, right = (torch.arange(low[axis], high[axis] + 1) for axis in (0, 1))
    mirrored = torch.tensor([0, 1] if 0 < config.flip < 1 else [round(config.flip)])
    every = torch.cartesian_prod(down, right, mirrored)
    moved = every if window != grid else every[every.abs().sum(1) > 0]
    order = [torch.randperm(len(moved), generator=generator)[:count] for _ in range(batch)]
    drawn = moved[torch.stack(order)]
    fill, margin = _fill_value(config, spec), _margin(config, grid)
    return Views(drawn[..., :2], drawn[..., 2].bool(), grid, window, margin, fill)


def context_margin(config: ViewsConfig, spec: Spec, size: tuple[int, int]) -> tuple[int, int]:
    """Computes the context margin: how far beyond an image its views show.

    Args:
        config: Range and fill.
        spec: The model's patch size.
        size: Height and width of the images, in pixels.

    Returns:
        Rows and columns on each side, in pixels; 0 where the fill is not `context`.
    """
    if config.fill != "context":
        return 0, 0
    rows, cols = _margin(config, (size[0] // spec.patch_size[0], size[1] // spec.patch_size[1]))
    return rows * spec.patch_size[0], cols * spec.patch_size[1]


def sample_offsets(
    config: ViewsConfig, low: tuple[int, int], high: tuple[int, int], batch: int, generator: torch.Generator
) -> Int[Tensor, "batch views 2"]:
    """Draws whole-patch shifts between `low` and `high`, both inclusive.

    `farthest-point` draws a pool ten times as large. From a random start, it selects the point farthest from
    those selected before. The paper says "uniformly"; its code does this. Most shifts lie on the border of
    the range.
    """
    pool_size = config.count * (POOL_FACTOR if config.sampler == "farthest-point" else 1)
    pool = torch.stack(
        [
            torch.randint(low[axis], high[axis] + 1, (batch, pool_size), generator=generator)
            for axis in (0, 1)
        ],
        -1,
    )
    if config.sampler == "uniform":
        return pool
    rows = torch.arange(batch)
    newest = torch.randint(pool_size, (batch,), generator=generator)
    chosen = [newest]
    nearest = torch.full((batch, pool_size), torch.iinfo(torch.int64).max)
    for _ in range(config.count - 1):
        distance = (pool - pool[rows, newest].unsqueeze(1)).square().sum(-1)
        nearest = torch.minimum(nearest, distance)
        newest = nearest.argmax(1)
        chosen.append(newest)
    return pool[rows.unsqueeze(1), torch.stack(chosen, 1)]


def count_different(config: ViewsConfig, grid: tuple[int, int]) -> int | None:
    """Counts the different views on a grid; None if there is no limit (fractional shifts, scales)."""
    if config.subpatch or config.scale > 0:
        return None
    shifts = [side + 1 if config.fill == "valid-crop" else 2 * side + 1 for side in _reach(config, grid)]
    return shifts[0] * shifts[1] * (2 if 0 < config.flip < 1 else 1)


def check_different(config: ViewsConfig, spec: Spec, size: tuple[int, int]) -> int | None:
    """Counts the different views of images of a size, as `count_different`, and checks that they suffice.

    Raises:
        PhregError: More views are asked for than there are different ones.
    """
    different = count_different(config, (size[0] // spec.patch_size[0], size[1] // spec.patch_size[1]))
    if different is not None and config.count > different:
        raise PhregError(
            f"views.count asks for {config.count} views, but views.max_shift = {config.max_shift} allows "
            f"only {different} different ones at this size, {size[0]}x{size[1]} pixels; lower views.count, "
            "or raise views.max_shift"
        )
    return different


def _reach(config: ViewsConfig, grid: tuple[int, int]) -> tuple[int, int]:
    # Shifts are a share of the grid side, rounded to whole patches (PH-Reg code: 4 of 28, 6 of 37).
    return (round(config.max_shift * grid[0]), round(config.max_shift * grid[1]))


def _shifts(
    config: ViewsConfig, grid: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Says between which shifts views lie, both inclusive, and how large a moved view is, in patches."""
    rows, cols = _reach(config, grid)
    if config.fill == "valid-crop":
        return (0, 0), (rows, cols), (grid[0] - rows, grid[1] - cols)
    return (-rows, -cols), (rows, cols), grid


def _margin(config: ViewsConfig, grid: tuple[int, int]) -> tuple[int, int]:
    # In patches. Views that are resampled reach further.
    if config.fill == "valid-crop":
        return (0, 0)
    reach = _reach(config, grid)
    if count_different(config, grid) is not None:
        return reach
    return (reach[0] + 1 + round(config.scale * grid[0]), reach[1] + 1 + round(config.scale * grid[1]))


def _fill_value(config: ViewsConfig, spec: Spec) -> Fill:
    match config.fill:
        case "context":
            return None
        case "reflect" | "replicate":
            return config.fill
        case "white":
            pixel = (1.0, 1.0, 1.0)
        case "black":
            pixel = (0.0, 0.0, 0.0)
        case "mean" | "valid-crop":
            pixel = spec.mean
    red, green, blue = ((p - m) / s for p, m, s in zip(pixel, spec.mean, spec.std, strict=True))
    return (red, green, blue)
