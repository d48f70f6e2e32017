"""The average over moved views: the features that distillation teaches a student, and so its upper bound.

Each view is the image shifted by whole patches, mirrored or not, with its border reflected. The views are a
pure function of their number and of the grid: all images and windows have the same ones. So features do not
depend on the batch that an image is read in.

    images ──draw_views──► moved copies ──read──► grids ──moved back──► mean with the unmoved grids
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from phreg.backbones.base import Spec
from phreg.config import ViewsConfig
from phreg.errors import PhregError
from phreg.seeding import keyed_generator
from phreg.view_sampling import count_different, sample_views
from phreg.views import Views, aligned_sum

VIEWS = ViewsConfig(fill="reflect")
"""How views are drawn, but for their number: up to 15 % of the grid, half of them mirrored."""


def draw_views(count: int, spec: Spec, size: tuple[int, int], batch: int) -> Views:
    """Draws the moved views of images, the same for each image.

    Args:
        count: Views in the average. The unmoved view is one of them, and is left out here.
        spec: The model's patch size.
        size: Height and width of the images, in pixels.
        batch: Number of images.

    Raises:
        PhregError: There are not so many different views at this size.
    """
    config = VIEWS.model_copy(update={"count": count})
    grid = size[0] // spec.patch_size[0], size[1] // spec.patch_size[1]
    different = count_different(config, grid)
    if different is not None and count > different:
        raise PhregError(
            f"reading.views = {count} asks for the average over {count} views; images or windows of "
            f"{size[0]}x{size[1]} pixels, which are {grid[0]}x{grid[1]} patches, have {different} different "
            f"ones, as shifts are up to {config.max_shift:.0%} of a side; lower reading.views, or raise "
            "reading.size or reading.window"
        )
    (views,) = sample_views(config, spec, size, 1, keyed_generator("view average"))
    assert isinstance(views, Views)  # whole patches, padded: one group of exact views
    moved = views.part(slice(None), slice(1, None))
    return replace(moved, offsets=moved.offsets.expand(batch, -1, -1), flips=moved.flips.expand(batch, -1))


def average_views(
    views: Views,
    images: Float[Tensor, "batch 3 height width"],
    unmoved: Sequence[Float[Tensor, "batch rows cols _"]],
    read: Callable[[Tensor], Sequence[Tensor]],
    at_once: int,
) -> list[Float[Tensor, "batch rows cols _"]]:
    """Averages grids over the unmoved view and moved ones, each position over the views that saw it.

    Args:
        views: The moved views.
        images: The unmoved images, normalised.
        unmoved: What was read of them: one or more kinds of grid.
        read: Reads images in the same ways.
        at_once: Images to give to `read` at once; at least one view of all is given.

    Returns:
        A mean of each kind of grid, in fp32.
    """
    totals = [grids.float() for grids in unmoved]
    count = torch.ones(totals[0].shape[:3], dtype=torch.long, device=images.device)
    step = max(1, at_once // len(images))
    for first in range(0, views.count, step):
        part = views.part(slice(None), slice(first, first + step))
        found = read(part.apply(images).flatten(0, 1))
        sums = [aligned_sum(part, grids.float().unflatten(0, (len(images), -1))) for grids in found]
        totals = [total + moved for total, (moved, _) in zip(totals, sums, strict=True)]
        count = count + sums[0][1]
    return [total / count.unsqueeze(-1) for total in totals]
