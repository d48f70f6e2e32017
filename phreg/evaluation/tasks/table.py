"""The tasks: what each is called, and the module that does it.

A task is a module of this package with

    DATA: str                                 what it needs, for `phreg tasks`
    TREE: str                                 how that lies on disk: a folder tree, at most 80 columns
    METRICS: Sequence[MetricSpec]             what it measures: unit, which way is better, heading in tables,
                                              and in a few words what it is
    class Settings(Config)                    every number it depends on, each with a default and a docstring
    PROTOCOLS: Mapping[str, Mapping]          named sets of settings, e.g. of a paper (optional)
    is_stochastic(data, settings) -> bool     whether the seed decides anything (optional: it does)
    run(reader, data, settings, seed) -> Metrics
    examples(reader, data, settings, seed, notes) -> Sequence[Example]
                                              what the model made of a few pictures (optional: no pictures)

`run` reads a model through the `FeatureReader` alone, draws from generators made of `seed` alone
(`phreg.seeding.keyed_generator`), tells `phreg.progress` how far it is, and puts its
headline figure first. `Metrics.counts` tells over how many pixels, images, classes or the like each figure
was computed; one that has nothing to be computed over is left out, with the reason in the note `left_out`,
and a headline over nothing is an error. A task that tries several things and reports the best names the
figure in a note `sweep`, and what each reached in the detail of that name. To add a task, write the module
and name it here.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from phreg.config import Config
from phreg.errors import ConfigError, PhregError
from phreg.evaluation.examples import Example
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.protocol import ProtocolSettings
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.settings import build, flatten

TASKS = {
    "classification": "phreg.evaluation.tasks.classification",
    "retrieval": "phreg.evaluation.tasks.retrieval",
    "linear-segmentation": "phreg.evaluation.tasks.linear_segmentation",
    "head-transfer": "phreg.evaluation.tasks.head_transfer",
    "linear-depth": "phreg.evaluation.tasks.linear_depth",
    "zero-shot-segmentation": "phreg.evaluation.tasks.zero_shot_segmentation",
    "anomaly-detection": "phreg.evaluation.tasks.anomaly_detection",
    "dense-nn": "phreg.evaluation.tasks.dense_nn",
    "video-propagation": "phreg.evaluation.tasks.video_propagation",
    "quantised": "phreg.evaluation.tasks.quantised",
    "consistency": "phreg.evaluation.tasks.consistency",
    "object-discovery": "phreg.evaluation.tasks.object_discovery",
}


@runtime_checkable
class Task(Protocol):
    """What a task's module offers."""

    DATA: str
    TREE: str
    METRICS: Sequence[MetricSpec]
    Settings: type[Config]

    def run(self, reader: FeatureReader, data: str, settings: Any, seed: int) -> Metrics:
        """Measures a model once."""
        ...


def find_task(name: str) -> Task:
    """Imports a task.

    Raises:
        PhregError: There is none of that name.
    """
    if name not in TASKS:
        raise PhregError(f"task {name!r} asked for; there are {', '.join(TASKS)}")
    return cast(Task, importlib.import_module(TASKS[name]))


def protocols(task: Task) -> Mapping[str, Mapping[str, Any]]:
    """Lists a task's named sets of settings."""
    return getattr(task, "PROTOCOLS", {})


def is_stochastic(name: str, data: str, settings: Config) -> bool:
    """Tells whether anything in a task depends on its seed, on these data with these settings.

    Raises:
        DataError: The data cannot be read.
        PhregError: There is no such task.
    """
    found = getattr(find_task(name), "is_stochastic", None)
    return True if found is None else found(data, settings)


def examples(
    name: str, reader: FeatureReader, data: str, settings: Config, seed: int, notes: Mapping[str, Any]
) -> Sequence[Example]:
    """Looks again at a few pictures of a task that has pictures to show; else there are none.

    Args:
        name: The task.
        reader: The model.
        data: As the task's `run` takes it, like the next two.
        settings: Of the task.
        seed: Of a run.
        notes: What that run noted.

    Raises:
        DataError: The data cannot be read.
        PhregError: There is no such task.
    """
    show = getattr(find_task(name), "examples", None)
    return () if show is None else show(reader, data, settings, seed, notes)


def resolve_settings(name: str, given: Mapping[str, Any], protocol: str | None = None) -> Config:
    """Builds the settings of a task: its defaults, what a protocol sets, and what is given on top.

    Args:
        name: The task.
        given: Settings by dotted key or nested; texts are understood, e.g. `"1e-3"` or `"knn,linear"`.
        protocol: Name of a set of settings; None means the defaults.

    Raises:
        ConfigError: Any setting is wrong; all problems are listed.
        PhregError: There is no such task.
    """
    task = find_task(name)
    known = protocols(task)
    if protocol is not None and protocol not in known:
        raise ConfigError(
            f"task {name}", [f"protocol: no protocol {protocol!r}; there are {', '.join(known) or 'none'}"]
        )
    # Whole, so that one number of a section leaves the section's other defaults as the task has them.
    defaults = flatten(task.Settings().model_dump())
    asked = {
        key: value.split(",") if isinstance(value, str) and isinstance(defaults.get(key), tuple) else value
        for key, value in flatten(given).items()
    }
    row = flatten(known.get(protocol or "", {}))
    as_published = defaults | row
    settings = build(task.Settings, as_published | asked, source=f"task {name}")
    if not isinstance(settings, ProtocolSettings):
        return settings
    if protocol is None:
        return settings.model_copy(update={"published": None})
    theirs = flatten(build(task.Settings, as_published, source=f"task {name}").model_dump())
    # Texts that a protocol does not name tell where data is, or what it is called.
    changed = [
        f"{key} is {value}"
        for key, value in flatten(settings.model_dump()).items()
        if theirs.get(key) != value and (key in row or not isinstance(value, str)) and key != "published"
    ]
    return settings.model_copy(
        update={"published": protocol, "differs": tuple(dict.fromkeys([*settings.differs, *changed]))}
    )
