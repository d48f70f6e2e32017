"""The verbs that need no training: features averaged over views, and test-time registers."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from phreg.api.arguments import checked_batch
from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.readout import use_readout
from phreg.backbones.resolve import adapt
from phreg.config import ViewsConfig
from phreg.data.crops import MEASURED_AT_ONCE
from phreg.errors import DataError, PhregError
from phreg.rollback import rollback_on_error
from phreg.seeding import keyed_generator
from phreg.settings import validate, with_current_names
from phreg.sinks import test_time
from phreg.sinks.locate import find_sinks
from phreg.teacher import Teacher


def denoise(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **views: Any,
) -> Float[Tensor, "batch rows cols dim"]:
    """Reads a model's patch features averaged over moved views: the teacher alone, without any training.

    Args:
        model: Any supported model, in eval mode; it is not changed. What phreg trained is read as it was
            trained.
        images: Normalised images on the model's device, sides a multiple of the patch size.
        seed: Seed of the views.
        mean: Mean that the images were normalised with, RGB on a scale of 0 to 1, by which views are filled
            with the right colour; None means as the model or its image processor says.
        std: Standard deviation, likewise.
        views: Settings of `ViewsConfig`, such as `count=10`.

    Returns:
        Features after the final norm, in fp32.
    """
    backbone = adapt(model)
    resolve.settle_normalisation(backbone, mean, std)
    images = checked_batch(backbone, images)
    with use_readout(backbone):
        return Teacher(backbone, _views(views))(images, keyed_generator("views", seed)).patches


def add_test_time_registers(
    model: nn.Module, images: Float[Tensor, "batch 3 height width"], num_registers: int | None = None
) -> nn.Module:
    """Moves a model's artifacts into added registers by a hook, in place and without training.

    The cheapest repair, and not the best (`phreg.sinks.test_time`); `remove_registers` undoes it.

    Args:
        model: Any supported model; put in eval mode. Whatever ends the call early leaves it as it was.
        images: Normalised images to find the artifacts and their causes on, a few dozen at least, of the size
            that the model is to be used at.
        num_registers: Registers to add; None means as many as an image has artifacts on average.

    Returns:
        The same model.

    Raises:
        PhregError: The model has no artifacts, or no hidden unit causes them, or it has registers already.
    """
    backbone = adapt(model)
    with rollback_on_error(backbone):
        _add_test_time_registers(backbone.eval(), images, num_registers)
    return model


def _add_test_time_registers(backbone: Backbone, images: Tensor, num_registers: int | None) -> None:
    """Finds a model's artifacts and moves them."""
    images = checked_batch(backbone, images)
    if not len(images):
        raise DataError("asked for test-time registers found on no images; give a few dozen at least")
    if backbone.num_registers:
        raise PhregError(
            f"asked for test-time registers on {backbone.describe()}, which has {backbone.num_registers} "
            "registers from phreg; call phreg.remove_registers(model) first"
        )
    sinks = find_sinks(backbone, list(images.split(MEASURED_AT_ONCE)))
    if sinks is None:
        raise PhregError(
            f"asked for test-time registers on {backbone.describe()}, whose norms on {len(images)} images "
            "show no artifacts in any block; there is nothing to repair, unless more images show some"
        )
    count = sinks.an_image if num_registers is None else num_registers
    test_time.add_test_time_registers(backbone, sinks, count)


def _views(settings: dict[str, Any]) -> ViewsConfig:
    given = {f"views.{key}": value for key, value in settings.items()}
    current = with_current_names(given, source="views")
    return validate(current, source="views").views
