"""Writes what was found about a model, and those it is compared with, into a folder.

Every figure goes to inspect.json, the page to report.html, and each of its charts to a PNG file of its own.
Beside them lies what is too much for the page: for each image shown, the attention of every head in the last
block, a row for CLS and for each register, the mean over heads first (heads-01.png; with several models,
heads-1-01.png).
"""

import json
import os
import shutil
from pathlib import Path

from phreg.analysis.feature_maps import attention_limits
from phreg.analysis.inspection import Inspection, of_survey
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base, display_name
from phreg.config import DistillConfig
from phreg.errors import PhregError
from phreg.evaluation.before_after import Comparison, failed_checks
from phreg.report.canvas import save_png
from phreg.report.html import UNKNOWN, Origin, write_report
from phreg.report.maps import attention_maps, sheet
from phreg.report.page import comparison_page, inspection_page
from phreg.settings import flatten
from phreg.sinks.locate import Sinks
from phreg.storage import write_text, writing
from phreg.training.checkpoint import RunFolder, writing_run

HEAD_SIDE = 112
"""Pixels of a head's map on a sheet, at least."""


def check_output(folder: Path, images: str | os.PathLike[str] | None) -> None:
    """Checks, before anything is looked at, that pictures may be written to a folder.

    An earlier look may be overwritten.

    Args:
        folder: Folder to write.
        images: Where the images are, which must not gain pictures of phreg's; None where there is no folder.

    Raises:
        PhregError: The folder holds something else, or lies among the images.
    """
    asked = f"asked to write a report to {folder}"
    if images is not None and Path(images).is_dir():
        among = Path(images).resolve()
        if among == folder.resolve() or among in folder.resolve().parents:
            raise PhregError(
                f"{asked}, which lies among the images in {images}; its pictures would be read as images by "
                "the next run, so choose another --output"
            )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if (folder / "inspect.json").is_file():
            return
        raise PhregError(
            f"{asked}, which is not empty and holds no earlier look (inspect.json); choose another --output"
        )


def write_inspection(folder: Path, inspection: Inspection, origin: Origin = UNKNOWN) -> None:
    """Writes the folder.

    Args:
        folder: Folder to write; files of these names are replaced.
        inspection: What was found.
        origin: How to make the report again.

    Raises:
        PhregError: The folder cannot be written.
    """
    page = inspection_page(inspection, origin)
    with writing(folder, "free space, or choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "inspect.json", json.dumps(inspection.to_json(), indent=2))
        write_report(folder / "report.html", page)
        for section in page.sections:
            for chart in section.charts:
                (folder / f"{chart.name}.png").write_bytes(chart.png)
        for number, model in enumerate(inspection.models, start=1):
            seen = [image.attention for image in model.survey.shown if image.attention is not None]
            which = f"{number}-" if inspection.against else ""
            for number, attention in enumerate(seen, start=1):
                tiles = attention_maps(attention, attention_limits(*seen).high, side=HEAD_SIDE)
                save_png(folder / f"heads-{which}{number:02}.png", sheet(tiles))


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
    title = f"{display_name(base.source)}, before and after {student.num_registers} registers"
    origin = Origin.of("distill", flatten(config.model_dump(mode="json", exclude_none=True)))
    page = comparison_page(
        title, comparison, before, after, origin, failures=failed_checks(comparison, config.checks)
    )
    with writing_run(run):
        if (run.report / "inspect.json").exists():  # of a verdict that --force overrode
            shutil.rmtree(run.report)
        run.report.mkdir(exist_ok=True)
        write_text(run.report / "figures.json", json.dumps(comparison.to_json(), indent=2))
        write_report(run.report / "report.html", page)
