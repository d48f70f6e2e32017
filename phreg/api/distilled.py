"""What `distill` returns."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import nn

from phreg.analysis.consistency import ConsistencyReport
from phreg.analysis.norms import NormReport
from phreg.evaluation.before_after import Comparison
from phreg.run_summary import Outcome
from phreg.short_table import ShortTable, shown_as_table
from phreg.sinks.locate import Sinks


@shown_as_table
@dataclass(frozen=True, eq=False)
class Distilled:
    """What `distill` made.

    Attributes:
        model: The patched model, of its ordinary class, on the device it was trained on. An instance has the
            precision, the mode and each parameter's `requires_grad` that it came with; where there was
            nothing to repair, it is as it was.
        run: Its run folder.
        sinks: The sinks that were found; None where there were none, or the method does not look for them.
        outcome: Steps, images, seconds and skipped files; None where there was nothing to repair.
        comparison: The before/after figures; None where measuring was switched off, and on other processes.
        failures: What the run made worse than `config.ChecksConfig` allows, in words. The adapter is marked.
        main_process: Whether this is the process that writes, of the many there may be.
        norms: The norms that show nothing to repair, where that is so; None otherwise.
        consistency: The agreement with moved views that shows the same, where the method asks for it.
    """

    model: nn.Module = field(repr=False)
    run: Path
    sinks: Sinks | None = field(repr=False)
    outcome: Outcome | None
    comparison: Comparison | None = field(repr=False)
    failures: list[str]
    main_process: bool
    norms: NormReport | None = field(default=None, repr=False)
    consistency: ConsistencyReport | None = field(default=None, repr=False)

    @property
    def unchanged(self) -> bool:
        """Whether the model is as it was: there was nothing to repair, or no state of the run was better."""
        return self.outcome is None or self.outcome.best_step == 0

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show: the run, and its figures before and after."""
        what = f"{type(self.model).__name__} in {self.run}"
        if self.unchanged:
            return ShortTable(f"{what}: nothing to gain, the model is unchanged", [])
        trained = f"{self.outcome.steps} steps on {self.outcome.images} images" if self.outcome else ""
        checks = f"checks failed: {'; '.join(self.failures)}" if self.failures else "no check failed"
        if self.comparison is None:
            return ShortTable(f"{what}: {trained}, not measured", [])
        figures = self.comparison.short_table()
        return replace(figures, title=f"{what}: {trained}; {checks}")
