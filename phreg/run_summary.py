"""What a model's record says of the run that made it: steps, checks, sinks, figures before and after.

They are parts of a `phreg.record.RunRecord`, and are read and written with it. A part keeps the keys that
this phreg does not know.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from phreg.backbones.base import Readout


class Part(BaseModel):
    """A part of a record, which keeps what it does not know."""

    model_config = ConfigDict(
        extra="allow",
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        ser_json_inf_nan="constants",
    )


class Outcome(Part):
    """What a finished run has to say of itself.

    Attributes:
        steps: Optimizer steps.
        images: Images trained on, over all sessions.
        seconds: Seconds of training, over all sessions as far as their checkpoints.
        trained: Weights that were trained.
        skipped: Files that could not be read.
        best_step: Step whose state was kept, 0 where none was better than the original; None where the last
            state was kept.
        micro_batch: Images per forward and backward pass of the student at the end, where that is less than a
            batch; None where it is a batch.
        checkpointed: Whether activations were checkpointed at the end; None where not.
    """

    steps: int
    images: int
    seconds: float
    trained: int
    skipped: list[str]
    best_step: int | None = None
    micro_batch: int | None = None
    checkpointed: bool | None = None


class Gates(Part):
    """What a run asked of its result.

    Attributes:
        passed: Whether all gates were; None where nothing was measured.
        failures: Those that were not, in words.
    """

    passed: bool | None = None
    failures: list[str] = []


class AgreementFigures(Part):
    """Cosine of one model's features to the reference: its mean, its worst 1 %, where outliers had been."""

    mean: float
    worst_percent: float
    masked: float | None


class DriftFigures(Part):
    """Cosine of the pooled output to the original's: its mean, and that of the worst image."""

    mean: float
    min: float


class RecordedFigures(Part):
    """Figures before and after, as `phreg.evaluation.before_after` writes them and lays them out."""

    images: int
    held_out: bool
    reference: str
    outlier_rate: tuple[float, float]
    outlier_rate_by_block: tuple[list[float], list[float]] | None = None
    agreement: tuple[AgreementFigures, AgreementFigures]
    drift: DriftFigures


class RunSummary(Part):
    """How the run went that made a model.

    Attributes:
        size: Pixels of the images trained on: both sides, or (height, width).
        readout: How the student was read.
        recipe: All settings, as of the phreg that ran.
        outcome: Steps, images, seconds, weights trained, files skipped.
        sinks: The sinks that were found.
        gates: What was asked of the result.
        figures: Before and after; None where nothing was measured.
    """

    size: int | tuple[int, int] | None = None
    readout: Readout = "plain"
    recipe: dict[str, Any] | None = None
    outcome: Outcome | None = None
    sinks: dict[str, Any] | None = None
    gates: Gates | None = None
    figures: RecordedFigures | None = None

    @property
    def sizes(self) -> "list[int | Sequence[int]]":
        """Pixels of all images trained on, the main size first; empty where the run does not say."""
        return [] if self.size is None else [self.size, *(self.setting("mixed_sizes") or ())]

    def setting(self, key: str) -> Any:
        """Looks up a setting by its dotted key; None where the run has none such."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value
