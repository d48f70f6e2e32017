"""What stands around the training loop in `phreg distill`: registers first, figures and files afterwards.

original, sinks ──retrofit──► student ──compare_with_original──► Comparison ──save──► adapter, card, report
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict

from jaxtyping import Float
from torch import Tensor

from phreg import config as configuration
from phreg import demo
from phreg.analysis.inspection import of_survey
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base, display_name
from phreg.config import DistillConfig
from phreg.data.crops import Order, middle
from phreg.evaluation.before_after import Comparison, compare, failed_gates
from phreg.formats.adapter import describe_tower
from phreg.formats.card import model_card
from phreg.methods import METHODS
from phreg.report.html import Origin, write_report
from phreg.report.page import comparison_page
from phreg.seeding import keyed_generator
from phreg.sinks import test_time
from phreg.sinks.locate import Sinks
from phreg.storage import write_text
from phreg.teacher import Teacher
from phreg.training.checkpoint import RunFolder, save_adapter, writing_run
from phreg.training.loop import Outcome
from phreg.training.trainable import expand_roles
from phreg.views import count_different

# Nothing is bound by this shape: the last batch may be smaller than the others.
Images = Float[Tensor, "_ 3 _ _"]

logger = logging.getLogger(__name__)


def check_trainable(student: Backbone, num_images: int, config: DistillConfig, processes: int) -> None:
    """Checks what training will ask for, before anything is written and before the search for sinks.

    Raises:
        PhregError: The images do not fill a batch, or a role does not exist for the model.
    """
    if METHODS[config.method].trains:
        Order(num_images, config.batch_size, world_size=processes)
        expand_roles(student, config.unlock.roles)


def compare_with_original(
    original: Backbone,
    student: Backbone,
    looked_at: Sequence[Images],
    around: tuple[int, int],
    config: DistillConfig,
    base: Base,
    *,
    held_out: bool,
) -> Comparison:
    """Measures the student against the original, and both against the original averaged over many views.

    Of the demonstration model the truth is known, and takes the place of that average. The images looked at
    come with the surroundings that views show, so many pixels around them.
    """
    images = [middle(whole, around) for whole in looked_at]
    grid = student.layout(images[0]).grid
    count = min(config.measure.views, count_different(config.views, grid) or config.measure.views)
    many = config.views.model_copy(update={"count": count, "sampler": "uniform"})
    teacher = Teacher(original, many, config.target)
    known = base.source == "demo"

    def reference(images: Tensor, number: int) -> Tensor:
        if known:
            return demo.truth(images)
        key = keyed_generator("reference", config.seed, number)
        return teacher(looked_at[number], key, around).patches

    described = "the known truth" if known else f"the original averaged over {many.count} views"
    return compare(
        original, student, images, reference, config.target, described=described, held_out=held_out
    )


def write_comparison(
    run: RunFolder,
    student: Backbone,
    original: Backbone,
    base: Base,
    config: DistillConfig,
    sinks: Sinks | None,
    comparison: Comparison,
) -> None:
    """Writes what the run changed: figures.json, and a page with the models side by side."""
    surveys, features = comparison.surveys, comparison.shown
    before = of_survey(original, "before", surveys[0], features[0], sinks=sinks)
    after = of_survey(student, "after", surveys[1], features[1], sinks=None)
    title = f"{display_name(base.source)}, before and after {config.registers} registers"
    origin = Origin.of("distill", configuration.flatten(config.model_dump(mode="json", exclude_none=True)))
    page = comparison_page(
        title, comparison, before, after, origin, failures=failed_gates(comparison, config.gate)
    )
    with writing_run(run):
        if (run.report / "inspect.json").exists():  # of a verdict that --force overrode
            shutil.rmtree(run.report)
        run.report.mkdir(exist_ok=True)
        write_text(run.report / "figures.json", json.dumps(comparison.to_json(), indent=2))
        write_report(run.report / "report.html", page)


def save(
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
    failures = failed_gates(comparison, config.gate) if comparison else []
    if comparison is None:
        logger.warning("not measured, so no gate was asked: measure.images is 0")
    elif failures:
        logger.warning("gates failed, and the adapter is marked so: %s", "; ".join(failures))
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
