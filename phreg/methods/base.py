"""What a method is: the settings it implies, and the task it builds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phreg.config import DistillConfig

# `phreg distill --help` reads the settings and needs no torch. So a method imports its training code only
# when it builds its task.
if TYPE_CHECKING:
    from torch import Tensor

    from phreg.analysis.advice import Reason
    from phreg.backbones.base import Backbone
    from phreg.sinks.locate import Sinks
    from phreg.training.losses import LossTerm


@dataclass(frozen=True)
class Method:
    """A way to retrofit registers.

    Attributes:
        name: Its name for `--method`.
        summary: What it does, for the help.
        add: Adds registers to the student as configured, given its sinks. Returns the loss terms that the
            method adds to those between student and target.
        settings: Settings that it implies, by dotted key, where they differ from `DistillConfig`'s defaults.
        clip_settings: The same for CLIP-type models; None means no difference.
        needs_sinks: Whether it looks for sinks and what causes them.
        trains: Whether it trains. If not, `add` is all it does.
        reasons: What gives it something to do. Without any of them, the model is returned as it is.
    """

    name: str
    summary: str
    add: "Callable[[Backbone, Sinks | None, Sequence[Tensor], DistillConfig], list[LossTerm]]"
    settings: Mapping[str, Any]
    clip_settings: Mapping[str, Any] | None = None
    needs_sinks: bool = True
    trains: bool = True
    reasons: "tuple[Reason, ...]" = ("outliers",)

    def implied(self, *, clip: bool) -> Mapping[str, Any]:
        """Lists the settings that it implies for a model, CLIP-type or not."""
        return self.clip_settings if clip and self.clip_settings is not None else self.settings


def num_registers(sinks: "Sinks | None", config: DistillConfig) -> int:
    """Says how many registers a model with these sinks is to have."""
    if config.registers == "auto":
        return sinks.an_image if sinks is not None else 1
    return config.registers


def add_registers(
    student: "Backbone", sinks: "Sinks | None", batches: "Sequence[Tensor]", config: DistillConfig
) -> "list[LossTerm]":
    """Adds registers as configured, and no loss term: what moves, distillation alone moves."""
    from phreg.sinks.starting import add_starting_registers

    count = num_registers(sinks, config)
    add_starting_registers(student, sinks, batches, count, config.register_init, config.seed)
    return []
