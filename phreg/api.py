"""The public verbs, each composed of the modules of the method.

    distill   resolve ► load ► add registers ► train ► compare ► adapter, card, report
    load      adapter ► base ► patched model of its ordinary class

Each module describes its own work. Here is only the order.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from phreg import config as configuration
from phreg import demo, methods
from phreg.analysis.inspection import Inspection, look
from phreg.analysis.norms import NormReport, outliers
from phreg.backbones import hub, resolve
from phreg.backbones.base import Backbone, packed_types
from phreg.backbones.readout import set_readout, use_readout
from phreg.backbones.resolve import Base, adapt, display_name
from phreg.config import DistillConfig, ViewsConfig
from phreg.data.crops import MEASURED_AT_ONCE, Crops, centre_crops, larger
from phreg.data.sampling import split, subsample, subsample_indices
from phreg.data.sources import ImageSource, open_images
from phreg.deprecated import accept_old_arguments
from phreg.errors import ConfigError, DataError, PhregError, PushError
from phreg.evaluation.before_after import Comparison, HeldOut, compare, failed_gates, make_references
from phreg.evaluation.datasets.labelled import read_labelled
from phreg.evaluation.feature_cache import GIGABYTE, FeatureCache
from phreg.evaluation.features import Observer as Progress
from phreg.evaluation.results import MAPS, Results
from phreg.evaluation.runner import Running, Suite, compare_models
from phreg.evaluation.tasks.table import resolve_settings
from phreg.formats import export as exports
from phreg.formats import publish
from phreg.formats.export.spec import find_spec
from phreg.formats.load import open_into, open_model, open_saved, record_of, warn_failed_checks
from phreg.formats.run import save_run
from phreg.methods import METHODS
from phreg.record import Equality, Outcome
from phreg.report.examples import write_examples
from phreg.report.folder import check_output, write_comparison, write_inspection
from phreg.report.html import Origin
from phreg.report.page import InspectionReport
from phreg.rollback import ModelState, rollback_on_error, to_fp32, unchanged
from phreg.seeding import keyed_generator
from phreg.sinks import test_time
from phreg.sinks.locate import Sinks, find_sinks
from phreg.teacher import Teacher
from phreg.training.checkpoint import RunFolder, check_free, close_without_model, starting_run
from phreg.training.loop import (
    UNTRAINED,
    StepRecord,
    deterministic_kernels,
    start_accelerator,
    train,
)
from phreg.training.losses import LossTerm, distillation_terms
from phreg.training.task import RetrofitTask
from phreg.training.trainable import check_trainable
from phreg.training.validation import Validator
from phreg.views import context_margin

Model = str | os.PathLike[str] | nn.Module
ImagesPath = str | os.PathLike[str]
StepObserver = Callable[[StepRecord, int], None]

logger = logging.getLogger(__name__)

LOOKED_AT = 8
"""Batches in the report on a model with nothing to repair."""


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
    """

    model: nn.Module = field(repr=False)
    run: Path
    sinks: Sinks | None = field(repr=False)
    outcome: Outcome | None
    comparison: Comparison | None = field(repr=False)
    failures: list[str]
    main_process: bool
    norms: NormReport | None = field(default=None, repr=False)

    @property
    def unchanged(self) -> bool:
        """Whether the model is as it was: there was nothing to repair, or no state of the run was better."""
        return self.outcome is None or self.outcome.best_step == 0


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
    student, base, source, config = _open_run(model, images, output, recipe, settings, resume=resume)
    method = METHODS[config.method]
    with rollback_on_error(student) as before, deterministic_kernels(wanted=config.deterministic):
        run = _start(student, source, config)
        if method.trains:
            check_trainable(student, len(run.train_images), config, run.accelerator.num_processes)
        with starting_run(run.folder, config, run.accelerator, resume=resume):
            original = before.frozen_twin()
            for backbone in (original, student):
                to_fp32(backbone.eval().to(run.accelerator.device))
            logger.info("looking for sinks on up to %d images", config.sinks.images)
            seen = run.read(original, subsample(run.train_images, config.sinks.images))
            norms = outliers(original, seen)
            sinks = find_sinks(original, seen, norms) if method.needs_sinks else None
            if norms.emergence_block is None and not config.force:
                return _nothing_to_repair(run, before, original, base, seen, norms)
            logger.info("retrofitting on %s", run.divided)
            if config.target.native_size:
                student.set_input_size(run.size)
            student.trained_readout = config.target.student_readout
            terms = method.add(student, sinks, seen, config)
            # All processes choose the best state by them. Otherwise only the main one needs them, at the end.
            held_out = run.references(original, base) if config.measure.keep_best else None
            outcome = UNTRAINED
            if method.trains:
                outcome = _train(run, original, student, terms, held_out, observe)
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
            failures=failed_gates(comparison, config.checks) if comparison else [],
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
) -> tuple[Backbone, Base, ImageSource, DistillConfig]:
    """Resolves what `distill` was asked for, and opens model and images; nothing is written yet."""
    asked = {
        "model": "instance" if isinstance(model, nn.Module) else model,
        "images": images,
        "output": output,
    }
    given = {key: os.fspath(value) for key, value in asked.items() if value is not None} | settings
    resumed = resume and recipe is None and output is not None and RunFolder(Path(output)).recipe.is_file()
    if resumed:
        recipe = RunFolder(Path(output or "")).recipe  # settings that are not given again stay the same
    # First without the model, so that a typo costs no download; again when its type (CLIP or not) is known.
    early = methods.resolve(recipe, given, written_by_phreg=resumed)
    missing = [key for key in asked if getattr(early, key) is None]
    if missing:
        raise ConfigError(
            "settings", [f"{key}: not given; name it by flag, argument or recipe" for key in missing]
        )
    check_free(Path(early.output or ""), resume=resume)
    if early.device is not None:
        _usable(early.device)
    source = open_images(
        early.images or "",
        split=early.data.split,
        column=early.data.image_column,
        max_megapixels=early.data.max_megapixels,
    )
    student, base = open_model(
        model if isinstance(model, nn.Module) else early.model or "", early.revision, early.mean, early.std
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
    height, width = student.image_size(config.size)
    config = config.model_copy(update={"size": height if height == width else (height, width)})
    return student, base, source, config


@dataclass(frozen=True)
class _Run:
    """A run that is under way: its folder, processes and images.

    Attributes:
        size: Height and width of its images.
        train_images: Those it trains on.
        measured_images: Those it is measured on.
        held_out: Whether none of these is trained on.
        margin: Rows and columns of context that training images and targets come with, in pixels.
    """

    folder: RunFolder
    config: DistillConfig
    accelerator: Any
    size: tuple[int, int]
    train_images: ImageSource
    measured_images: ImageSource
    held_out: bool
    margin: tuple[int, int]

    @property
    def divided(self) -> str:
        """How many images there are, for the log."""
        apart = "held out to measure on" if self.held_out else "of them also measured on"
        return f"{len(self.train_images)} images, {len(self.measured_images)} {apart}"

    @property
    def crops(self) -> Crops:
        """The training images, cut."""
        where = "fixed" if self.config.target.cache else "random"
        return Crops(self.train_images, self.size, self.config.seed, where, self.margin)

    def references(self, original: Backbone, base: Base) -> HeldOut | None:
        """Makes what the model is measured against; None where there is no image, or none is readable."""
        if not len(self.measured_images):
            return None
        logger.info("averaging %d images to measure on over views", len(self.measured_images))
        images = self.read(original, self.measured_images, self.margin)
        return make_references(original, images, self.margin, self.config, base) if images else None

    def read(self, backbone: Backbone, images: ImageSource, margin: tuple[int, int] = (0, 0)) -> list[Tensor]:
        """Reads images to look at a model with, as many as are readable."""
        return list(centre_crops(backbone, images, self.size, margin, self.config.data.max_broken))


def _start(student: Backbone, source: ImageSource, config: DistillConfig) -> _Run:
    """Starts the processes, and splits the images."""
    folder, size = RunFolder(Path(config.output or "")), student.image_size(config.size)
    accelerator = start_accelerator(config, folder)
    train_images, measured_images, held_out = split(source, config)
    margin = context_margin(config.views, student.spec, size)
    return _Run(folder, config, accelerator, size, train_images, measured_images, held_out, margin)


def _train(
    run: _Run,
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
    terms = [*distillation_terms(config.loss), *terms]
    task = RetrofitTask(student, teacher, terms, config.target, run.margin)
    validator = Validator(original, held_out, config.target) if held_out is not None else None
    return train(task, run.crops, config, run.folder, run.accelerator, observe, validator)


def _measure_and_save(
    run: _Run,
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
    run: _Run,
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
    run: _Run,
    before: ModelState[Backbone],
    original: Backbone,
    base: Base,
    seen: Sequence[Tensor],
    norms: NormReport | None,
) -> Distilled:
    """Leaves the model as it was, and shows it in the run's report."""
    student, main_process = before.model, run.accelerator.is_main_process
    if main_process:
        shown = [seen[number] for number in subsample_indices(len(seen), LOOKED_AT)]
        write_inspection(run.folder.report, look(original, display_name(base.source), shown))
    run.accelerator.wait_for_everyone()
    before.restore()
    return Distilled(student.model, run.folder.path, None, None, None, [], main_process, norms)


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


def load(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Loads a patched model: an ordinary model of its library's class, registers inside, in eval mode.

    Args:
        path: A run, an adapter, a folder that `export` wrote, what a patched transformers model's own
            `save_pretrained` wrote, or the hub id of any of them.
        revision: Hub commit, branch or tag of it.
        into: The adapter's base, where it is at hand already, or a model around the same vision tower: a
            vision-language model, a depth model, a detector. It is patched in place.
        device: Where to put the model; None means the CPU, and `into` stays where it is.

    Returns:
        The model, or `into`.

    Raises:
        LoadError: phreg did not write it, its base cannot be found, or its weights or its base's are others.
        PhregError: There is no such device.
    """
    if device is not None:
        device = _usable(device, for_weights=True)
    found = resolve.locate(path, revision)
    with rollback_on_error(into) if into is not None else nullcontext():
        if into is None:
            model = open_saved(found)[0].model
        else:
            open_into(found, into)
            model = into
        warn_failed_checks(found)
        return model.eval() if device is None else model.eval().to(device)


def export(
    model: Model,
    path: str | os.PathLike[str],
    format: str,
    *,
    revision: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> list[Equality]:
    """Writes a patched model as a folder that its format's own library loads, and checks that it does.

    Args:
        model: A run, an adapter, or a patched model instance, which stays as it is.
        path: Folder to write; it must not hold anything.
        format: `timm` (most models), `transformers` (DINOv2, as DINOv2 with registers) or `open_clip` (its
            own, text tower included), which load as they are; `remote-code` (any model of transformers, with
            the code to load it); `onnx`; `merged` (for `load` without the base) or `adapter` (for `load` with
            it). See phreg/formats/export/README.md.
        revision: Hub commit, branch or tag of the adapter.
        mean: Mean that images are normalised with, RGB on a scale of 0 to 1, to be written into the folder;
            None means as the model or its record says.
        std: Standard deviation, likewise.

    Returns:
        How equal the written model is at its own size and at others, as measured on loading it back.

    Raises:
        PhregError: The format cannot carry this model; the message names those that can.
    """
    record = None
    if not isinstance(model, nn.Module) and os.fspath(model) != "demo":
        record = record_of(resolve.locate(model, revision))
    backbone, base = open_model(model, revision, mean, std)
    run = None
    if record is not None:  # an instance keeps the read-out that it has
        set_readout(backbone, backbone.trained_readout)
        run = record.run_or_readout
    with unchanged(*([backbone] if isinstance(model, nn.Module) else [])):
        return exports.export(backbone, Path(path), format, base=base, run=run)


@dataclass(frozen=True)
class Pushed:
    """What `push` did.

    Attributes:
        repository: Hub id.
        commit: Address of the commit; None for a dry run.
        folder: The folder that a dry run wrote.
        files: Names of the files.
        num_bytes: Their size together.
    """

    repository: str
    commit: str | None
    folder: Path | None
    files: tuple[str, ...]
    num_bytes: int


def push(
    model: str | os.PathLike[str],
    repository: str,
    *,
    format: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: str | os.PathLike[str] | None = None,
) -> Pushed:
    """Puts a run's adapter, or an export, on the Hugging Face hub, with a model card that fills itself.

    Paths of this disk, photographs, logs and checkpoints stay here.

    Args:
        model: A run, an adapter, or an exported folder.
        repository: Hub id to push to, `owner/name`; created where there is none.
        format: A format of `export` that a run is written in first; None takes what `model` is.
        private: Whether nobody else may see the repository.
        revision: Branch to commit to, created where there is none; None means the main branch.
        dry_run: Folder to write what would be pushed to, instead of pushing.

    Raises:
        PushError: Token, permission or network is missing, or a folder or repository holds something else.
        PhregError: The model cannot be read, or cannot take the format.
    """
    if repository.count("/") != 1:
        raise PushError(f"asked to push to {repository!r}, which is no name of a repository; give owner/name")
    found = resolve.locate(model)
    record = record_of(found)
    kind = find_spec(record.format).name if record else None
    with tempfile.TemporaryDirectory() as scratch:
        if format not in (None, kind):
            export(model, Path(scratch) / "export", format=format)
            found = resolve.locate(Path(scratch) / "export")
        else:
            warn_failed_checks(found)
        folder = Path(scratch) / "push" if dry_run is None else Path(dry_run)
        written = publish.assemble(found, folder, repository)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        commit = None
        if dry_run is None:
            message = f"{written.format} by phreg {written.versions.get('phreg', '')}".strip()
            commit = hub.upload(
                folder,
                repository,
                message=message,
                private=private,
                branch=revision,
                replace=publish.replaced(),
                ours=publish.OURS,
            )
        names = tuple(path.relative_to(folder).as_posix() for path in files)
        size = sum(path.stat().st_size for path in files)
    return Pushed(repository, commit, Path(dry_run) if dry_run is not None else None, names, size)


def denoise(
    model: nn.Module,
    images: Float[Tensor, "batch 3 height width"],
    *,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **views: Any,
) -> Float[Tensor, "batch rows cols dim"]:
    """Reads a model's patch features averaged over moved views: the teacher alone, without any training.

    Args:
        model: Any supported model, in eval mode; it is not changed. What phreg trained is read as it was
            trained.
        images: Normalised images on the model's device, sides a multiple of the patch size.
        seed: Seed of the views.
        mean: Mean that the images were normalised with, RGB on a scale of 0 to 1, by which views are filled
            with the right colour; None means as the model or its image processor says.
        std: Standard deviation, likewise.
        views: Settings of `ViewsConfig`, such as `count=10`.

    Returns:
        Features after the final norm, in fp32.
    """
    backbone = adapt(model)
    resolve.settle_normalisation(backbone, mean, std)
    images = _checked(backbone, images)
    with use_readout(backbone):
        return Teacher(backbone, _views(views))(images, keyed_generator("views", seed)).patches


def add_test_time_registers(
    model: nn.Module, images: Float[Tensor, "batch 3 height width"], num_registers: int = 1
) -> nn.Module:
    """Moves a model's artifacts into added registers by a hook, in place and without training.

    The cheapest repair, and not the best (`phreg.sinks.test_time`); `remove_registers` undoes it.

    Args:
        model: Any supported model; put in eval mode. Whatever ends the call early leaves it as it was.
        images: Normalised images to find the artifacts and their causes on, a few dozen at least, of the size
            that the model is to be used at.
        num_registers: Registers to add.

    Returns:
        The same model.

    Raises:
        PhregError: The model has no artifacts, or no hidden unit causes them, or it has registers already.
    """
    backbone = adapt(model)
    with rollback_on_error(backbone):
        _add_test_time_registers(backbone.eval(), images, num_registers)
    return model


def _add_test_time_registers(backbone: Backbone, images: Tensor, num_registers: int) -> None:
    """Finds a model's artifacts and moves them."""
    images = _checked(backbone, images)
    if not len(images):
        raise DataError("asked for test-time registers found on no images; give a few dozen at least")
    if backbone.num_registers:
        raise PhregError(
            f"asked for test-time registers on {backbone.describe()}, which has {backbone.num_registers} "
            "registers from phreg; call phreg.remove_registers(model) first"
        )
    sinks = find_sinks(backbone, list(images.split(MEASURED_AT_ONCE)))
    if sinks is None:
        raise PhregError(
            f"asked for test-time registers on {backbone.describe()}, whose norms on {len(images)} images "
            "show no artifacts in any block; there is nothing to repair, unless more images show some"
        )
    test_time.add_test_time_registers(backbone, sinks, num_registers)


@accept_old_arguments("inspect")
def inspect(
    model: Model,
    images: ImagesPath | Float[Tensor, "batch 3 height width"],
    *,
    baseline: Model | Sequence[Model] = (),
    output: str | os.PathLike[str] | None = None,
    size: int | tuple[int, int] | None = None,
    count: int = 64,
    labels: ImagesPath | None = None,
    texts: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
    observe: Progress | None = None,
) -> InspectionReport:
    """Inspects a model: its artifacts, where they come from, and what they hold.

    Args:
        model: A model in any form that `distill` takes, a run, or an adapter.
        images: Where images are, or a batch of normalised ones.
        baseline: One or more models to compare it with, on the same images.
        output: Folder for inspect.json, report.html and pictures: new, empty, or of an earlier inspection.
            None writes nothing.
        size: Height and width of the images in pixels, or one number for both; None means each model's own.
        count: Images to look at, evenly spaced over those there are.
        labels: Labelled images, in any layout of the task `classification` (a folder a class), to ask what
            single tokens know of an image's class; None leaves that out.
        texts: Texts whose similarity to each patch is mapped, for models with a text tower.
        mean: Mean to normalise images with, RGB on a scale of 0 to 1, for all models; None means as each or
            its image processor says.
        std: Standard deviation to normalise them with, likewise.
        device: Where to run; None means a GPU where there is one, and for an instance, where it is.
        observe: Called with the progress: the name of the work, how much is done, and how much there is.

    Returns:
        What was found; in a notebook it shows itself as the report.

    Raises:
        PhregError: A model or the images cannot be read, or the output holds something else.
    """
    others = [baseline] if isinstance(baseline, str | os.PathLike | nn.Module) else [*baseline]
    _check_look(images, others, output, count, device)
    looks = [
        _look(
            name, given, images, size, count, labels, texts, mean, std, device, observe or (lambda *_: None)
        )
        for name, given in _short(_named([model, *others])).items()
    ]
    inspection = InspectionReport.of(replace(looks[0], against=tuple(looks[1:])))
    if output is not None:
        shown = {"images": images if isinstance(images, str | os.PathLike) else "given as a tensor"}
        shown |= {"size": size, "mean": mean, "std": std, "count": count, "labels": labels}
        shown |= {"texts": ", ".join(texts) or None}
        write_inspection(Path(output), inspection, Origin.of("inspect", shown))
    return inspection


def _check_look(
    images: ImagesPath | Tensor,
    others: Sequence[Model],
    output: str | os.PathLike[str] | None,
    count: int,
    device: str | None,
) -> None:
    """Refuses what cannot be looked at, before the first look, so that a typo costs none."""
    if count < 1:
        raise PhregError(f"asked to look at {count} images; give a --count of 1 or more")
    if output is not None:
        check_output(Path(output), images if isinstance(images, str | os.PathLike) else None)
    if device is not None:
        _usable(device)
    for other in others:
        if not isinstance(other, nn.Module) and os.fspath(other) != "demo":
            resolve.locate(other)


@accept_old_arguments("evaluate")
def evaluate(
    *models: Model,
    task: str,
    data: ImagesPath,
    output: str | os.PathLike[str] | None = None,
    baseline: Model | None = None,
    seeds: int = 1,
    seed: int = 0,
    protocol: str | None = None,
    max_drop: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: str | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 16,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: float = 20.0,
    observe: Progress | None = None,
    **settings: Any,
) -> Results:
    """Compares models in a task: see `phreg.evaluation.tasks.table.TASKS`.

    Args:
        models: One or more, in any form that `distill` takes. Instances come back as they were.
        task: Name of the task.
        data: Where its images and labels are.
        output: Folder to write results to, and runs that a rerun takes up again; None writes nothing.
        baseline: Model to set the others against, and measure them at whose artifacts; None means the first.
        seeds: Runs of each model. Several give a standard deviation. A deterministic task runs once.
        seed: The first seed.
        protocol: A named set of the task's settings.
        max_drop: Largest drop behind the baseline's headline, and in whatever else the task guards, e.g.
            0.01.
        mean: Mean to normalise images with, RGB on a scale of 0 to 1; None means as each model says.
        std: Standard deviation to normalise them with, likewise.
        device: Where to run; None means a GPU where there is one.
        precision: Of the models' forwards.
        batch_size: Pictures per forward.
        cache: Folder that keeps features; None means `output/features`.
        cache_limit: Gigabytes it may take.
        observe: Called with the progress: the name of the work, how much is done, and how much there is.
        settings: Any setting of the task: `neighbours=10, reading={"size": 448}`.

    Raises:
        MaxDropError: A figure dropped by more than `max_drop`. The results are written; the error holds them.
        PhregError: Anything asked for does not exist or does not fit, or the output holds other results.
    """
    checked = resolve_settings(task, settings, protocol)
    _check_amounts(seeds=seeds, batch_size=batch_size, max_drop=max_drop, cache_limit=cache_limit)
    _check_asked(models, baseline, data, max_drop, (output, cache))
    running = Running(_usable(device), batch_size, precision == "bf16", observe or (lambda *_: None))
    named, against = _side_by_side(models, baseline)
    with _folder_for(output) as folder, _unchanged(named):
        kept = FeatureCache(Path(cache or folder / "features"), int(cache_limit * GIGABYTE))
        runs = tuple(range(seed, seed + seeds))
        suite = Suite(task, os.fspath(data), checked, runs, folder, kept, running, show=output is not None)
        opened = partial(_open_named, named, mean, std)
        results = compare_models(suite, list(_named(models)), against, opened)
        write_examples(folder / MAPS, _short(results.examples))
    results.check_gate(max_drop)
    return results


class _Amounts(configuration.Config):
    """The numbers that `evaluate` is given."""

    seeds: PositiveInt
    batch_size: PositiveInt
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    cache_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_amounts(**amounts: Any) -> None:
    """Refuses numbers that make no sense."""
    configuration.build(_Amounts, amounts, source="evaluate")


def _check_asked(
    models: Sequence[Any],
    baseline: Any,
    data: Any,
    max_drop: float | None,
    folders: Sequence[str | os.PathLike[str] | None],
) -> None:
    """Refuses what cannot be evaluated, before anything is done that would be lost."""
    _check_names(models, baseline, data)
    if max_drop is not None and baseline is None:
        raise PhregError("--max-drop asked for without a model to compare with; give --baseline MODEL")
    for folder in folders:
        if folder is not None:
            _check_folder(Path(folder))


def _side_by_side(models: Sequence[Model], baseline: Model | None) -> tuple[dict[str, Model], str | None]:
    """Names the models and the baseline, which may be one of them; and tells the baseline's name."""
    named = _named(models)
    if baseline is None:
        return named, None
    for name, model in named.items():
        if model is baseline or model == baseline:
            return named, name
    other = _named([baseline], "baseline")
    return named | other, next(iter(other))


@contextmanager
def _folder_for(output: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Gives the folder to write to, one that is deleted afterwards where there is to be none."""
    with tempfile.TemporaryDirectory(prefix="phreg-") as temporary:
        yield Path(temporary if output is None else output)


def _unchanged(named: Mapping[str, Model]) -> AbstractContextManager[None]:
    """Leaves instances as they were."""
    return unchanged(*(model for model in named.values() if isinstance(model, nn.Module)))


def _open_named(
    named: Mapping[str, Model], mean: Sequence[float] | None, std: Sequence[float] | None, name: str
) -> Backbone:
    """Opens one of several models."""
    return open_model(named[name], mean=mean, std=std)[0]


def _check_names(models: Sequence[Any], baseline: Any, data: Any) -> None:
    """Refuses what names neither models nor data, such as a list of them."""
    given = [*models, *([] if baseline is None else [baseline])]
    wrong = [type(model).__name__ for model in given if not isinstance(model, str | os.PathLike | nn.Module)]
    if not models:
        raise PhregError("asked to evaluate no model; name one or more: phreg evaluate MODEL… --task TASK …")
    if wrong:
        raise PhregError(
            f"asked to evaluate {len(models)} models, {len(wrong)} of which are none: "
            f"{', '.join(wrong)}; give names, folders or instances, one or more, each on its own: "
            "phreg.evaluate(a, b, task=…)"
        )
    if not isinstance(data, str | os.PathLike):
        raise PhregError(
            f"asked to evaluate on data of type {type(data).__name__}, expected the path of one folder, or "
            "the id of a dataset; put links to all into one folder"
        )


def _check_folder(folder: Path) -> None:
    """Checks that a folder can be written to, or made, before anything is done that would be lost."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "may not be written to" if there.is_dir() else "is no folder"
        raise PhregError(
            f"asked to write to {folder}, and {there} {found}; choose another --output or --cache"
        )


def _usable(device: str | torch.device | None, *, for_weights: bool = False) -> torch.device:
    """Finds the device to run on, or only to hold weights on; None means a GPU where there is one."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        usable = torch.device(name)
        probe = torch.zeros(1, device=usable)
        if not for_weights:
            probe.item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        reason = str(error).partition("\n")[0]
        raise PhregError(
            f"asked to run on device '{name}', which cannot be used here: {reason}; leave --device out, or "
            "give cpu, cuda, cuda:1 or mps, whichever there is"
        ) from error
    return usable


def _named(models: Sequence[Model], instance: str = "instance") -> dict[str, Model]:
    """Names models for tables: as the user does, or `instance 2`."""
    return {
        f"{instance} {number}" if isinstance(model, nn.Module) else os.fspath(model): model
        for number, model in enumerate(models, start=1)
    }


def _short(named: dict[str, Any]) -> dict[str, Any]:
    """Calls local folders by their last part, as far as that tells them apart."""
    short = {name: display_name(name) for name in named}
    if len(set(short.values())) < len(named):
        return named
    return {short[name]: model for name, model in named.items()}


def _look(
    name: str,
    model: Model,
    images: ImagesPath | Tensor,
    size: int | tuple[int, int] | None,
    count: int,
    labels: ImagesPath | None,
    texts: Sequence[str],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    device: str | None,
    observe: Progress,
) -> Inspection:
    """Looks at one of the models that `inspect` was asked about."""
    backbone = open_model(model, mean=mean, std=std)[0]
    with unchanged(*([backbone] if isinstance(model, nn.Module) else [])):
        if device is not None or not isinstance(model, nn.Module):
            backbone.to(_usable(device))
        return _look_at(backbone.eval(), name, images, size, count, labels, texts, observe)


def _look_at(
    backbone: Backbone,
    name: str,
    images: ImagesPath | Tensor,
    size: int | tuple[int, int] | None,
    count: int,
    labels: ImagesPath | None,
    texts: Sequence[str],
    observe: Progress,
) -> Inspection:
    """Looks at an opened model, where it is."""
    if isinstance(images, str | os.PathLike):
        size = backbone.image_size(size)
        chosen = subsample(open_images(images), count)
        looked_at, resampled = list(centre_crops(backbone, chosen, size)), larger(backbone, chosen)
    else:
        images = _checked(backbone, images)
        size = (images.shape[-2], images.shape[-1])
        looked_at = list(images.split(MEASURED_AT_ONCE))
        resampled = looked_at[:1] if size != backbone.spec.input_size else []
    return look(
        backbone,
        name,
        looked_at,
        resampled=resampled,
        labelled=read_labelled(backbone, os.fspath(labels), size) if labels is not None else None,
        queries=texts,
        observe=observe,
    )


def _checked(backbone: Backbone, images: Any) -> Tensor:
    """Gives a batch of normalised images as the model takes it; refuses anything else."""
    if isinstance(images, Tensor):
        fits = images.dim() == 4 and images.shape[1] == 3 and images.is_floating_point()
        found = f"a tensor of shape {tuple(images.shape)} and {images.dtype}"
    else:
        fits, found = False, type(images).__name__
    if not fits:
        raise DataError(
            "asked to read images: expected a normalised float tensor (batch, 3, height, width), found "
            f"{found}; normalise with mean {backbone.spec.mean} and standard deviation {backbone.spec.std}"
        )
    backbone.check_size((images.shape[-2], images.shape[-1]))
    return images.to(backbone.device, backbone.dtype)


def _views(settings: dict[str, Any]) -> ViewsConfig:
    given = {f"views.{key}": value for key, value in settings.items()}
    current = configuration.with_current_names(given, source="views")
    return configuration.validate(current, source="views").views
