"""The sizes that a run's images have: one, or several in turn.

    size, mixed_sizes ──checked──► sizes ──► image number i at sizes[i % n] ──┬─► training crops
                                                                             └─► images to choose a state by

An image has one size in the whole run, so its target is made once. The search for sinks, the trust region and
the figures before and after keep to the main size.
"""

import logging
from collections.abc import Mapping
from typing import Literal

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base
from phreg.config import DistillConfig
from phreg.data.crops import Crops, MixedCrops, centre_crops
from phreg.data.sources import ImageSource, Subset
from phreg.errors import ConfigError
from phreg.evaluation.before_after import HeldOut, make_references
from phreg.view_sampling import check_different, context_margin

logger = logging.getLogger(__name__)


def checked_sizes(student: Backbone, config: DistillConfig) -> DistillConfig:
    """Fills in the main size, writes squares as one number, and checks all sizes before anything is written.

    Raises:
        PhregError: The model does not take a size, or it has fewer different views than are asked for.
        ConfigError: A size is named twice.
    """
    sizes = [student.image_size(size) for size in (config.size, *config.mixed_sizes)]
    twice = [number for number, size in enumerate(sizes) if size in sizes[:number]]
    if twice:
        rows, cols = sizes[twice[0]]
        raise ConfigError(
            "settings",
            [
                f"mixed_sizes: {rows}x{cols} is there already, as size or before it; name each size once: "
                "images are spread evenly over size and mixed_sizes"
            ],
        )
    for size in sizes[1:]:  # the main one is used before the first step
        check_different(config.views, student.spec, size)
    main, *others = (rows if rows == cols else (rows, cols) for rows, cols in sizes)
    return config.model_copy(update={"size": main, "mixed_sizes": tuple(others)})


def context_margins(student: Backbone, config: DistillConfig) -> dict[tuple[int, int], tuple[int, int]]:
    """Computes the context margin of each size of a run, by size, the main one first."""
    sizes = [student.image_size(size) for size in (config.size, *config.mixed_sizes)]
    return {size: context_margin(config.views, student.spec, size) for size in sizes}


def mixed_crops(
    source: ImageSource,
    margins: Mapping[tuple[int, int], tuple[int, int]],
    seed: int,
    crop: Literal["random", "fixed"],
) -> MixedCrops:
    """Cuts training images, each at its size.

    Args:
        source: The images.
        margins: Context margin of each size, the main one first.
        seed: Seed of the crops.
        crop: As `Crops` takes it.
    """
    return MixedCrops(
        tuple(Crops(source, size, seed, crop, margin, len(margins)) for size, margin in margins.items())
    )


def held_out_at_all_sizes(
    original: Backbone,
    source: ImageSource,
    margins: Mapping[tuple[int, int], tuple[int, int]],
    config: DistillConfig,
    base: Base,
) -> HeldOut:
    """Makes what states are measured against during training: image number j at size number j % n.

    Args:
        original: The model as it was, on its device.
        source: Images to measure on; one of them at least is readable.
        margins: Context margin of each size, the main one first.
        config: The run's settings.
        base: What the model is.
    """
    parts = []
    for number, (size, margin) in enumerate(margins.items()):
        images = Subset(source, list(range(number, len(source), len(margins))))
        read = list(centre_crops(original, images, size, margin, config.data.max_broken))
        logger.info("averaging %d of these images over views at %dx%d pixels", sum(map(len, read)), *size)
        if read:
            parts.append(make_references(original, read, margin, config, base))
        else:
            logger.warning("no image to measure on is left for %dx%d pixels; raise measure.images", *size)
    return HeldOut(
        [images for part in parts for images in part.images],
        [grids for part in parts for grids in part.references],
        parts[0].described,
    )
