"""Distils registers into a model, and the quickstart on the demonstration model.

    resolve ► load ► add registers ► train ► compare ► adapter, card, report

A clean model ends early: it is returned unchanged, with the verdict as its report.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from phreg import demo, methods
from phreg.analysis.consistency import ConsistencyReport
from phreg.analysis.inspection import look
from phreg.analysis.norms import NormReport, outliers
from phreg.api.active_run import ActiveRun, start, worth_training
from phreg.api.arguments import ImagesPath, usable_device
from phreg.api.distilled import Distilled
from phreg.api.sizes import checked_sizes
from phreg.backbones.base import Backbone, packed_types
from phreg.backbones.resolve import Base, display_name
from phreg.config import DistillConfig
from phreg.data.sampling import subsample, subsample_indices
from phreg.data.sources import ImageSource, open_images
from phreg.errors import PhregError
from phreg.evaluation.before_after import Comparison, HeldOut, compare, failed_checks
from phreg.formats.load import Model, open_model
from phreg.formats.run import save_run
from phreg.methods import METHODS
from phreg.processes import on_main
from phreg.progress import track
from phreg.report.folder import write_comparison, write_inspection
from phreg.rollback import ModelState, rollback_on_error, to_fp32
from phreg.run_summary import Outcome
from phreg.sinks.locate import Sinks, find_sinks
from phreg.teacher import Teacher
from phreg.training.checkpoint import RunFolder, check_free, close_without_model, starting_run
from phreg.training.launch import check_launch
from phreg.training.loop import UNTRAINED, train
from phreg.training.losses import LossTerm, distillation_terms
from phreg.training.runtime import deterministic_kernels
from phreg.training.step_log import StepRecord
from phreg.training.task import RetrofitTask
from phreg.training.validation import Validator

StepObserver = Callable[[StepRecord, int], None]

logger = logging.getLogger(__name__)

LOOKED_AT = 8
"""Batches in the report on a model with nothing to repair."""


def distill(
    model: Model | None = None,
    images: ImagesPath | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observe: StepObserver | None = None,
    **settings: Any,
) -> Distilled:
    """Retrofits registers onto a model by self-distillation.

    Args:
        model: A hub id, a timm or open_clip name, a folder, or an instance, which is then patched in place.
            Whatever ends the call early leaves an instance exactly as it was. This and the next two may come
            from the recipe instead.
        images: A folder, a text file of paths, tar shards, or a Hugging Face dataset.
        output: Run folder to write: recipe.toml, log.jsonl, state/, model/, report/.
        recipe: Name of a shipped recipe, or path of a TOML file.
        resume: Continue the run in `output`. Settings that are not given again stay the same.
        observe: Called with each step's record and the number of steps.
        settings: Any setting of `DistillConfig`, dotted keys as nested dictionaries:
            `method="paper", optim={"lr": 1e-3}`.

    Raises:
        PhregError: Anything asked for does not exist or does not fit; see its subclasses.
    """
    student, base, source, folder, config = _open_run(model, images, output, recipe, settings, resume=resume)
    method = METHODS[config.method]
    with (
        rollback_on_error(student) as before,
        deterministic_kernels(wanted=config.deterministic),
        start(student, source, folder, config) as run,
    ):
        if method.trains:
            run.check_trainable(student)
        with starting_run(run.folder, config, run.accelerator, resume=resume):
            to_fp32(student.eval().to(run.accelerator.device))
            original = before.frozen_twin()
            logger.info("looking for sinks on up to %d images", config.sinks.images)
            seen = run.read(original, subsample(run.train_images, config.sinks.images))
            norms = on_main(lambda: outliers(original, track("norms", seen)))
            sinks = on_main(lambda: find_sinks(original, seen, norms)) if method.needs_sinks else None
            if not config.force:
                worth, moved = worth_training(run, original, norms, method)
                if not worth:
                    return _nothing_to_repair(run, before, original, base, seen, norms, moved)
            logger.info("retrofitting on %s", run.divided)
            if config.target.native_size:
                student.set_input_size(run.size)
            student.trained_readout = config.target.student_readout
            terms = method.add(student, sinks, seen, config)
            outcome, held_out = UNTRAINED, None
            if method.trains:
                held_out = run.references(original, base)
                choosing = run.choosing(held_out, original, base)
                outcome = _train(run, original, student, terms, choosing, observe)
            if outcome.best_step == 0:
                return _nothing_gained(run, before, original, base, seen, outcome)
        comparison = _measure_and_save(run, before, original, base, sinks, outcome, held_out)
        before.restore_settings()
        return Distilled(
            model=student.model,
            run=run.folder.path,
            sinks=sinks,
            outcome=outcome,
            comparison=comparison,
            failures=failed_checks(comparison, config.checks) if comparison else [],
            main_process=run.accelerator.is_main_process,
        )


def _open_run(
    model: Model | None,
    images: ImagesPath | None,
    output: str | os.PathLike[str] | None,
    recipe: str | os.PathLike[str] | None,
    settings: dict[str, Any],
    *,
    resume: bool,
) -> tuple[Backbone, Base, ImageSource, RunFolder, DistillConfig]:
    """Resolves what `distill` was asked for, and opens model and images; nothing is written yet."""
    asked = {
        "model": "instance" if isinstance(model, nn.Module) else model,
        "images": images,
        "output": output,
    }
    given = {key: os.fspath(value) for key, value in asked.items() if value is not None} | settings
    resumed = False
    if resume and recipe is None and output is not None:
        written = RunFolder(Path(output)).recipe
        if resumed := written.is_file():
            recipe = written  # settings that are not given again stay the same
    # First without the model, so that a typo costs no download; again when its type (CLIP or not) is known.
    early = methods.resolve(recipe, given, written_by_phreg=resumed)
    required = early.required()
    folder = RunFolder(Path(required.output))
    check_free(folder.path, resume=resume)
    check_launch(early)
    if early.device is not None:
        usable_device(early.device)
    source = open_images(
        required.images,
        split=early.data.split,
        column=early.data.image_column,
        max_megapixels=early.data.max_megapixels,
    )
    student, base = open_model(
        model if isinstance(model, nn.Module) else required.model, early.revision, early.mean, early.std
    )
    if student.num_registers:
        raise PhregError(
            f"{early.model} has {student.num_registers} registers from phreg already; "
            f"distil what it was made from: {base.source}"
        )
    packed = packed_types(student.model)
    if packed:
        raise PhregError(
            f"asked to distil {student.describe()}, whose weights are quantised ({', '.join(packed)}) "
            "and cannot train; distil it in fp32, fp16 or bf16, and quantise the result"
        )
    is_clip = student.projection is not None
    config = methods.resolve(recipe, given, clip=is_clip, written_by_phreg=resumed)
    return student, base, source, folder, checked_sizes(student, config)


def _train(
    run: ActiveRun,
    original: Backbone,
    student: Backbone,
    terms: Sequence[LossTerm],
    held_out: HeldOut | None,
    observe: StepObserver | None,
) -> Outcome:
    """Trains the student with the original as its teacher, by the method's terms beside those of all."""
    config = run.config
    bf16 = run.accelerator.mixed_precision == "bf16"
    teacher = Teacher(original, config.views, config.target, bf16=bf16)
    task = RetrofitTask(student, teacher, [*distillation_terms(config.loss), *terms], config.target)
    validator = Validator(original, held_out, config.target) if held_out is not None else None
    return train(task, run.crops, config, run.folder, run.accelerator, observe, validator)


def _measure_and_save(
    run: ActiveRun,
    before: ModelState[Backbone],
    original: Backbone,
    base: Base,
    sinks: Sinks | None,
    outcome: Outcome,
    held_out: HeldOut | None,
) -> Comparison | None:
    """Compares the student with the original, and writes report and adapter; returns the comparison."""
    student, config = before.model, run.config
    before.restore_precision()
    to_fp32(student)  # rounded as it is handed out, and measured so
    comparison = None
    if run.accelerator.is_main_process:
        held_out = held_out or run.references(original, base)
        if held_out is not None:
            logger.info("measuring before and after, then writing the report")
            comparison = compare(original, student, held_out, config.target, held_out=run.held_out)
            write_comparison(run.folder, student, original, base, config, sinks, comparison)
    before.restore_precision()
    before.restore_precision(original)
    if run.accelerator.is_main_process:
        save_run(run.folder, student, original, base, config, outcome, sinks, comparison)
    student.note_normalisation()
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()
    return comparison


def _nothing_gained(
    run: ActiveRun,
    before: ModelState[Backbone],
    original: Backbone,
    base: Base,
    seen: Sequence[Tensor],
    outcome: Outcome,
) -> Distilled:
    """Hands out the model as it was, as no state of the run measured better than it."""
    verdict = _nothing_to_repair(run, before, original, base, seen, None)
    if run.accelerator.is_main_process:
        close_without_model(run.folder)
    return replace(verdict, outcome=outcome)


def _nothing_to_repair(
    run: ActiveRun,
    before: ModelState[Backbone],
    original: Backbone,
    base: Base,
    seen: Sequence[Tensor],
    norms: NormReport | None,
    moved: ConsistencyReport | None = None,
) -> Distilled:
    """Leaves the model as it was, and shows it in the run's report."""
    student, main_process = before.model, run.accelerator.is_main_process
    if main_process:
        logger.info("looking at the model as it is, for the report")
        shown = [seen[number] for number in subsample_indices(len(seen), LOOKED_AT)]
        write_inspection(run.folder.report, look(original, display_name(base.source), shown))
    run.accelerator.wait_for_everyone()
    before.restore()
    return Distilled(student.model, run.folder.path, None, None, None, [], main_process, norms, moved)


def quickstart(
    output: str | os.PathLike[str] = "runs/quickstart", *, observe: StepObserver | None = None
) -> Distilled:
    """Distils the demonstration model on photographs that come with scikit-image; needs no network.

    Args:
        output: Run folder to write; the photographs go to folders beside it.
        observe: Called with each step's record and the number of steps.
    """
    beside = Path(f"{os.fspath(output)}-photos")
    demo.write_demo_images(beside / "train")
    demo.write_demo_images(beside / "held-out", held_out=True)
    held_out = {"source": os.fspath(beside / "held-out")}
    return distill("demo", beside / "train", output, recipe="quickstart", measure=held_out, observe=observe)
