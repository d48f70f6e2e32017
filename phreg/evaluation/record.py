"""What one model reached in a task, as a record: figures, their standard deviation, and how to repeat it.

A task declares each of its metrics by a `MetricSpec`, and makes one `Metrics` a seed. `summarise` joins those
of a model into a `Record`.

    MetricSpec of each metric ─┐
    Metrics of seed 0, 1, 2 ───┴─summarise──► Record (mean, std)
"""

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from phreg import __version__
from phreg.deprecated import current_attribute
from phreg.errors import PhregError
from phreg.evaluation.bootstrap import Interval, interval
from phreg.evaluation.examples import Example
from phreg.record import LIBRARIES
from phreg.short_table import ShortTable, shown_as_table

SHARE = "share"
"""Unit of a fraction of 1."""


@dataclass(frozen=True)
class MetricSpec:
    """What a task says of a metric, beside the code that computes it.

    Attributes:
        name: Short name, by which results hold its figures (`miou`, `top1`).
        unit: `SHARE`, which tables show in per cent, or any other, such as `m`, which they show as it is.
        better: Which way is better.
        label: Heading in tables; unset means the name.
        about: What it is, in a few words, for the line under a table.
    """

    name: str
    unit: str = SHARE
    better: Literal["higher", "lower"] = "higher"
    label: str | None = None
    about: str = ""

    @property
    def heading(self) -> str:
        """What tables call it."""
        return self.label or self.name

    @property
    def shown_unit(self) -> str:
        """The unit of what tables show: shares are in per cent."""
        return "%" if self.unit == SHARE else self.unit

    def sentence(self) -> str:
        """Says what the metric is, in which unit, and which way is better."""
        return f"{self.heading} ({self.shown_unit}, {self.better} is better): {self.about}."

    def drop(self, change: float) -> float:
        """Tells how much worse a figure is that changed by so much; negative where it is better."""
        return change if self.better == "lower" else -change

    def range_text(self, between: Interval | None, sign: str = "") -> str:
        """Writes an interval, or with the sign `+` that of a difference; none is a dash."""
        return "-" if between is None else " to ".join(self.text(end, None, sign) for end in between)

    def text(self, mean: float, std: float | None, sign: str = "") -> str:
        """Writes a figure, or with the sign `+` a difference, with its standard deviation; NaN is a dash."""
        if math.isnan(mean):
            return "-"
        scale, digits = (100, 2) if self.unit == SHARE else (1, 4)
        beside = "" if std is None else f" ± {scale * std:.{digits}f}"
        return f"{scale * mean:{sign}.{digits}f}{beside}"


Counts = Mapping[str, Mapping[str, int]]
"""What figures were computed over: how many of each unit, such as pixels, images and classes, by figure."""


SeedSamples = Float[np.ndarray, "seeds samples"]
"""A figure of each seed, in each sample of the pictures."""


@dataclass(frozen=True)
class Metrics:
    """What a task measured with one seed.

    Attributes:
        figures: Headline first, by short name (`miou`, `top1`); shares are fractions of 1.
        detail: Figures of single classes or parts, e.g. `{"iou": {"road": 0.9}}`.
        notes: Anything else worth recording, as JSON holds it, e.g. a sweep, or how many images there were.
        guarded: Figures that a gate guards beside the headline.
        counts: What each figure was computed over, e.g. `{"miou": {"pixels": 9, "images": 2, "classes": 2}}`.
        pictures: What tells the pictures tested on from others, by `phreg.evaluation.bootstrap`.
        resampled: Figures in each of its samples of the pictures, by name, where they have a share a picture.

    A figure that has nothing to be computed over is left out, and the note `left_out` says why:
    `{"pearson": "no map varies"}`.

    Raises:
        PhregError: Counts leave out a figure, or one was computed over nothing.
    """

    figures: Mapping[str, float]
    detail: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    guarded: Sequence[str] = ()
    counts: Counts = field(default_factory=dict)
    pictures: str = ""
    resampled: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks that counts tell of every figure, and that none is of nothing."""
        for name in self.figures if self.counts else ():
            over = self.counts.get(name)
            if not over or not all(over.values()):
                found = amounts([over]) if over else "no counts"
                raise PhregError(
                    f"{name} asked for, found {found} to compute it over; give data that has some of each"
                )


@dataclass(frozen=True)
class Summary:
    """One figure over seeds.

    Attributes:
        mean: Mean over seeds.
        std: Standard deviation over seeds (n - 1); None of a single one.
        values: The figure of each seed.
        interval: Between which `phreg.evaluation.bootstrap.LEVEL` of the samples of pictures lie; None where
            a picture has no share in the figure, or seeds differ in their pictures.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]
    interval: Interval | None = None

    @classmethod
    def of(cls, values: Sequence[float], interval: Interval | None = None) -> "Summary":
        """Sums up the values of several seeds."""
        std = None
        if len(values) > 1:  # a figure without a value is NaN, which `statistics` refuses
            std = math.nan if any(map(math.isnan, values)) else statistics.stdev(values)
        return cls(statistics.fmean(values), std, tuple(values), interval)

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold. Files keep the keys of version 0.1."""
        found: dict[str, Any] = {"mean": self.mean, "spread": self.std, "values": self.values}
        return found if self.interval is None else found | {"interval": self.interval}

    def __getattr__(self, name: str) -> Any:
        """Finds an attribute by its old name, with a warning."""
        if (new := current_attribute("phreg.evaluation.record.Summary", name)) is not None:
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


BESIDE = ("metrics", "examples", "decides", "resampled")
"""Fields of a `Record` that are not in JSON."""


@shown_as_table
@dataclass(frozen=True)
class Record:
    """What a model reached in a task.

    Attributes:
        task: Name of the task.
        model: What the user called the model.
        sha256: Of its weights, registers included.
        registers: Registers phreg added.
        data: Where the images are.
        settings: Every setting of the task, resolved.
        seeds: One run each; where nothing is drawn, one that stands for all.
        figures: By name, headline first.
        guarded: Names of those that a gate guards, headline first.
        detail: Figures of single classes or parts, by kind and name.
        notes: What else each seed's run recorded.
        versions: Of the libraries that matter.
        hardware: The machine, its device, its precision.
        seconds: Wall-clock seconds of all seeds.
        drawn: Whether a seed decides anything.
        counts: What each figure was computed over, by seed.
        digest: The same of all results that may stand in one table; see `phreg.evaluation.digest`.
        pictures: What tells the pictures tested on from others, by seed.
        metrics: What the task says of each metric, by name; like the next ones not in JSON.
        decides: What the digest is made of.
        resampled: Figures in samples of the pictures, where all seeds have the same pictures.
        examples: What the model made of a few pictures, where they are asked for and the task has some.
    """

    task: str
    model: str
    sha256: str
    registers: int
    data: str
    settings: Mapping[str, Any]
    seeds: tuple[int, ...]
    figures: Mapping[str, Summary]
    guarded: tuple[str, ...]
    detail: Mapping[str, Mapping[str, Summary]]
    notes: tuple[Mapping[str, Any], ...]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    seconds: float
    drawn: bool = True
    counts: tuple[Counts, ...] = ()
    digest: str = ""
    pictures: tuple[str, ...] = ()
    metrics: Mapping[str, MetricSpec] = field(default_factory=dict, repr=False)
    decides: Mapping[str, Any] = field(default_factory=dict, repr=False)
    resampled: Mapping[str, SeedSamples] = field(default_factory=dict, repr=False, compare=False)
    examples: Sequence[Example] = field(default=(), repr=False, compare=False)

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show: the figures."""
        rows = [
            (self.metrics[name].heading, self.text(name), self.metrics[name].shown_unit)
            for name in self.figures
        ]
        return ShortTable(f"{self.model}: {self.task} on {self.data}", rows, ("figure", "value", "unit"))

    def text(self, name: str) -> str:
        """Writes a figure for a table; one that is not there is a dash."""
        found = self.figures.get(name)
        return "-" if found is None else self.metrics[name].text(found.mean, found.std)

    def detail_text(self, kind: str, part: str) -> str:
        """Writes a figure of a class or part; either the kind of detail is a metric, or the part is."""
        found = self.detail[kind].get(part)
        spec = self.metrics.get(kind) or self.metrics[part]
        return "-" if found is None else spec.text(found.mean, found.std)

    @property
    def sweep(self) -> list[str]:
        """What each combination reached, a line each, where the task tried several (its note `sweep`)."""
        swept = str(self.notes[0].get("sweep", ""))
        return [f"{swept} {self.detail_text(swept, part)} with {part}" for part in self.detail.get(swept, {})]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON holds it; NaN, which JSON does not know, becomes null."""
        found = asdict(replace(self, metrics={}, examples=(), resampled={}))
        found["figures"] = {name: summary.to_json() for name, summary in self.figures.items()}
        found["detail"] = {
            kind: {part: summary.to_json() for part, summary in parts.items()}
            for kind, parts in self.detail.items()
        }
        return without_nan({name: value for name, value in found.items() if name not in BESIDE})


def summarise(runs: Sequence[Metrics], declared: Sequence[MetricSpec], **facts: Any) -> Record:
    """Joins what a task measured with several seeds into one record.

    Args:
        runs: One a seed, in the order of `seeds`.
        declared: The task's metrics.
        facts: The record's other fields.

    Raises:
        PhregError: The task measured what it does not declare.
    """
    specs = {spec.name: spec for spec in declared}
    _check_declared(runs[0], specs, facts["task"])
    resampled = _resampled(runs)
    figures = {
        name: Summary.of(
            [run.figures[name] for run in runs],
            interval(resampled[name].mean(0)) if name in resampled else None,
        )
        for name in runs[0].figures
    }
    detail = {
        kind: {part: Summary.of([run.detail[kind][part] for run in runs]) for part in parts}
        for kind, parts in runs[0].detail.items()
    }
    notes = tuple(dict(run.notes) for run in runs)
    guarded = tuple(dict.fromkeys([next(iter(figures)), *runs[0].guarded]))
    return Record(
        figures=figures,
        guarded=guarded,
        detail=detail,
        notes=notes,
        versions=versions(),
        counts=tuple(run.counts for run in runs if run.counts),
        pictures=tuple(run.pictures for run in runs),
        resampled=resampled,
        metrics=specs,
        **facts,
    )


def _resampled(runs: Sequence[Metrics]) -> dict[str, SeedSamples]:
    """Joins the seeds' figures in samples of the pictures; none where seeds were tested on other pictures."""
    if len({run.pictures for run in runs}) > 1:
        return {}
    return {name: np.array([run.resampled[name] for run in runs]) for name in runs[0].resampled}


def _check_declared(run: Metrics, specs: Mapping[str, MetricSpec], task: str) -> None:
    """Checks that every figure is a metric of the task, and of detail either the kind or all of its parts."""
    parts = [name for kind, found in run.detail.items() if kind not in specs for name in found]
    unknown = [name for name in dict.fromkeys([*run.figures, *parts]) if name not in specs]
    if unknown:
        raise PhregError(
            f"task {task} measured {', '.join(unknown)}, and declares {', '.join(specs) or 'no metric'}; add "
            "a MetricSpec of each to the METRICS of its module"
        )


def versions() -> dict[str, str]:
    """Lists the versions of Python, phreg and the libraries that models come from."""
    return {"phreg": __version__, "python": platform.python_version()} | {
        library: version(library) for library in LIBRARIES
    }


def hardware(device: torch.device, *, bf16: bool) -> dict[str, Any]:
    """Describes what the figures were computed on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": device.type,
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": "bf16" if bf16 else "fp32",
    }


def amounts(found: Sequence[Mapping[str, int]]) -> str:
    """Writes how much figures were computed over: `2 images, 3 to 5 classes`."""
    texts = []
    for unit in found[0]:
        numbers = [over[unit] for over in found if unit in over]
        low, high = min(numbers), max(numbers)
        if high == 1:
            unit = unit.removesuffix("es" if unit.endswith(("sses", "xes", "ches")) else "s")
        texts.append(f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}")
    return ", ".join(texts)


def without_nan(value: Any) -> Any:
    """Replaces NaN, which JSON does not know, by None, at all depths."""
    match value:
        case float():
            return None if math.isnan(value) else value
        case Mapping():
            return {key: without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [without_nan(item) for item in value]
        case _:
            return value
