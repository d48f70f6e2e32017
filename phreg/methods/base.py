"""What a method is: the settings it implies, and the task it builds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from phreg.config import DistillConfig

# Settings are read by `phreg distill --help`, which needs no torch: a method imports what it trains with as
# it builds its task.
if TYPE_CHECKING:
    from phreg.backbones.base import Backbone
    from phreg.sinks.locate import Sinks
    from phreg.training.losses import LossTerm


@dataclass(frozen=True)
class Method:
    """A way to retrofit registers.

    Attributes:
        name: What `--method` calls it.
        summary: What it does, for help.
        add: Adds registers to the student as configured, given its sinks. Returns the terms of the loss that
            the method adds to those between student and target.
        settings: What it implies, where that differs from the defaults of `DistillConfig`, by dotted key.
        clip_settings: The same for CLIP-type models; None means no difference.
        needs_sinks: Whether it looks for the hidden units that cause sinks.
        trains: Whether it trains; otherwise `add` is all it does.
    """

    name: str
    summary: str
    add: "Callable[[Backbone, Sinks | None, DistillConfig], list[LossTerm]]"
    settings: Mapping[str, Any]
    clip_settings: Mapping[str, Any] | None = None
    needs_sinks: bool = True
    trains: bool = True

    def implied(self, *, clip: bool) -> Mapping[str, Any]:
        """Lists the settings that it implies for a model, CLIP-type or not."""
        return self.clip_settings if clip and self.clip_settings is not None else self.settings
