"""Moves the sinks into registers and, at the same time, distils the model from its views."""

import logging
from typing import TYPE_CHECKING

from phreg.config import DistillConfig
from phreg.methods import denoise
from phreg.methods.base import Method, add_registers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phreg.backbones.base import Backbone
    from phreg.sinks.locate import Sinks
    from phreg.training.losses import LossTerm

logger = logging.getLogger(__name__)


def add(
    student: "Backbone", sinks: "Sinks | None", batches: "Sequence[Tensor]", config: DistillConfig
) -> "list[LossTerm]":
    """Adds registers that start from the triggers of the sinks, and a term that moves the sinks there."""
    from phreg.sinks.relocation import Relocation
    from phreg.training.losses import RelocationTerm

    add_registers(student, sinks, batches, config)
    if sinks is None:
        return []
    if not sinks.directions or not config.registers:
        reason = "there are no registers" if sinks.directions else "they have nothing in common"
        logger.warning("the sinks stay where they are: %s; distilling without relocation", reason)
        return []
    if not config.loss.relocation:
        return []
    relocation = Relocation(student, sinks, config.loss.relocation_counts)
    return [RelocationTerm(config.loss.relocation, relocation)]


METHOD = Method(
    name="relocate",
    summary="find the sinks, move them into the registers, and distil at the same time",
    add=add,
    settings=denoise.SETTINGS,
)
