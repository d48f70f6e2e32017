"""What an evaluation found, as a record: figures with their spread, and all that is needed to repeat it.

A task makes one `Metrics` a seed. `summarise` joins those of a model into a `Record`; a `Results` holds the
records of several models and sets them against a baseline, or against the first.

    Metrics of seed 0, 1, 2 ──summarise──► Record (mean, spread) ┐
                              of each model                      ├─► Results ──► results.json, results.md
                                                      baseline ──┘

`results.json` has the first model's figures at the top (`miou`, `top1`, …), all records under `models`.
"""

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from phreg import __version__
from phreg.errors import GateError, PhregError
from phreg.record import LIBRARIES
from phreg.storage import write_text, writing

LOWER_IS_BETTER = frozenset(
    {"rmse", "artifact_rmse", "abs_rel", "log10", "outlier_rate", "artifact_seeds", "lost_top1", "lost_miou"}
)
"""Figures of which less is better; of all others more is."""

RESULTS, TABLE, MAPS = "results.json", "results.md", "maps.png"
"""Files that results are written to."""

ADVICE = (
    "free space and run the same again, which takes up single runs that are done, or give another --output"
)
"""What to do where the disk does not take results."""

IN_UNITS = frozenset({"rmse", "artifact_rmse", "abs_rel", "log10", "pearson"})
"""Figures that are no shares; tables show all others in per cent."""


Counts = Mapping[str, Mapping[str, int]]
"""What figures were computed over: how many of each unit, such as pixels, images and classes, by figure."""


@dataclass(frozen=True)
class Metrics:
    """What a task measured with one seed.

    Attributes:
        figures: Headline first, by short name (`miou`, `top1`); shares are fractions of 1.
        detail: Figures of single classes or parts, e.g. `{"iou": {"road": 0.9}}`.
        notes: Anything else worth recording, as JSON holds it, e.g. a sweep, or how many images there were.
        guarded: Figures that a gate guards beside the headline.
        counts: What each figure was computed over, e.g. `{"miou": {"pixels": 9, "images": 2, "classes": 2}}`.

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

    def __post_init__(self) -> None:
        """Checks that counts tell of every figure, and that none is of nothing."""
        for name in self.figures if self.counts else ():
            over = self.counts.get(name)
            if not over or not all(over.values()):
                found = _amounts([over]) if over else "no counts"
                raise PhregError(
                    f"{name} asked for, found {found} to compute it over; give data that has some of each"
                )


@dataclass(frozen=True)
class Summary:
    """One figure over seeds.

    Attributes:
        mean: Mean over seeds.
        spread: Standard deviation over seeds (n - 1); None of a single one.
        values: The figure of each seed.
    """

    mean: float
    spread: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Summary":
        """Sums up the values of several seeds."""
        spread = None
        if len(values) > 1:  # a figure without a value is NaN, which `statistics` refuses
            spread = math.nan if any(map(math.isnan, values)) else statistics.stdev(values)
        return cls(statistics.fmean(values), spread, tuple(values))


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

    @property
    def sweep(self) -> list[str]:
        """What each combination reached, a line each, where the task tried several (its note `sweep`)."""
        swept = str(self.notes[0].get("sweep", ""))
        return [
            f"{swept} {_figure(swept, found)} with {part}"
            for part, found in self.detail.get(swept, {}).items()
        ]

    def to_json(self) -> dict[str, Any]:
        """The record as JSON holds it; NaN, which JSON does not know, becomes null."""
        return _without_nan(asdict(self))


@dataclass(frozen=True)
class Difference:
    """A figure of a model against that of the one it is set against, seed by seed.

    Attributes:
        change: Mean of what the model has more than the other with the same seed.
        spread: Standard deviation of that over seeds (n - 1); None of a single one.
        better: Whether the change is an improvement.
        beyond_spread: Whether it is larger than its spread; None where there was one seed only.
    """

    change: float
    spread: float | None
    better: bool
    beyond_spread: bool | None


@dataclass(frozen=True)
class Results:
    """Several models in one task, side by side.

    Attributes:
        records: One a model, in the order given.
        baseline: The model that the others are set against, and measured at whose artifacts; None without.
        first: The model that the others are set against where there is no baseline; None without.
    """

    records: tuple[Record, ...]
    baseline: Record | None = None
    first: Record | None = None

    def __getitem__(self, figure: str) -> float:
        """Looks up a figure of the first model: `results["miou"]`."""
        return self.records[0].figures[figure].mean

    @property
    def against(self) -> Record | None:
        """The model that the others are set against."""
        return self.baseline or self.first

    def differences(self, record: Record) -> dict[str, Difference]:
        """Sets a model's figures against the baseline's, or the first's, with the seeds both have."""
        against = self.against
        if against is None:
            return {}
        theirs = against.figures
        pairs = [
            (place, against.seeds.index(seed))
            for place, seed in enumerate(record.seeds)
            if seed in against.seeds
        ]
        return {
            name: _difference(name, [found.values[ours] - theirs[name].values[base] for ours, base in pairs])
            for name, found in record.figures.items()
            if name in theirs and pairs
        }

    def check_gate(self, limit: float) -> None:
        """Checks that no guarded figure of any model fell behind the baseline's by more than a limit.

        Args:
            limit: Largest drop allowed, in each figure's own unit (0.01 is one point of a share).

        Raises:
            GateError: A model fell behind.
            PhregError: There is no baseline.
        """
        if self.baseline is None:
            raise PhregError("--gate asked for without a model to compare with; give --baseline MODEL")
        problems = []
        for record in self.records:
            differences = self.differences(record)
            for name in record.guarded:
                change = differences[name].change
                drop = change if name in LOWER_IS_BETTER else -change
                if not drop <= limit:  # a NaN does not pass
                    problems.append(
                        f"{record.model}: {name} {record.figures[name].mean:.4f}, the baseline's is "
                        f"{self.baseline.figures[name].mean:.4f}"
                    )
        if problems:
            raise GateError(
                f"gate: asked for a drop of at most {limit:g}, found {len(problems)} larger: "
                f"{'; '.join(problems)}. Train less, guard the global output more if the figure is one of it "
                "(--loss.pooled of phreg distill), or raise --gate",
                self,
            )

    def to_json(self) -> dict[str, Any]:
        """The first model's figures at the top, every record, and differences between them."""
        first = self.records[0]
        top = {name: summary.mean for name, summary in first.figures.items()}
        return _without_nan(
            top
            | {
                "task": first.task,
                "data": first.data,
                "counts": first.counts[0] if first.counts else {},
                "models": [record.to_json() for record in self.records],
                "baseline": self.baseline.to_json() if self.baseline else None,
                "against": self.against.model if self.against else None,
                "differences": [
                    {name: asdict(found) for name, found in self.differences(record).items()}
                    for record in self.records
                ]
                if self.against
                else None,
            }
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table: its heading, and a row a model, the baseline first."""
        names = list(self.records[0].figures)
        rows = [[f"{record.model}{note}", *self._cells(record)] for record, note in self._labelled()]
        return ["model", *names], rows

    def to_markdown(self) -> str:
        """The table in Markdown, the figures of single classes, and how to read them under it."""
        heading, rows = self.rows()
        blocks = [_table(heading, rows)]
        for kind in self.records[0].detail:
            labelled = [record for record, _ in self._labelled()]
            parts = list(labelled[0].detail.get(kind, {}))
            rows = [
                [part, *(_figure(unit, record.detail[kind].get(part)) for record in labelled)]
                for part, unit in ((part, part if part in IN_UNITS else kind) for part in parts)
            ]
            blocks.append(_table([kind, *(record.model for record in labelled)], rows))
        read = {record.model: record.notes[0].get("readout", "plain") for record, _ in self._labelled()}
        if set(read.values()) != {"plain"}:
            ways = ", ".join(f"{model} {readout}" for model, readout in read.items())
            blocks.append(f"Read-out of the last block: {ways}.")
        first = self.records[0]
        blocks.append(f"{first.task} on {first.data}, {self.legend()}")
        return "\n\n".join(blocks) + "\n"

    def legend(self) -> str:
        """Says how to read the table, and over what its figures were computed."""
        first, against = self.records[0], self.against
        several = len(first.seeds) > 1
        parts = [f"{len(first.seeds)} seed{'s' if several else ''}"]
        if not first.drawn:
            parts = ["one run, which stands for every seed, as nothing is drawn"]
        if several:
            parts.append("± is the standard deviation over seeds (n - 1)")
        if against is not None and len(self._labelled()) > 1:
            whose = "the baseline" if against is self.baseline else against.model
            spread = ", seed by seed, ~ where it is within its spread" if several else ""
            parts.append(f"in brackets the difference to {whose}{spread}")
        sentences = ["; ".join(parts), "Shares are in per cent", *self._computed_over(), *self._left_out()]
        return " ".join(f"{sentence}." for sentence in sentences)

    def write(self, folder: Path) -> None:
        """Writes `RESULTS` and `TABLE`, each at once.

        Raises:
            PhregError: The folder cannot be written.
        """
        with writing(folder, ADVICE):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / RESULTS, json.dumps(self.to_json(), indent=2))
            write_text(folder / TABLE, self.to_markdown())

    def _computed_over(self) -> list[str]:
        """Says over how much figures were computed, those over the same together."""
        groups: dict[str, list[str]] = {}
        runs = [run for record, _ in self._labelled() for run in record.counts]
        for name in self.records[0].figures:
            found = [run[name] for run in runs if name in run]
            if found:
                groups.setdefault(_amounts(found), []).append(name)
        if len(groups) < 2:
            return [f"Computed over {text}" for text in groups]
        told = "; ".join(f"{', '.join(names)} over {text}" for text, names in groups.items())
        return [f"Computed: {told}"]

    def _left_out(self) -> list[str]:
        """Says which figures some model has not, and why."""
        notes = [note.get("left_out", {}) for record, _ in self._labelled() for note in record.notes]
        reasons = {name: reason for note in notes for name, reason in note.items()}
        told = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        return [f"Left out: {told}"] if told else []

    def _labelled(self) -> list[tuple[Record, str]]:
        ahead = [(self.baseline, " (baseline)")] if self.baseline else []
        return [*ahead, *((record, "") for record in self.records if record is not self.baseline)]

    def _cells(self, record: Record) -> list[str]:
        differences = {} if record is self.against else self.differences(record)
        cells = []
        for name in self.records[0].figures:
            cell = _figure(name, record.figures.get(name))
            found = differences.get(name)
            if found is not None and not math.isnan(found.change):
                mark = "~" if found.beyond_spread is False else ""
                cell += f" ({_shown(name, found.change, found.spread, '+')}{mark})"
            cells.append(cell)
        return cells


def summarise(runs: Sequence[Metrics], **facts: Any) -> Record:
    """Joins what a task measured with several seeds into one record.

    Args:
        runs: One a seed, in the order of `seeds`.
        facts: The record's other fields.
    """
    figures = {name: Summary.of([run.figures[name] for run in runs]) for name in runs[0].figures}
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
        **facts,
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


def _difference(name: str, pairs: Sequence[float]) -> Difference:
    found = Summary.of(pairs)
    return Difference(
        change=found.mean,
        spread=found.spread,
        better=found.mean < 0 if name in LOWER_IS_BETTER else found.mean > 0,
        beyond_spread=None if found.spread is None else abs(found.mean) > found.spread,
    )


def _amounts(found: Sequence[Mapping[str, int]]) -> str:
    """Writes how much figures were computed over: `2 images, 3 to 5 classes`."""
    texts = []
    for unit in found[0]:
        amounts = [over[unit] for over in found if unit in over]
        low, high = min(amounts), max(amounts)
        if high == 1:
            unit = unit.removesuffix("es" if unit.endswith(("sses", "xes", "ches")) else "s")
        texts.append(f"{low:,} {unit}" if low == high else f"{low:,} to {high:,} {unit}")
    return ", ".join(texts)


def _figure(name: str, summary: Summary | None) -> str:
    if summary is None or math.isnan(summary.mean):
        return "-"
    return _shown(name, summary.mean, summary.spread)


def _shown(name: str, mean: float, spread: float | None, sign: str = "") -> str:
    """Writes a figure, or with the sign `+` a difference of figures, with its spread."""
    scale, digits = (1, 4) if name in IN_UNITS else (100, 2)
    beside = "" if spread is None else f" ± {scale * spread:.{digits}f}"
    return f"{scale * mean:{sign}.{digits}f}{beside}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _without_nan(value: Any) -> Any:
    match value:
        case float():
            return None if math.isnan(value) else value
        case Mapping():
            return {key: _without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
        case _:
            return value
