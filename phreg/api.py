"""The public verbs, each put together from the modules of the method.

    distill   resolve ► load ► add registers ► train ► compare ► adapter, card, report
    load      adapter ► base ► patched model of its ordinary class

How anything is done is told in the module that does it; here is only the order.
"""

import copy
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg import config as configuration
from phreg import demo, exports
from phreg.analysis.norms import NormReport, outliers
from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import Base, adapt, weights_sha256
from phreg.backbones.saved import load_patched
from phreg.checkpoint import (
    SAVED_FORMAT,
    RunFolder,
    apply_adapter,
    read_adapter,
    save_adapter,
    start_run,
    write_text,
)
from phreg.config import DataConfig, DistillConfig, ViewsConfig
from phreg.data import BrokenImages, Crops, holdout, normalise
from phreg.errors import ConfigError, DataError, LoadError, PhregError
from phreg.evaluation.retrofit import Comparison, compare
from phreg.exports import Equality
from phreg.images import ImageSource, Subset, open_images
from phreg.model_card import model_card
from phreg.registers import add_registers
from phreg.report import figures
from phreg.report.html import comparison_page, inspection_page, write_report
from phreg.seeding import keyed_generator
from phreg.teacher import Teacher
from phreg.trainer import Outcome, StepRecord, start_accelerator, train
from phreg.views import count_different

Model = str | os.PathLike[str] | nn.Module
Images = str | os.PathLike[str]
Observer = Callable[[StepRecord, int], None]

MEASURED_AT_ONCE = 8
"""Images per forward outside of training."""


@dataclass(frozen=True, eq=False)
class Distilled:
    """What `distill` made.

    Attributes:
        model: The patched model, of its ordinary class, in eval mode.
        run: Its run folder.
        outcome: Steps, images, seconds and skipped files.
        comparison: The before/after figures; None where measuring was switched off, and on other processes.
        main_process: Whether this is the process that writes, of the many there may be.
    """

    model: nn.Module
    run: Path
    outcome: Outcome
    comparison: Comparison | None
    main_process: bool


def distill(
    model: Model | None = None,
    images: Images | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    recipe: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observe: Observer | None = None,
    **settings: Any,
) -> Distilled:
    """Retrofits registers onto a model by self-distillation.

    Args:
        model: A hub id, a timm or open_clip name, a folder, or an instance, which is then patched in place.
            This and the next two may come from the recipe instead.
        images: A folder, a text file of paths, tar shards, or a Hugging Face dataset.
        output: Run folder to write: recipe.toml, log.jsonl, state/, model/, report/.
        recipe: Name of a shipped recipe, or path of a TOML file.
        resume: Go on with the run in `output`; settings that are not given again stay as they were.
        observe: Called with each step's record and the number of steps.
        settings: Any setting of `DistillConfig`, dotted keys as nested dictionaries:
            `method="paper", optim={"lr": 1e-3}`.

    Raises:
        PhregError: Anything asked for does not exist or does not fit; see its subclasses.
    """
    asked = {
        "model": "instance" if isinstance(model, nn.Module) else model,
        "images": images,
        "output": output,
    }
    given = {key: os.fspath(value) for key, value in asked.items() if value is not None} | settings
    if resume and recipe is None and output is not None and RunFolder(Path(output)).recipe.is_file():
        recipe = RunFolder(Path(output)).recipe  # what is not said again stays as it was
    # Now, so that a typo costs no download; and once more when it is known whether the model is CLIP-type.
    early = configuration.resolve(recipe, given)
    missing = [key for key in asked if getattr(early, key) is None]
    if missing:
        raise ConfigError(
            "settings", [f"{key}: not given; name it by flag, argument or recipe" for key in missing]
        )
    source = open_images(early.images or "", split=early.data.split, column=early.data.image_column)
    student, base = open_model(model if isinstance(model, nn.Module) else early.model or "", early.revision)
    if student.num_registers:
        raise PhregError(
            f"{early.model} has {student.num_registers} registers from phreg already; "
            f"distil what it was made from: {base.source}"
        )
    config = configuration.resolve(recipe, given, clip=student.projection is not None)
    side = config.size or student.spec.input_size[0]
    config = config.model_copy(update={"size": side})
    student.check_size((side, side))

    run = RunFolder(Path(config.output or ""))
    accelerator = start_accelerator(config, run)
    if accelerator.is_main_process:
        start_run(run.path, config, resume=resume)
    accelerator.wait_for_everyone()

    student.requires_grad_(False).eval().to(accelerator.device)
    original = copy.deepcopy(student)
    if config.target.native_size:
        student.set_input_size((side, side))
    add_registers(student, config.registers, config.register_init, config.seed)
    set_readout(original, config.target.teacher_readout)
    set_readout(student, config.target.student_readout)
    bf16 = accelerator.mixed_precision == "bf16"
    teacher = Teacher(original, config.views, config.target, bf16=bf16)
    kept, measured, held_out = _split(source, config)
    crops = Crops(kept, side, config.seed)
    outcome = train(student, teacher, crops, config, run, accelerator, observe or (lambda *_: None))

    comparison = None
    if accelerator.is_main_process:
        looked_at = list(batches(student, measured, side))
        if looked_at:
            comparison = _compare(original, student, looked_at, config, base, held_out=held_out)
        set_readout(original, "plain")
        set_readout(student, "plain")
        photos = _photos(student, looked_at) if looked_at else []
        _save(run, student, original, base, config, outcome, comparison, photos)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Distilled(student.model, run.path, outcome, comparison, accelerator.is_main_process)


def quickstart(
    output: str | os.PathLike[str] = "runs/quickstart", *, observe: Observer | None = None
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
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Loads a patched model: an ordinary model of its library's class, registers inside, in eval mode.

    Args:
        path: A run, an adapter folder, the hub id of an adapter, or what a patched transformers model's own
            `save_pretrained` wrote.
        revision: Hub commit, branch or tag of the adapter.
        into: The base model, where it is at hand already; it is patched in place. None finds it again.
        device: Where to put the model.

    Raises:
        LoadError: There is no adapter, its base cannot be found, or its base's weights are others.
    """
    found = resolve.locate(path, revision)
    if found.library is not None:
        raise LoadError(
            f"asked for the patched model in {path}, which is a {found.library} model without registers of "
            f"phreg; load it with {found.library}"
        )
    return _open_adapter(found.folder, into)[0].model.to(device)


def export(
    model: Model, path: str | os.PathLike[str], *, format: str, revision: str | None = None
) -> list[Equality]:
    """Writes a patched model as a folder that its format's own library loads, and checks that it does.

    Args:
        model: A run, an adapter, or a patched model instance.
        path: Folder to write; it must not hold anything.
        format: `timm` (timm models), `transformers` (DINOv2, as DINOv2 with registers), `remote-code` (any
            model of transformers, with the code to load it), `onnx`, `merged` (for `phreg.load` without the
            base) or `adapter` (for `phreg.load` with it).
        revision: Hub commit, branch or tag of the adapter.

    Returns:
        How equal the written model is at its own size and at others, as measured on loading it back.

    Raises:
        PhregError: The format cannot carry this model; the message names those that can.
    """
    readout = None  # an instance keeps the one that it has
    if not isinstance(model, nn.Module) and os.fspath(model) != "demo":
        found = resolve.locate(model, revision)
        readout = "plain" if found.library else read_adapter(found.folder).get("readout", "plain")
        if readout != "plain" and format not in exports.CARRY_READOUT:
            raise PhregError(
                f"asked to export {model} as {format}, but its dense features are read by {readout}, which "
                f"no stock class knows; export it as {' or '.join(sorted(exports.CARRY_READOUT))}"
            )
    backbone, base = open_model(model, revision)
    if readout is not None:
        set_readout(backbone, readout)
    return exports.export(backbone, Path(path), format, base=base)


def denoise(
    model: nn.Module, images: Float[Tensor, "batch 3 height width"], *, seed: int = 0, **views: Any
) -> Float[Tensor, "batch rows cols dim"]:
    """Reads a model's patch features averaged over moved views: the teacher alone, without any training.

    Args:
        model: Any supported model, in eval mode; it is not changed.
        images: Normalised images on the model's device, sides a multiple of the patch size.
        seed: Seed of the views.
        views: Settings of `ViewsConfig`, such as `count=10`.

    Returns:
        Features after the final norm, in fp32.
    """
    backbone = adapt(model)
    _check_images(backbone, images)
    return Teacher(backbone, _views(views))(images, keyed_generator("views", seed)).patches


def inspect(
    model: Model,
    images: Images | Float[Tensor, "batch 3 height width"],
    *,
    output: str | os.PathLike[str] | None = None,
    size: int | None = None,
    count: int = 64,
) -> NormReport:
    """Looks for artifacts: patch tokens whose norm lies beyond the gap in the model's own distribution.

    Args:
        model: A model in any form that `distill` takes, a run, or an adapter.
        images: Where images are, or a batch of normalised ones.
        output: Folder to write inspect.json, report.html and pictures to; None writes nothing.
        size: Image side in pixels; None means the model's own.
        count: Images to look at, spread evenly over those there are.

    Raises:
        PhregError: The model or the images cannot be read.
    """
    backbone, base = open_model(model)
    backbone.eval()
    if not isinstance(images, str | os.PathLike):
        _check_images(backbone, images)
        looked_at = list(images.to(backbone.device).split(MEASURED_AT_ONCE))
    else:
        side = size or backbone.spec.input_size[0]
        backbone.check_size((side, side))
        looked_at = list(batches(backbone, _spread(open_images(images), count), side))
    report = outliers(backbone, looked_at)
    if output is not None:
        _write_inspection(Path(output), base.source, backbone, looked_at, report)
    return report


def open_model(source: Model, revision: str | None = None) -> tuple[Backbone, Base]:
    """Opens whatever a user may call a model, patched ones included, in eval mode.

    Args:
        source: A model in any form, `demo`, a run, or an adapter.
        revision: Hub commit, branch or tag.

    Raises:
        LoadError: It cannot be found, fetched or trusted.
        UnsupportedModelError: phreg cannot patch it.
    """
    if isinstance(source, nn.Module):
        return resolve.load(source)
    if os.fspath(source) == "demo":
        backbone = adapt(demo.demo_model())
        return backbone, Base("demo", backbone.spec.library, None, weights_sha256(backbone.disk_state()))
    found = resolve.locate(source, revision)
    if found.library is None:
        return _open_adapter(found.folder, None)
    backbone, base = resolve.load(found)
    backbone.eval()
    return backbone, base


def _open_adapter(folder: Path, into: nn.Module | None) -> tuple[Backbone, Base]:
    description = read_adapter(folder)
    if description["format"] == SAVED_FORMAT:
        backbone = load_patched(folder)
        return backbone, Base(str(folder), backbone.spec.library, None, weights_sha256(backbone.disk_state()))
    base = Base(**description["base"])
    if into is None and base.source == "instance":
        raise LoadError(
            f"the adapter in {folder} was made from a model instance, which cannot be found again; "
            "build that model and pass it: phreg.load(path, into=model), which phreg.export takes too"
        )
    backbone = adapt(into) if into is not None else open_model(base.source, base.revision)[0]
    apply_adapter(folder, backbone)
    backbone.eval()
    return backbone, base


def batches(
    backbone: Backbone, source: ImageSource, size: int
) -> Iterator[Float[Tensor, "batch 3 size size"]]:
    """Reads images for measuring: centre crops, normalised for a model, on its device.

    Unreadable images are left out and warned of; too many stop it, as in training.
    """
    crops = Crops(source, size, crop="centre")
    broken = BrokenImages(len(source), DataConfig().max_broken)
    readable: list[Tensor] = []
    for index in range(len(source)):
        image = crops.batch([(0, index)])
        broken.add(image)
        if not image.skipped:
            readable.append(image.images)
        if readable and (len(readable) == MEASURED_AT_ONCE or index + 1 == len(source)):
            pixels = torch.cat(readable).to(backbone.device)
            readable = []
            yield normalise(pixels, backbone.spec.mean, backbone.spec.std)


def _check_images(backbone: Backbone, images: Any) -> None:
    """Refuses what is no batch of normalised images, before it fails somewhere inside."""
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


def _views(settings: dict[str, Any]) -> ViewsConfig:
    checked = configuration.validate(
        {f"views.{key}": value for key, value in settings.items()}, source="views"
    )
    return checked.views


def _split(source: ImageSource, config: DistillConfig) -> tuple[ImageSource, ImageSource, bool]:
    """Images to train on, to measure on, and whether they are kept apart: fewer than 5 serve as both."""
    count = config.measure.images
    if config.measure.source is not None:
        return source, _spread(open_images(config.measure.source), count), True
    train_on, measure_on = holdout(len(source), count)
    if measure_on:
        return Subset(source, train_on), Subset(source, measure_on), True
    return source, _spread(source, count), not count


def _spread(source: ImageSource, count: int) -> ImageSource:
    """Takes up to so many images, spread evenly over those there are."""
    return Subset(source, range(0, len(source), max(1, len(source) // max(1, count)))[:count])


def _compare(
    original: Backbone,
    student: Backbone,
    looked_at: Sequence[Tensor],
    config: DistillConfig,
    base: Base,
    *,
    held_out: bool,
) -> Comparison:
    grid = (
        looked_at[0].shape[-2] // student.spec.patch_size[0],
        looked_at[0].shape[-1] // student.spec.patch_size[1],
    )
    count = min(config.measure.views, count_different(config.views, grid) or config.measure.views)
    many = config.views.model_copy(update={"count": count, "sampler": "uniform"})
    teacher = Teacher(original, many, config.target)
    known = base.source == "demo"

    def reference(images: Tensor, number: int) -> Tensor:
        if known:
            return demo.truth(images)
        return teacher(images, keyed_generator("reference", config.seed, number)).patches

    described = "the known truth" if known else f"the original averaged over {many.count} views"
    return compare(
        original, student, looked_at, reference, config.target, described=described, held_out=held_out
    )


def _save(
    run: RunFolder,
    student: Backbone,
    original: Backbone,
    base: Base,
    config: DistillConfig,
    outcome: Outcome,
    comparison: Comparison | None,
    photos: Sequence[Any],
) -> None:
    record = {
        "size": config.size,
        "readout": config.target.student_readout,
        "recipe": config.model_dump(mode="json", exclude_none=True),
        "outcome": asdict(outcome),
        "figures": comparison.to_json() if comparison else None,
    }
    card = model_card(student, base, record, comparison.rows() if comparison else [])
    save_adapter(run.model, student, base, original.disk_state(), record, card)
    if comparison:
        run.report.mkdir(exist_ok=True)
        title = f"{base.source}, before and after {config.registers} registers"
        write_report(run.report / "report.html", comparison_page(title, comparison, photos))
        write_text(run.report / "figures.json", json.dumps(comparison.to_json(), indent=2))


@torch.no_grad()
def _write_inspection(
    folder: Path, name: str, backbone: Backbone, looked_at: Sequence[Tensor], report: NormReport
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "inspect.json", json.dumps({"model": name} | report.to_json(), indent=2))
    photos = _photos(backbone, looked_at)
    features = torch.cat([backbone(images).patches.float().cpu() for images in looked_at[: len(report.maps)]])
    write_report(folder / "report.html", inspection_page(name, report, photos, features[: len(report.maps)]))
    figures.save_png(folder / "positions.png", figures.position_map(report.position_histogram))
    figures.save_png(folder / "norms.png", figures.norm_quantiles(report))
    low, high = report.maps.min().item(), report.maps[:, report.focus].max().item()
    for number, norms in enumerate(report.maps[:, report.focus], start=1):
        figures.save_png(folder / f"norms-{number:02}.png", figures.norm_map(norms, low, high))


def _photos(backbone: Backbone, looked_at: Sequence[Tensor], count: int = 8) -> list[Any]:
    """The first images as they look, 8-bit RGB."""
    first = torch.cat(list(looked_at[:count]))[:count].cpu()
    return [figures.photo(image, backbone.spec.mean, backbone.spec.std) for image in first]
