"""Distils a model from its own moved views, without looking for sinks."""

from typing import TYPE_CHECKING, Any

from phreg.config import DistillConfig
from phreg.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from phreg.backbones.base import Backbone
    from phreg.sinks.locate import Sinks
    from phreg.training.losses import LossTerm

SETTINGS: dict[str, Any] = {
    "register_init": "neutral",
    "epochs": 8,
    "views.fill": "context",
    "loss.mse": 0.0,
    "loss.relative_mse": 1.0,
    "unlock.roles": ("vectors",),
    "unlock.lora.rank": "auto",
    "unlock.lora.blocks": "all",
    "optim.trust_region": True,
    "optim.lr": 1e-2,
    "optim.final_lr": 2e-4,
    "optim.warmup_steps": 10,
    "measure.keep_best": True,
}
"""What phreg's own methods share: a small set of weights, at rates measured on the model, and the best state.

Nothing here depends on the scale of a model's weights or features (benchmarks/methods).
"""


def add(
    student: "Backbone", sinks: "Sinks | None", batches: "Sequence[Tensor]", config: DistillConfig
) -> "list[LossTerm]":
    """Adds registers that change the model little, and no term."""
    from phreg.sinks.relocation import add_starting_registers

    add_starting_registers(student, sinks, batches, config.registers, config.register_init, config.seed)
    return []


METHOD = Method(
    name="denoise",
    summary="distil the model from its own moved views, without looking for sinks",
    add=add,
    settings=SETTINGS,
    needs_sinks=False,
    reasons=("headroom",),
)
