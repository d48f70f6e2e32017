"""Pictures and their masks or depths, cropped, mirrored and recoloured together, on the device.

    picture (3,H,W) ─┐ scale by a random ratio ─► turn ───► random crop ─► mirror ─► colours ─► (3,rows,cols)
    truth   (1,H,W) ─┘ nearest                    nearest   the same       the same  untouched

The recipe is mmseg's of DINOv2's linear probes: RandomResize, RandomCrop that one class may not fill, flip,
PhotoMetricDistortion; and for depth RandomRotate, and ColorAug instead. What lies outside of the picture
keeps its colour, as it is padded last. Every draw comes from a seed.
"""

from typing import Literal

import torch
from jaxtyping import Float
from kornia.augmentation import AugmentationSequential, ColorJiggle, RandomHorizontalFlip, RandomRotation
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import interpolate

from phreg.config import Config, Fraction
from phreg.evaluation.metrics.scores import IGNORE
from phreg.seeding import keyed_generator

Range = tuple[PositiveFloat, PositiveFloat]

TRIES = 10
"""Crops drawn in search of one that no class fills."""


class CropConfig(Config):
    """Random crops of training pictures."""

    size: PositiveInt | tuple[PositiveInt, PositiveInt] = 512
    """Side of the crop in pixels, or its height and width, rounded to whole patches."""
    scale: Range = (0.5, 2.0)
    """Range of the picture's shorter side before cropping, as a multiple of the crop's shorter side."""
    rotation: NonNegativeFloat = 0.0
    """Degrees by which every second picture is turned, at most, either way."""
    flip: Fraction = 0.5
    """Probability of mirroring."""
    max_class_share: Fraction = 0.75
    """Share of a crop that one class may cover; another crop is drawn, up to ten times."""
    colour: NonNegativeFloat = 1.0
    """Strength of colour changes: brightness, contrast, saturation and hue, each in half of the crops; 0 is
    none, 1 is mmseg's PhotoMetricDistortion."""
    gamma: Range | None = None
    """Range of the power that pixels from 0 to 255 are raised to, in half of the crops, together with the
    next two, as the ColorAug of DINOv2's depth probes does; unset leaves pixels as they are."""
    brightness: Range = (1.0, 1.0)
    """Range of what all channels are then multiplied with."""
    tint: Range = (1.0, 1.0)
    """Range of what each channel is then multiplied with on its own."""
    outside: Literal["mean", "black"] = "mean"
    """Colour outside of the picture: mean is 0 after normalising, black is 0 before."""

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of a crop as asked for."""
        return self.size if isinstance(self.size, tuple) else (self.size, self.size)

    def whole_patches(self, patch_size: tuple[int, int]) -> tuple[int, int]:
        """Rounds the height and width of a crop to whole patches."""
        sides = self.sides
        rows, cols = (max(1, round(side / unit)) for side, unit in zip(sides, patch_size, strict=True))
        return rows * patch_size[0], cols * patch_size[1]


class PairedCrops:
    """Makes training crops.

    Args:
        config: How they are drawn.
        size: Height and width of a crop.
        fill: Mean colour, RGB from 0 to 1, which is outside of the picture unless that is to be black.
        unknown: Truth outside of the picture, and wherever it does not count.
    """

    def __init__(
        self,
        config: CropConfig,
        size: tuple[int, int],
        fill: tuple[float, float, float],
        unknown: int = IGNORE,
    ) -> None:
        self.config = config
        self.size = size
        self.fill = fill if config.outside == "mean" else (0.0, 0.0, 0.0)
        self.unknown = unknown
        strength = config.colour
        colours = [
            ColorJiggle(brightness=0.125 * strength, p=0.5),
            ColorJiggle(contrast=min(1.0, 0.5 * strength), p=0.5),
            ColorJiggle(saturation=min(1.0, 0.5 * strength), p=0.5),
            ColorJiggle(hue=min(0.5, 0.1 * strength), p=0.5),
        ]
        self._turn = AugmentationSequential(
            RandomRotation(config.rotation, p=0.5 if config.rotation else 0.0), data_keys=["input", "mask"]
        )
        self._together = AugmentationSequential(
            RandomHorizontalFlip(p=config.flip), *(colours if strength else []), data_keys=["input", "mask"]
        )

    def __call__(
        self,
        pictures: list[Float[Tensor, "3 _ _"]],
        truths: list[Float[Tensor, "1 _ _"]],
        *key: int | str,
    ) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, "batch 1 height width"]]:
        """Draws a crop of each picture.

        Args:
            pictures: RGB from 0 to 1, of any sizes, on one device.
            truths: Classes or depths of their pixels.
            key: What the draw depends on, e.g. seed and step.
        """
        generator = keyed_generator("crop", *key)
        with torch.random.fork_rng(devices=[pictures[0].device] if pictures[0].is_cuda else []):
            # kornia draws from the global state.
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            crops = [
                self._crop(picture, truth, generator) for picture, truth in zip(pictures, truths, strict=True)
            ]
            images, truth = (torch.stack(side) for side in zip(*crops, strict=True))
            augmented = self._together(images, truth)
            images = self._scale_colours(augmented[0].clamp(0, 1), generator)
        truth, inside = augmented[1].split(1, dim=1)
        fill = images.new_tensor(self.fill).view(1, 3, 1, 1)
        return torch.where(inside > 0, images, fill), truth

    def _scale_colours(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changes gamma, brightness and tint of half of the images."""
        if self.config.gamma is None:
            return images
        changed = []
        for image in images:
            chance, *draws = torch.rand(6, generator=generator).tolist()
            if chance >= 0.5:
                changed.append(image)
                continue
            ranges = (self.config.gamma, self.config.brightness, *[self.config.tint] * 3)
            gamma, brightness, *tint = (
                low + (high - low) * draw for (low, high), draw in zip(ranges, draws, strict=True)
            )
            scaled = (255 * image) ** gamma * brightness * image.new_tensor(tint)[:, None, None]
            changed.append((scaled / 255).clamp(0, 1))
        return torch.stack(changed)

    def _crop(self, picture: Tensor, truth: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cuts a picture, and its truth with a channel that is 1 within the picture."""
        low, high = self.config.scale
        ratio = low + (high - low) * float(torch.rand((), generator=generator))
        scale = ratio * min(self.size) / min(picture.shape[1:])
        size = [max(1, round(side * scale)) for side in picture.shape[1:]]
        picture = interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        truth = interpolate(truth[None], size, mode="nearest-exact")[0]
        fill = picture.new_tensor(self.fill)[:, None, None]
        # What is turned in from outside is 0, and so is what is padded.
        picture, truth = picture - fill, torch.cat([truth - self.unknown, torch.ones_like(truth)])
        turned, turned_truth = self._turn(picture[None], truth[None])
        picture, truth = turned[0], turned_truth[0]
        lacking = [max(0, wanted - side) for wanted, side in zip(self.size, size, strict=True)]
        around = (0, lacking[1], 0, lacking[0])
        picture, truth = (nn.functional.pad(side, around) for side in (picture, truth))
        picture, known = picture + fill, truth[:1] + self.unknown
        truth = torch.cat([known, truth[1:]])
        window = ...
        for _ in range(TRIES):
            top, left = (
                int(torch.randint(side - wanted + 1, (), generator=generator))
                for side, wanted in zip(picture.shape[1:], self.size, strict=True)
            )
            window = (slice(None), slice(top, top + self.size[0]), slice(left, left + self.size[1]))
            shown = known[window]
            _, counts = shown[shown != self.unknown].unique(return_counts=True)
            if len(counts) > 1 and counts.max() / counts.sum() < self.config.max_class_share:
                break
        return picture[window], truth[window]
