"""Compares models in a task; the tasks stand in `phreg.evaluation.tasks`."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import nn

from phreg import config as configuration
from phreg.api.arguments import ImagesPath, check_folder, named_models, short_names, usable_device
from phreg.backbones.base import Backbone
from phreg.deprecated import accept_old_arguments
from phreg.errors import PhregError
from phreg.evaluation.feature_cache import GIGABYTE, FeatureCache
from phreg.evaluation.processes import Processes, launched_processes
from phreg.evaluation.read_ahead import default_workers
from phreg.evaluation.results import MAPS, Results
from phreg.evaluation.runner import Running, Suite, compare_models
from phreg.evaluation.tasks.table import resolve_settings
from phreg.formats.load import Model, open_model
from phreg.progress import ProgressListener, told_to
from phreg.report.examples import write_examples
from phreg.rollback import unchanged
from phreg.settings import build


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
    workers: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    cache_limit: float = 20.0,
    observe: ProgressListener | None = None,
    **settings: Any,
) -> Results:
    """Compares models in a task: see `phreg.evaluation.tasks.table.TASKS`.

    Under `accelerate launch` or torchrun, all processes share the reading of pictures, the main one writes,
    and each has the results.

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
        workers: Threads that decode pictures; None means the cores there are, at most 8.
        cache: Folder that keeps features; None means `output/features`.
        cache_limit: Gigabytes it may take.
        observe: Called with the progress: the name of the work, how much is done, and how much there is.
        settings: Any setting of the task: `neighbours=10, reading={"size": 448}`.

    Raises:
        MaxDropError: A figure dropped by more than `max_drop`. The results are written; the error holds them.
        PhregError: Anything asked for does not exist or does not fit, or the output holds other results.
    """
    checked = resolve_settings(task, settings, protocol)
    workers = default_workers() if workers is None else workers
    _check_amounts(
        seeds=seeds, batch_size=batch_size, workers=workers, max_drop=max_drop, cache_limit=cache_limit
    )
    _check_asked(models, baseline, data, max_drop, (output, cache))
    named, against = _side_by_side(models, baseline)
    with (
        launched_processes() as processes,
        _folder_for(output, processes) as folder,
        _unchanged(named),
        told_to(observe) if observe and processes.is_main else nullcontext(),
    ):
        running = Running(
            usable_device(device or processes.device()), batch_size, precision == "bf16", workers, processes
        )
        features = FeatureCache(Path(cache or folder / "features"), int(cache_limit * GIGABYTE), processes)
        runs = tuple(range(seed, seed + seeds))
        suite = Suite(
            task, os.fspath(data), checked, runs, folder, features, running, show=output is not None
        )
        opened = partial(_open_named, named, mean, std)
        results = compare_models(suite, list(named_models(models)), against, opened)
        processes.from_main(lambda: write_examples(folder / MAPS, short_names(results.examples)))
    results.check_max_drop(max_drop)
    return results


class _Amounts(configuration.Config):
    """The numbers that `evaluate` is given."""

    seeds: PositiveInt
    batch_size: PositiveInt
    workers: PositiveInt
    max_drop: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None
    cache_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _check_amounts(**amounts: Any) -> None:
    """Refuses numbers that make no sense."""
    build(_Amounts, amounts, source="evaluate")


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
            check_folder(Path(folder))


def _side_by_side(models: Sequence[Model], baseline: Model | None) -> tuple[dict[str, Model], str | None]:
    """Names the models and the baseline, which may be one of them; and tells the baseline's name."""
    named = named_models(models)
    if baseline is None:
        return named, None
    for name, model in named.items():
        if model is baseline or model == baseline:
            return named, name
    other = named_models([baseline], "baseline")
    return named | other, next(iter(other))


@contextmanager
def _folder_for(output: str | os.PathLike[str] | None, processes: Processes) -> Iterator[Path]:
    """Gives the folder to write to, one that is deleted afterwards where there is to be none."""
    with tempfile.TemporaryDirectory(prefix="phreg-") as temporary:
        yield Path(processes.from_main(lambda: temporary) if output is None else output)
        processes.wait()


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
