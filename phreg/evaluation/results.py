"""What an evaluation found: the records of several models, set against a baseline or against the first.

    Metrics of seed 0, 1, 2 ──summarise──► Record (mean, std) ┐
                              of each model                      ├─► Results ──► results.json, results.md
                                                      baseline ──┘

`results.json` has the first model's figures at the top (`miou`, `top1`, …), all records under `models`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phreg.deprecated import current_attribute
from phreg.errors import MaxDropError, PhregError
from phreg.evaluation.bootstrap import LEVEL, RESAMPLES, SEED, Interval, interval
from phreg.evaluation.digest import differing
from phreg.evaluation.examples import Example
from phreg.evaluation.record import MetricSpec, Record, Summary, amounts, without_nan
from phreg.short_table import ShortTable, shown_as_table
from phreg.storage import write_text, writing

RESULTS, TABLE, MAPS = "results.json", "results.md", "maps.png"
"""Files that results are written to."""

ADVICE = (
    "free space and run the same again, which takes up single runs that are done, or give another --output"
)
"""What to do where the disk does not take results."""


@dataclass(frozen=True)
class Difference:
    """A figure of a model against that of the one it is set against, seed by seed.

    Attributes:
        change: Mean of what the model has more than the other with the same seed.
        std: Standard deviation of that over seeds (n - 1); None of a single one.
        better: Whether the change is an improvement.
        beyond_std: Whether it is larger than its standard deviation; None where there was one seed only.
        interval: Of the change in samples of the pictures, the same ones for both (a paired bootstrap); None
            where they were not measured on the same pictures.
    """

    change: float
    std: float | None
    better: bool
    beyond_std: bool | None
    interval: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold. Files keep the keys of version 0.1."""
        found: dict[str, Any] = {
            "change": self.change,
            "spread": self.std,
            "better": self.better,
            "beyond_spread": self.beyond_std,
        }
        return found if self.interval is None else found | {"interval": self.interval}

    def __getattr__(self, name: str) -> Any:
        """Finds an attribute by its old name, with a warning."""
        if (new := current_attribute("phreg.evaluation.results.Difference", name)) is not None:
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@shown_as_table
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

    @property
    def examples(self) -> dict[str, Sequence[Example]]:
        """What each model made of a few pictures, the baseline first, where the task has some."""
        return {record.model: record.examples for record, _ in self._labelled() if record.examples}

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
        shared = [name for name in record.figures if name in theirs and pairs]
        return {
            name: _difference(
                record.metrics[name],
                [record.figures[name].values[ours] - theirs[name].values[base] for ours, base in pairs],
                _paired(record, against, name, pairs),
            )
            for name in shared
        }

    @property
    def incomparable(self) -> list[str]:
        """Which models were not measured as the first was, and in what; none where all may be compared."""
        first, *others = (record for record, _ in self._labelled())
        texts = []
        for record in others:
            if record.digest != first.digest:
                how = differing(record.decides, first.decides) or [
                    f"digest is {record.digest or 'unknown'}, not {first.digest or 'unknown'}"
                ]
                texts.append(f"{record.model}: {', '.join(how)}")
        return texts

    def __getattr__(self, name: str) -> Any:
        """Finds a method by its old name, with a warning."""
        if (new := current_attribute("phreg.evaluation.results.Results", name)) is not None:
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def check_max_drop(self, limit: float | None) -> None:
        """Checks that no guarded figure of any model fell behind the baseline's by more than a limit.

        Args:
            limit: Largest drop allowed, in each figure's own unit (0.01 is one point of a share); None allows
                any.

        Raises:
            MaxDropError: A model fell behind.
            PhregError: There is no baseline.
        """
        if limit is None:
            return
        if self.baseline is None:
            raise PhregError("--max-drop asked for without a model to compare with; give --baseline MODEL")
        problems = []
        for record in self.records:
            differences = self.differences(record)
            for name in record.guarded:
                drop = record.metrics[name].drop(differences[name].change)
                if not drop <= limit:  # a NaN does not pass
                    problems.append(
                        f"{record.model}: {name} {record.figures[name].mean:.4f}, the baseline's is "
                        f"{self.baseline.figures[name].mean:.4f}"
                    )
        if problems:
            raise MaxDropError(
                f"max_drop: asked for a drop of at most {limit:g}, found {len(problems)} larger: "
                f"{'; '.join(problems)}. Train less, guard the global output more if the figure is one of it "
                "(--loss.pooled of phreg distill), or raise --max-drop",
                self,
            )

    def to_json(self) -> dict[str, Any]:
        """The first model's figures at the top, every record, and differences between them."""
        first = self.records[0]
        top = {name: summary.mean for name, summary in first.figures.items()}
        return without_nan(
            top
            | {
                "task": first.task,
                "data": first.data,
                "counts": first.counts[0] if first.counts else {},
                "digest": first.digest,
                "incomparable": self.incomparable,
                "bootstrap": {"over": "pictures", "interval": "percentile", "level": LEVEL}
                | {"resamples": RESAMPLES, "seed": SEED},
                "models": [record.to_json() for record in self.records],
                "baseline": self.baseline.to_json() if self.baseline else None,
                "against": self.against.model if self.against else None,
                "differences": [
                    {name: found.to_json() for name, found in self.differences(record).items()}
                    for record in self.records
                ]
                if self.against
                else None,
            }
        )

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """The table: its heading, and a row a model, the baseline first."""
        first = self.records[0]
        rows = [[f"{record.model}{note}", *self._cells(record)] for record, note in self._labelled()]
        return ["model", *(first.metrics[name].heading for name in first.figures)], rows

    def interval_rows(self) -> tuple[list[str], list[list[str]]]:
        """The table of intervals over pictures, with those of differences; no rows where there are none."""
        first = self.records[0]
        names = [name for name, summary in first.figures.items() if summary.interval is not None]
        rows = []
        for record, note in self._labelled() if names else ():
            differences = {} if record is self.against else self.differences(record)
            cells = []
            for name in names:
                spec, own = record.metrics[name], record.figures.get(name)
                cell = spec.range_text(own.interval if own else None)
                change = differences[name].interval if name in differences else None
                cells.append(cell if change is None else f"{cell} ({spec.range_text(change, '+')})")
            rows.append([f"{record.model}{note}", *cells])
        return ["model", *(first.metrics[name].heading for name in names)], rows

    def short_table(self) -> ShortTable:
        """What `print` and a notebook show: the table, and how to read it."""
        heading, rows = self.rows()
        first = self.records[0]
        return ShortTable(f"{first.task} on {first.data}", rows, heading, self.legend())

    def to_markdown(self) -> str:
        """The table in Markdown, the figures of single classes, and how to read them under it."""
        heading, rows = self.rows()
        blocks = [_table(heading, rows)]
        headings, ranges = self.interval_rows()
        if ranges:
            blocks.append(_table([f"{100 * LEVEL:g} % interval over pictures", *headings[1:]], ranges))
        for kind in self.records[0].detail:
            labelled = [record for record, _ in self._labelled()]
            parts = list(labelled[0].detail.get(kind, {}))
            rows = [[part, *(record.detail_text(kind, part) for record in labelled)] for part in parts]
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
        sentences = [
            *self._mixed(),
            "; ".join(parts),
            "Shares are in per cent",
            *self._resampling(),
            *self._swept(),
            *self._computed_over(),
            *self._left_out(),
            *self._protocol(),
            *([f"Digest {first.digest}: results with it may stand in one table"] if first.digest else []),
        ]
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

    def _swept(self) -> list[str]:
        """Says which figure is the best of several combinations, and that the measured images chose it."""
        labelled = [record for record, _ in self._labelled()]
        name = self.records[0].notes[0].get("sweep")
        if name is None:
            return []
        best = "; ".join(f"{record.model}: {record.notes[0].get('best')}" for record in labelled)
        return [
            f"{name} is the best of {len(self.records[0].detail[name])} combinations, chosen on the very "
            f"images that are measured: it is too high for a new set of images ({best})"
        ]

    def _computed_over(self) -> list[str]:
        """Says over how much figures were computed, those over the same together."""
        groups: dict[str, list[str]] = {}
        runs = [run for record, _ in self._labelled() for run in record.counts]
        for name in self.records[0].figures:
            found = [run[name] for run in runs if name in run]
            if found:
                groups.setdefault(amounts(found), []).append(name)
        if len(groups) < 2:
            return [f"Computed over {text}" for text in groups]
        groups_text = "; ".join(f"{', '.join(names)} over {text}" for text, names in groups.items())
        return [f"Computed: {groups_text}"]

    def _left_out(self) -> list[str]:
        """Says which figures some model has not, and why."""
        notes = [note.get("left_out", {}) for record, _ in self._labelled() for note in record.notes]
        reasons = {name: reason for note in notes for name, reason in note.items()}
        missing = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        return [f"Left out: {missing}"] if missing else []

    def _protocol(self) -> list[str]:
        """Says which published protocol the figures follow, and in what they do not."""
        first = self.records[0]
        name = first.settings.get("published")
        limits = [*first.settings.get("differs", ()), *first.notes[0].get("limits", ())]
        return [
            *([f"Protocol {name}"] if name else []),
            *([f"Not as published: {'; '.join(limits)}"] if limits else []),
        ]

    def _mixed(self) -> list[str]:
        """Says which models were not measured as the rest was."""
        found = self.incomparable
        return [f"NOT ONE TABLE, as models were measured otherwise: {'; '.join(found)}"] if found else []

    def _resampling(self) -> list[str]:
        """Says how intervals were found, where there are any."""
        if not any(summary.interval for summary in self.records[0].figures.values()):
            return []
        text = (
            f"Intervals hold {100 * LEVEL:g} % of {RESAMPLES:,} bootstrap samples of the pictures "
            "(percentiles); they say nothing of seeds"
        )
        paired = any(found.interval for record in self.records for found in self.differences(record).values())
        return [f"{text}; in brackets those of the difference, in the same samples" if paired else text]

    def _labelled(self) -> list[tuple[Record, str]]:
        ahead = [(self.baseline, " (baseline)")] if self.baseline else []
        return [*ahead, *((record, "") for record in self.records if record is not self.baseline)]

    def _cells(self, record: Record) -> list[str]:
        differences = {} if record is self.against else self.differences(record)
        cells = []
        for name in self.records[0].figures:
            cell = record.text(name)
            found = differences.get(name)
            if found is not None and not math.isnan(found.change):
                mark = "~" if found.beyond_std is False else ""
                cell += f" ({record.metrics[name].text(found.change, found.std, '+')}{mark})"
            cells.append(cell)
        return cells


def _paired(ours: Record, theirs: Record, name: str, pairs: Sequence[tuple[int, int]]) -> Interval | None:
    """Finds the interval of a difference, where both were measured on the same pictures."""
    if name not in ours.resampled or name not in theirs.resampled or ours.pictures[0] != theirs.pictures[0]:
        return None
    changes = [ours.resampled[name][seed] - theirs.resampled[name][base] for seed, base in pairs]
    return interval(np.mean(changes, axis=0))


def _difference(spec: MetricSpec, pairs: Sequence[float], between: Interval | None = None) -> Difference:
    found = Summary.of(pairs)
    return Difference(
        change=found.mean,
        std=found.std,
        better=spec.drop(found.mean) < 0,
        beyond_std=None if found.std is None else abs(found.mean) > found.std,
        interval=between,
    )


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
