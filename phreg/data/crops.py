"""Turns images into batches that depend on the seed and the step alone.

Nothing here keeps state: `phreg.data.sampling.Order` says which numbers make which batch, and the place of a
crop is a hash of seed, epoch and number. So a run resumed at any step, with any number of reader processes,
sees the very pixels it would have seen. What cannot be decoded is replaced by the next image, reported, and
counted.

    Order.batch(step) ──(epoch, index)──► Crops ──loader──► Batch uint8 (B,3,S,S) ──as_input──► model
                                            └─ ImageSource.read(index)

Flips and shifts are left to `views`.
"""

import itertools
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from phreg.backbones.base import Backbone
from phreg.config import DataConfig
from phreg.data.decode import MAX_MEGAPIXELS, unreadable
from phreg.data.paths import some
from phreg.data.sampling import Key, Order, same_size, subsample
from phreg.data.sources import ImageSource
from phreg.errors import DataError
from phreg.seeding import keyed_generator

logger = logging.getLogger(__name__)

MEASURED_AT_ONCE = 8
"""Images per forward outside of training."""

LARGER = 1.5
"""How much larger than a model's own size images are, to see what resampling its positions does."""

LONGEST_GAP = 1000
"""Unreadable images in a row before the search for a readable one is given up."""


# --- Crops: an image becomes a rectangle -----------------------------------------------------------------


class Skipped(NamedTuple):
    """An unreadable image, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images of one size, and where they came from."""

    images: UInt8[Tensor, "batch 3 rows cols"]
    """RGB, 0 to 255, with the context margin."""
    indices: Int64[Tensor, " batch"]
    """Number of each image in its source: the one asked for, or the one that replaced it."""
    names: Sequence[str]
    """Name of each image."""
    skipped: Sequence[Skipped]
    """Unreadable images that were replaced."""


@dataclass(frozen=True)
class Crops:
    """Rectangles cut from images: one side resampled to just fit, then a crop along the other.

    For a square, the shorter side just fits. With a context margin, the rectangle and its margin are cut
    together, and the rectangle is the center. Resampling is PIL's antialiased bicubic; nothing is flipped or
    recoloured. The position of a random crop is a function of (seed, epoch, index), or of (seed, index). An
    unreadable image is replaced by the next readable one of its size.
    Source: PH-Reg's training transform (its flickr30k_dataset.py), which has no margin.

    Attributes:
        source: Where the images are.
        size: Height and width of the rectangle in pixels, or one number for both.
        seed: Seed of random crops.
        crop: `random` to train, `fixed` to train with the crop of the first epoch in all, `centre` to
            measure.
        margin: Context margin, rows and columns, in pixels on each side.
        num_sizes: Sizes that the source's images have; these crops are of one of them (`MixedCrops`).
    """

    source: ImageSource
    size: int | tuple[int, int]
    seed: int = 0
    crop: Literal["random", "fixed", "centre"] = "random"
    margin: tuple[int, int] = (0, 0)
    num_sizes: int = 1

    def __len__(self) -> int:
        return len(self.source)

    @property
    def parts(self) -> "tuple[Crops, ...]":
        """The crops of each size: there is one."""
        return (self,)

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image, in pixels, without the context margin."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Reads images.

        Raises:
            DataError: Neither an image nor any after it (`LONGEST_GAP` at most) can be read.
        """
        indices, images, skipped = zip(*map(self._read, keys), strict=True)
        names = tuple(map(self.source.name, indices))
        return Batch(torch.stack(images), torch.tensor(indices), names, tuple(itertools.chain(*skipped)))

    def _read(self, key: Key) -> tuple[int, UInt8[Tensor, "3 rows cols"], list[Skipped]]:
        """Reads an image, or the next readable one; tells which one, and what was skipped."""
        skipped: list[Skipped] = []
        candidates = same_size(key[1], len(self), self.num_sizes)
        for offset in range(min(len(candidates), LONGEST_GAP)):
            index = candidates[(key[1] // self.num_sizes + offset) % len(candidates)]
            name = self.source.name(index)
            crop_key = (0, index) if self.crop == "fixed" else key
            try:
                cut = self._cut(self.source.read(index), name, keyed_generator("crop", self.seed, *crop_key))
            except DataError as error:
                skipped.append(Skipped(name, str(error)))
            else:
                return index, torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous(), skipped
        reasons = some([reason for _, reason in skipped], "\n  ")
        raise DataError(f"found {len(skipped)} unreadable images in a row:\n  {reasons}\nreplace them")

    def _cut(self, image: Image.Image, name: str, generator: torch.Generator) -> Image.Image:
        rows, cols = (side + 2 * far for side, far in zip(self.shape, self.margin, strict=True))
        # The side with the least to spare decides.
        shorter, needed = min(zip(image.size, (cols, rows), strict=True), key=lambda side: side[0] / side[1])
        width, height = (int(needed * side / shorter) for side in image.size)  # as torchvision truncates
        if width * height > MAX_MEGAPIXELS * 1e6:
            shape = f"{image.width}x{image.height}"
            raise unreadable(name, f"{shape} is so narrow that it would become {width}x{height} pixels")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        room = max(width - cols, height - rows)
        start = room / 2 if self.crop == "centre" else int(torch.randint(room + 1, (), generator=generator))
        left, top = (round(start), 0) if width - cols > height - rows else (0, round(start))
        return image.crop((left, top, left + cols, top + rows))


@dataclass(frozen=True)
class MixedCrops:
    """Crops of several sizes. Image number i is always cut by part number i % n.

    Attributes:
        parts: The crops of each size, all from one source; the main size first.
    """

    parts: tuple[Crops, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image of the main size, in pixels, without the context margin."""
        return self.parts[0].shape

    def batch(self, keys: Sequence[Key]) -> Batch:
        """Reads images of one size. An unreadable one is replaced by one of the same size.

        Raises:
            DataError: As of `Crops.batch`.
        """
        return self.parts[keys[0][1] % len(self.parts)].batch(keys)


def center_crop(
    images: Shaped[Tensor, "batch 3 _ _"], margin: tuple[int, int]
) -> Shaped[Tensor, "batch 3 _ _"]:
    """Cuts the context margin off images.

    Args:
        images: Images with a context margin.
        margin: Its rows and columns, in pixels on each side.
    """
    rows, cols = margin
    return images[..., rows : images.shape[-2] - rows, cols : images.shape[-1] - cols]


def normalise(
    images: UInt8[Tensor, "batch 3 rows cols"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "batch 3 rows cols"]:
    """Computes (images / 255 - mean) / std in fp32, on the images' device.

    Args:
        images: RGB, 0 to 255.
        mean: Of each channel, on a scale of 0 to 1.
        std: Of each channel, on the same scale.
    """
    mean_rgb, std_rgb = (
        # Copied without waiting for the device, as torch.tensor(…, device=…) would.
        torch.tensor(values, dtype=torch.float32).view(3, 1, 1).to(images.device, non_blocking=True)
        for values in (mean, std)
    )
    return (images.float() / 255 - mean_rgb) / std_rgb


def denormalise(
    image: Float[Tensor, "3 height width"], mean: Sequence[float], std: Sequence[float]
) -> UInt8[np.ndarray, "height width 3"]:
    """Undoes `normalise`, so that an image can be looked at."""
    scale, shift = (torch.tensor(values)[:, None, None] for values in (std, mean))
    pixels = (image.float().cpu() * scale + shift).clamp(0, 1) * 255
    return pixels.round().byte().permute(1, 2, 0).numpy()


def as_input(
    backbone: Backbone, pixels: UInt8[Tensor, "batch 3 rows cols"]
) -> Float[Tensor, "batch 3 rows cols"]:
    """Makes of 8-bit RGB what a model takes: on its device, normalised for it, in its own precision."""
    pixels = pixels.to(backbone.device, non_blocking=True)
    return normalise(pixels, backbone.spec.mean, backbone.spec.std).to(backbone.dtype)


# --- Loading: batches ahead of time --------------------------------------------------------------------


@dataclass(frozen=True)
class _Batches(Dataset[Batch | DataError]):
    """Batches by their keys. An error is handed over, not raised: torch would bury it in a traceback."""

    crops: Crops | MixedCrops

    def __getitem__(self, keys: Sequence[Key]) -> Batch | DataError:
        try:
            return self.crops.batch(keys)
        except DataError as error:
            return error


def loader(
    crops: Crops | MixedCrops,
    order: Order,
    start: int,
    stop: int,
    *,
    workers: int | None = None,
    pin_memory: bool = False,
    start_method: Literal["fork", "spawn", "forkserver"] | None = None,
) -> Iterator[Batch]:
    """Reads the batches of steps `start` to `stop`, exclusive, in order and ahead of time.

    Reader processes live as long as the iterator, across epochs; each has one thread (torch sees to it), and
    neither they nor this process draw from a global random state. They are forked where the platform can,
    even with CUDA in use here: readers touch PIL and CPU tensors alone.

    Args:
        crops: The images.
        order: Which of them make which step.
        start: First step.
        stop: Step to end before.
        workers: Reader processes; 0 reads in this one, unset means up to 8, one less than there are cores.
        pin_memory: Put batches into pinned memory, for asynchronous copies to a GPU.
        start_method: How readers start; unset means `fork`, or `spawn` where there is none.

    Raises:
        DataError: No readable image was found for a batch.
    """
    workers = _spare_cores() if workers is None else workers
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    batches: Iterable[Batch | DataError] = DataLoader(
        _Batches(crops),
        sampler=map(order.batch, range(start, stop)),
        batch_size=None,  # the sampler gives whole batches
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=(start_method or ("fork" if can_fork else "spawn")) if workers else None,
        generator=torch.Generator(),  # unset, torch would draw from the global one
    )
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


def _spare_cores() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


class BrokenImages:
    """Counts unreadable images, warns once of each, and ends the run when they are too many.

    The share is of the images read so far, but of 100 at least (or of all, if they are fewer), lest one
    broken image in the first batch end a run.

    Attributes:
        reasons: Why each unreadable image was skipped, by name.
    """

    def __init__(self, total: int, max_broken: float | None) -> None:
        self.reasons: dict[str, str] = {}
        self._total = total
        self._max_broken = DataConfig().max_broken if max_broken is None else max_broken
        self._is_set = max_broken is not None
        self._read = 0

    def add(self, batch: Batch) -> None:
        """Counts a batch.

        Raises:
            DataError: More than `max_broken` of the images read cannot be.
        """
        new = {name: reason for name, reason in batch.skipped if name not in self.reasons}
        for reason in new.values():
            logger.warning("skipped an image: %s", reason)
        self.reasons |= new
        self._read = min(self._total, self._read + len(batch.names) + len(new))
        if len(self.reasons) > self._max_broken * max(self._read, min(self._total, 100)):
            reasons = some(list(self.reasons.values()), "\n  ")
            allowed, advice = f"a share of {self._max_broken:g}", "replace or remove them"
            if self._is_set:
                allowed = f"--data.max-broken {self._max_broken:g} allows"
                advice = "replace them, or raise --data.max-broken"
            raise DataError(
                f"too many unreadable images: {len(self.reasons)} of {self._read} read so far, more than "
                f"{allowed}:\n  {reasons}\n{advice}"
            )


# --- Measuring: a few images, as they are ---------------------------------------------------------------


def centre_crops(
    backbone: Backbone,
    source: ImageSource,
    size: int | tuple[int, int],
    margin: tuple[int, int] = (0, 0),
    max_broken: float | None = None,
) -> Iterator[Float[Tensor, "batch 3 rows cols"]]:
    """Reads images for measuring: centre crops, normalised for a model, on its device.

    Unreadable images are left out, with a warning. Too many of them are an error, as in training.

    Args:
        backbone: The model.
        source: The images.
        size: Side of a crop in pixels.
        margin: Context margin, rows and columns, in pixels on each side.
        max_broken: Largest share of unreadable images; None means the default of `DataConfig`.
    """
    crops = Crops(source, size, crop="centre", margin=margin)
    broken = BrokenImages(len(source), max_broken)
    readable: list[Tensor] = []
    for index in range(len(source)):
        image = crops.batch([(0, index)])
        broken.add(image)
        if not image.skipped:
            readable.append(image.images)
        if readable and (len(readable) == MEASURED_AT_ONCE or index + 1 == len(source)):
            pixels, readable = torch.cat(readable), []
            yield as_input(backbone, pixels)


def larger(backbone: Backbone, source: ImageSource) -> list[Float[Tensor, "_ 3 _ _"]]:
    """Reads a few images at a size that is not the model's own; none where it takes no other."""
    if not backbone.spec.any_size:
        return []
    rows, cols = (round(LARGER * count) for count in backbone.spec.grid)
    size = (rows * backbone.spec.patch_size[0], cols * backbone.spec.patch_size[1])
    return list(centre_crops(backbone, subsample(source, MEASURED_AT_ONCE), size))
