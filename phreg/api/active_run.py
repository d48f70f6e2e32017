"""A run that is under way: its folder, its processes, and the images it trains and measures on."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phreg.analysis.advice import reasons_to_train
from phreg.analysis.consistency import ConsistencyReport, consistency
from phreg.analysis.inspection import MOVED_VIEWS
from phreg.analysis.norms import NormReport
from phreg.api.sizes import context_margins, held_out_at_all_sizes, mixed_crops
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base
from phreg.config import DistillConfig
from phreg.data.crops import MixedCrops, centre_crops
from phreg.data.sampling import split, subsample
from phreg.data.sources import ImageSource
from phreg.evaluation.before_after import HeldOut, make_references
from phreg.methods.base import Method
from phreg.processes import on_main, watched
from phreg.progress import track
from phreg.storage import resume_command
from phreg.training.checkpoint import RunFolder
from phreg.training.runtime import start_accelerator
from phreg.training.target_cache import check_room, plan_cache
from phreg.training.trainable import check_trainable

logger = logging.getLogger(__name__)

COMPARED = 32
"""Images whose moved views show whether a model without sinks has something to gain."""


@dataclass(frozen=True)
class ActiveRun:
    """A run that is under way: its folder, processes and images.

    Attributes:
        train_images: Those it trains on.
        measured_images: Those it is measured on.
        held_out: Whether none of these is trained on.
        margins: Rows and columns of context that images come with, in pixels, by size, the main one first.
    """

    folder: RunFolder
    config: DistillConfig
    accelerator: Any
    train_images: ImageSource
    measured_images: ImageSource
    held_out: bool
    margins: Mapping[tuple[int, int], tuple[int, int]]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of images of the main size."""
        return next(iter(self.margins))

    @property
    def margin(self) -> tuple[int, int]:
        """The context margin of the main size."""
        return self.margins[self.size]

    @property
    def divided(self) -> str:
        """How many images there are, and of which sizes, for the log."""
        apart = "held out to measure on" if self.held_out else "of them also measured on"
        sizes = " or ".join(f"{rows}x{cols}" for rows, cols in self.margins)
        return f"{len(self.train_images)} images of {sizes} pixels, {len(self.measured_images)} {apart}"

    def check_trainable(self, student: Backbone) -> None:
        """Checks what training needs, before anything is written and before the search for sinks.

        Raises:
            PhregError: See `trainable.check_trainable` and `target_cache.check_room`.
        """
        images, processes = len(self.train_images), self.accelerator.num_processes
        check_trainable(student, images, self.config, processes)
        check_room(plan_cache(student, images, self.config, processes), self.folder)

    @property
    def crops(self) -> MixedCrops:
        """The training images, cut, each at its size."""
        where = "fixed" if self.config.target.cache else "random"
        return mixed_crops(self.train_images, self.margins, self.config.seed, where)

    def references(self, original: Backbone, base: Base) -> HeldOut | None:
        """Makes what the model is measured against; None where there is no image, or none is readable."""
        if not len(self.measured_images):
            return None
        logger.info("averaging %d images to measure on over views", len(self.measured_images))
        images = self.read(original, self.measured_images, self.margin)
        return make_references(original, images, self.margin, self.config, base) if images else None

    def choosing(self, held_out: HeldOut | None, original: Backbone, base: Base) -> HeldOut | None:
        """Makes what the best state is chosen by, where it is: the measured images at all sizes in turn."""
        if held_out is None or not self.config.mixed_sizes or not self.config.measure.keep_best:
            return held_out
        return held_out_at_all_sizes(original, self.measured_images, self.margins, self.config, base)

    def read(self, backbone: Backbone, images: ImageSource, margin: tuple[int, int] = (0, 0)) -> list[Tensor]:
        """Reads images to look at a model with, as many as are readable."""
        return list(centre_crops(backbone, images, self.size, margin, self.config.data.max_broken))


@contextmanager
def start(
    student: Backbone, source: ImageSource, folder: RunFolder, config: DistillConfig
) -> Iterator[ActiveRun]:
    """Starts the processes, and splits the images; where one process fails inside, the others end too."""
    margins = context_margins(student, config)
    accelerator = start_accelerator(config, folder)
    with watched(f"go on with the run: {resume_command(folder.path)}"):
        yield ActiveRun(folder, config, accelerator, *split(source, config), margins)


def worth_training(
    run: ActiveRun, original: Backbone, norms: NormReport, method: Method
) -> tuple[bool, ConsistencyReport | None]:
    """Says whether the method has something to do, and how the model agrees with its moved views if asked."""
    if reasons_to_train(norms, None, None) & set(method.reasons):
        return True, None
    if "headroom" not in method.reasons:
        return False, None
    images = subsample(run.train_images, COMPARED)
    logger.info("comparing the model with its own moved views on %d images", len(images))
    moving = track("moved views", run.read(original, images, run.margin))
    report = on_main(lambda: consistency(original, moving, run.config.views, run.size, count=MOVED_VIEWS))
    logger.info(
        "patch features agree to %.3f with the model's own moved views; averages over views agree to %.3f",
        report.mean, report.floor,
    )  # fmt: skip
    return "headroom" in reasons_to_train(norms, None, report), report
