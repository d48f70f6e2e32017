"""Which images make which batch, which are kept apart to measure on, and how a few stand for many.

All of it is a function of counts and the seed; no image is read here.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Int64
from torch import Tensor

from phreg.config import DistillConfig
from phreg.data.sources import ImageSource, Subset, open_images
from phreg.errors import DataError
from phreg.seeding import keyed_generator

Key = tuple[int, int]
"""Epoch, and number of an image."""


@dataclass(frozen=True)
class Order:
    """Which images make the batch of a step: a function of seed and step alone.

    An epoch is a permutation of all images, cut into global batches of `batch_size * world_size`; those that
    do not fill one are left out of this epoch. Rank r takes the r-th stretch of a global batch: the batches
    of all ranks, one behind the other, are that of a single process with a `world_size` times larger batch.

    Of n sizes, image number i has size number i % n, and a batch has images of one size. The steps take the
    sizes in turn. Each size has its own permutations, one behind the other, cut into global batches: what
    does not fill a batch opens the first batch of the next permutation. So all batches are full, no image is
    left out, and as many steps count as an epoch as with one size.

    Attributes:
        num_images: Images there are.
        batch_size: Images per process and step.
        seed: Seed of the permutations.
        rank: Number of this process.
        world_size: Processes that train together.
        num_sizes: Sizes that images have.

    Raises:
        DataError: There are fewer images, of any size, than one global batch takes.
    """

    num_images: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    num_sizes: int = 1

    def __post_init__(self) -> None:
        if self.num_images // self.num_sizes < self.batch_size * self.world_size:
            of_each = f", {self.num_images // self.num_sizes} of each size" if self.num_sizes > 1 else ""
            raise DataError(
                f"cannot fill a batch: it takes {self.batch_size} images on each of {self.world_size} "
                f"processes = {self.batch_size * self.world_size}, found {self.num_images} to train on"
                f"{of_each}; add images, or lower --batch-size"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Global batches that an epoch fills."""
        return self.num_images // (self.batch_size * self.world_size)

    def epoch(self, step: int) -> int:
        """Tells which epoch a step belongs to; both count from 0."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> list[Key]:
        """Lists (epoch, index) of this process's images at a step."""
        if self.num_sizes > 1:
            return self._batch_of_one_size(*divmod(step, self.num_sizes))
        epoch, position = divmod(step, self.steps_per_epoch)
        start = (position * self.world_size + self.rank) * self.batch_size
        indices = _permutation(self.num_images, self.seed, epoch)[start : start + self.batch_size]
        return [(epoch, index) for index in indices.tolist()]

    def _batch_of_one_size(self, position: int, size: int) -> list[Key]:
        """Lists the keys of the batch at a position among those of one size."""
        images = same_size(size, self.num_images, self.num_sizes)
        start = (position * self.world_size + self.rank) * self.batch_size
        keys = []
        for number in range(start, start + self.batch_size):
            epoch, place = divmod(number, len(images))
            keys.append((epoch, images[int(_permutation(len(images), self.seed, epoch, size)[place])]))
        return keys


def same_size(index: int, num_images: int, num_sizes: int) -> range:
    """Lists the images that have the same size as image number `index`: every `num_sizes`-th."""
    return range(index % num_sizes, num_images, num_sizes)


@lru_cache(maxsize=16)
def _permutation(length: int, seed: int, epoch: int, *size: int) -> Int64[Tensor, " length"]:
    return torch.randperm(length, generator=keyed_generator("order", seed, epoch, *size))


def holdout(num_images: int, count: int) -> tuple[list[int], list[int]]:
    """Sets images aside for measuring: the central ones of `count` equal stretches.

    At most a fifth is set aside, so none of fewer than 5 images.

    Returns:
        Numbers of the images to train on, and of those held out, both ascending.
    """
    count = min(count, num_images // 5)
    held = [(2 * stretch + 1) * num_images // (2 * count) for stretch in range(count)]
    return sorted(set(range(num_images)) - set(held)), held


def split(source: ImageSource, config: DistillConfig) -> tuple[ImageSource, ImageSource, bool]:
    """Splits a run's images into those to train on and those to measure on.

    Returns:
        Both, and whether they are disjoint: fewer than 5 images serve as both.
    """
    count = config.measure.images
    limit = len(source) if config.data.limit == "all" else config.data.limit
    if config.measure.source is not None:
        others = open_images(config.measure.source, max_megapixels=config.data.max_megapixels)
        return subsample(source, limit), subsample(others, count), True
    train_on, measure_on = holdout(len(source), count)
    if measure_on:
        return subsample(Subset(source, train_on), limit), Subset(source, measure_on), True
    return subsample(source, limit), subsample(source, count), not count


def subsample(source: ImageSource, count: int) -> ImageSource:
    """Takes at most `count` images, evenly spaced over those there are."""
    return Subset(source, subsample_indices(len(source), count))


def subsample_indices(total: int, count: int) -> list[int]:
    """Lists the first of each of `count` equal stretches of `total` numbers, or all if there are fewer.

    The first index is 0, the last lies in the last stretch, and gaps differ by at most 1.
    """
    count = min(total, count)
    return [number * total // count for number in range(count)]
