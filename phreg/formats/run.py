"""What a finished run hands in: the adapter, with a record of how it was made, and a card."""

import logging

from phreg.backbones.base import Backbone
from phreg.config import DistillConfig
from phreg.evaluation.before_after import Comparison, failed_checks
from phreg.formats.adapter import describe_tower, save_adapter
from phreg.formats.card import model_card
from phreg.record import Base
from phreg.run_summary import Gates, Outcome, RecordedFigures, RunSummary
from phreg.sinks.locate import Sinks
from phreg.training.checkpoint import RunFolder, writing_run

logger = logging.getLogger(__name__)


def save_run(
    run: RunFolder,
    student: Backbone,
    original: Backbone,
    base: Base,
    config: DistillConfig,
    outcome: Outcome,
    sinks: Sinks | None,
    comparison: Comparison | None,
) -> None:
    """Writes the adapter with its record and card: last, for what has an adapter is a finished run."""
    failures = failed_checks(comparison, config.checks) if comparison else []
    if comparison is None:
        logger.warning("not measured, so nothing was checked: measure.images is 0")
    elif failures:
        logger.warning("checks failed, and the adapter is marked so: %s", "; ".join(failures))
    summary = RunSummary(
        size=config.size,
        readout=config.target.student_readout,
        recipe=config.model_dump(mode="json", exclude_none=True),
        outcome=outcome,
        sinks=sinks.to_json() if sinks else None,
        gates=Gates(passed=not failures if comparison else None, failures=failures),
        figures=RecordedFigures.model_validate(comparison.to_json()) if comparison else None,
    )
    tower = describe_tower(original)
    with writing_run(run):
        save_adapter(run.model, student, base, original.disk_state(), summary, model_card, tower=tower)
