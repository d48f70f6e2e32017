"""Looks at tiny models whose truth is known: what `phreg inspect` finds of them."""

import torch
from families import FAMILIES
from sinking import faint, plant
from torch import Tensor, nn
from torch.nn.functional import interpolate

from phreg.analysis.consistency import ConsistencyReport
from phreg.analysis.inspection import Inspection, LabelledImages, look
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt

BLOCK, UNIT = 1, 5
"""Where `sinking_model` has its sink."""

CLASSES = torch.arange(12) % 2
"""Of the images of `sinking_model`."""


def sinking_model() -> tuple[Backbone, Tensor]:
    """A ViT of 4x4 patches whose first patch is an artifact, made by one hidden unit, and twelve images."""
    backbone = adapt(FAMILIES["timm/vit"]())
    images = faint(backbone, 12)
    plant(backbone, BLOCK, UNIT, images)
    return backbone, images


def looked_at(
    model: nn.Module | Backbone | str, name: str = "a model", images: Tensor | None = None, **settings
) -> Inspection:
    """Looks at a model, or a family by name; images are noise of the model's own size."""
    if isinstance(model, str):
        model = FAMILIES[model]()
    backbone = model if isinstance(model, Backbone) else adapt(model)
    images = noise(backbone, 3) if images is None else images
    return look(backbone, name, images.split(5), **settings)


def moved(headroom: float, error: float | None = 0.001) -> ConsistencyReport:
    """What views would tell of a model that agrees to .97 with its own, on ten images."""
    grid = torch.full((8, 8), 0.97)
    return ConsistencyReport(
        mean=0.97, worst_mean=0.8, floor=0.97 + headroom, floor_worst_mean=0.9, headroom=headroom,
        headroom_error=error, frame_fixed=0.2, frame_fixed_by_chance=0.1, views=20, by_position=grid,
        frame_fixed_by_position=grid, maps=grid.expand(10, 8, 8), denoised=torch.zeros(0, 8, 8, 16),
    )  # fmt: skip


def noise(backbone: Backbone, count: int) -> Tensor:
    """Images that no two patches of which are alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, *backbone.spec.input_size, generator=generator)


def from_all_sides() -> tuple[Backbone, Tensor, Inspection]:
    """The sinking model, its images, and what all analyses find."""
    backbone, images = sinking_model()
    inspection = looked_at(
        backbone,
        "sinking",
        images,
        resampled=[larger(images)],
        labelled=LabelledImages(images.split(5), CLASSES),
        show=3,
    )
    return backbone, images, inspection


def larger(images: Tensor) -> Tensor:
    """Two images at one and a half times their size."""
    return interpolate(images[:2], scale_factor=1.5)
