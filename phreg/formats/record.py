"""What is recorded of a run, beside the adapter that it made."""

import logging
from dataclasses import asdict

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base
from phreg.config import DistillConfig
from phreg.evaluation.before_after import Comparison, failed_gates
from phreg.formats.adapter import describe_tower
from phreg.formats.card import model_card
from phreg.sinks import test_time
from phreg.sinks.locate import Sinks
from phreg.training.checkpoint import RunFolder, save_adapter, writing_run
from phreg.training.loop import Outcome

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
    failures = failed_gates(comparison, config.checks) if comparison else []
    if comparison is None:
        logger.warning("not measured, so nothing was checked: measure.images is 0")
    elif failures:
        logger.warning("checks failed, and the adapter is marked so: %s", "; ".join(failures))
    record = {
        "size": config.size,
        "readout": config.target.student_readout,
        "test_time": test_time.installed(student),
        "test_time_size": test_time.calibrated_size(student),
        "recipe": config.model_dump(mode="json", exclude_none=True),
        "outcome": asdict(outcome),
        "sinks": sinks.to_json() if sinks else None,
        "gates": {"passed": not failures if comparison else None, "failures": failures},
        "figures": comparison.to_json() if comparison else None,
    }
    tower = describe_tower(original)
    with writing_run(run):
        save_adapter(run.model, student, base, original.disk_state(), record, model_card, tower=tower)
