"""Canvases: how a picture of any size becomes pixels that a model can read, and which part of it they show.

    picture ──fit──► pixels, Placement ──normalise──► pad_to_patches, of `centred` alone ──► model

With all ways to fit but `centred`, pixels are whole patches already. `centred` is what DINOv2's and DINOv3's
linear evaluations do: sizes are kept to the pixel, what a model reads is padded evenly on all sides after
normalising, and its grid is laid over the unpadded pixels.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from phreg.backbones.base import Spec
from phreg.evaluation.dense import Box, Placement
from phreg.evaluation.feature_config import FeatureConfig


def place_picture(
    picture: Image.Image, reading: FeatureConfig, spec: Spec
) -> tuple[UInt8[Tensor, "3 height width"], Placement]:
    """Puts a picture onto a canvas, by PIL's antialiased bicubic resampling.

    Args:
        picture: RGB.
        reading: How it is fitted.
        spec: The model's patch size, own input size, and mean colour.

    Returns:
        Pixels, of whole patches unless the fit is `centred`, and where they lie in the picture.
    """
    width, height = picture.size
    part = (0, 0, height, width)
    if reading.fit in ("crop", "square"):
        inside = snap(reading.size or spec.input_size, spec)
    else:
        inside = _kept_ratio((height, width), reading, spec)
    if reading.fit == "crop" and reading.resize is not None:
        picture, part = _resized_middle(picture, inside, reading.resize)
    elif reading.fit == "crop":
        part = _middle((height, width), inside)
        picture = picture.crop((part[1], part[0], part[1] + part[3], part[0] + part[2]))
    if picture.size != (inside[1], inside[0]):
        picture = picture.resize((inside[1], inside[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    canvas = inside if reading.fit == "centred" else whole_patches(inside, spec)
    if canvas != inside:
        mean = torch.tensor([round(255 * value) for value in spec.mean], dtype=torch.uint8)
        padded = mean[:, None, None].repeat(1, *canvas)
        padded[:, : inside[0], : inside[1]] = pixels
        pixels = padded
    return pixels.contiguous(), Placement((height, width), canvas, (0, 0, *inside), part)


def snap(size: int | tuple[int, int], spec: Spec) -> tuple[int, int]:
    """Rounds height and width, or one number for both, to the nearest whole patches, one at least."""
    sides = (size, size) if isinstance(size, int) else size
    height, width = (
        max(1, round(side / unit)) * unit for side, unit in zip(sides, spec.patch_size, strict=True)
    )
    return height, width


def whole_patches(size: tuple[int, int], spec: Spec) -> tuple[int, int]:
    """Rounds height and width up to whole patches."""
    height, width = (math.ceil(side / unit) * unit for side, unit in zip(size, spec.patch_size, strict=True))
    return height, width


def pad_to_patches(
    images: Float[Tensor, "batch 3 height width"], spec: Spec
) -> Float[Tensor, "batch 3 padded_height padded_width"]:
    """Pads normalised images to whole patches with 0, the mean colour; an odd pixel goes right or below."""
    height, width = images.shape[-2:]
    padded = whole_patches((height, width), spec)
    rows, cols = padded[0] - height, padded[1] - width
    return nn.functional.pad(images, (cols // 2, cols - cols // 2, rows // 2, rows - rows // 2))


def window_starts(length: int, window: int, step: int) -> list[int]:
    """Where windows begin along one axis; the last is moved back inside."""
    return [*range(0, length - window, step), length - window]


def _kept_ratio(picture: tuple[int, int], reading: FeatureConfig, spec: Spec) -> tuple[int, int]:
    """Finds the sides of a picture whose ratio is kept."""
    own = spec.input_size if reading.fit == "keep" else picture
    asked = reading.size or own
    shorter = asked if isinstance(asked, int) else min(asked)
    scale = shorter / min(picture)
    height, width = (side * scale for side in picture)
    if reading.floor is not None and height != width:
        longer = max(1, int(max(height, width)) // reading.floor) * reading.floor
        height, width = (longer, width) if height > width else (height, longer)
    if reading.fit == "centred":
        return max(1, int(height + 0.5)), max(1, int(width + 0.5))  # as mmcv rounds
    sides = max(1, round(height)), max(1, round(width))
    return sides if reading.fit == "pad" else snap(sides, spec)


def _resized_middle(picture: Image.Image, inside: tuple[int, int], shorter: int) -> tuple[Image.Image, Box]:
    """Resamples a picture to a shorter side and cuts out its middle, as torchvision does; part in pixels."""
    width, height = picture.size
    # At least the cut, so that there is something everywhere.
    shorter = max(shorter, *inside)
    sides = [int(shorter * side / min(width, height)) for side in (height, width)]
    resized = picture.resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
    top, left = (round((side - cut) / 2) for side, cut in zip(sides, inside, strict=True))
    scale = min(width, height) / shorter
    part = (round(top * scale), round(left * scale), round(inside[0] * scale), round(inside[1] * scale))
    return resized.crop((left, top, left + inside[1], top + inside[0])), part


def _middle(picture: tuple[int, int], shape: tuple[int, int]) -> Box:
    """Finds the largest part of a picture, in its middle, that has the shape of another size."""
    (height, width), (rows, cols) = picture, shape
    if height * cols > width * rows:  # too high
        part = (max(1, round(width * rows / cols)), width)
    else:
        part = (height, max(1, round(height * cols / rows)))
    return (height - part[0]) // 2, (width - part[1]) // 2, *part
