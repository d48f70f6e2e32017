"""Test-time registers: hooks move the sinks, and nothing trains."""

from typing import TYPE_CHECKING

from phreg.config import DistillConfig
from phreg.methods.base import Method, num_registers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phreg.backbones.base import Backbone
    from phreg.sinks.locate import Sinks
    from phreg.training.losses import LossTerm


def add(
    student: "Backbone",
    sinks: "Sinks | None",
    batches: "Sequence[Tensor]",  # noqa: ARG001
    config: DistillConfig,
) -> "list[LossTerm]":
    """Adds test-time registers."""
    from phreg.sinks.test_time import add_test_time_registers

    add_test_time_registers(student, sinks, num_registers(sinks, config))
    return []


METHOD = Method(
    name="test-time",
    summary="move the sinks into registers by a hook, without training",
    add=add,
    settings={"registers": "auto"},
    trains=False,
)
