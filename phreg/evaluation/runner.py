"""Runs a task on several models and seeds, and keeps what is done, so that an interrupted run goes on.

    for each model: open ─► for each seed: task.run ─► runs/<key>.json ─► summarise ─► Record
    records ─► Results ─► results.json, results.md

A finished run, one model with one seed, is found again by a hash of task, settings, models, data and seed. So
an interrupted evaluation loses the run it was in, but for the features that were kept whole. A model is known
by its identity (`phreg.backbones.identity`). Data on the disk, and files that settings name, are known by
their names, sizes and times, so that a run on what has changed since is done again; a dataset of the hub is
known by its name alone.

A folder holds the results of one task with its data and settings; those of another are refused there.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from phreg import __version__
from phreg.backbones.base import Backbone
from phreg.backbones.identity import identify
from phreg.config import Config
from phreg.data.paths import walk
from phreg.data.sources import open_images
from phreg.errors import DataError, PhregError
from phreg.evaluation.digest import digest, hash_contents, what_decides
from phreg.evaluation.feature_cache import FeatureCache, stamps
from phreg.evaluation.features import FeatureReader
from phreg.evaluation.processes import ALONE, Processes
from phreg.evaluation.record import Metrics, Record, hardware, summarise
from phreg.evaluation.results import ADVICE, MAPS, RESULTS, TABLE, Results
from phreg.evaluation.tasks.table import examples, find_task, is_stochastic
from phreg.parsing import parse_json
from phreg.progress import told_of
from phreg.settings import flatten
from phreg.storage import write_text, writing

logger = logging.getLogger(__name__)

RUNS = "runs"
"""Folder of finished runs."""

RUN_FORMAT = 3
"""What finished runs hold; those of another format are done again."""


@dataclass(frozen=True)
class Running:
    """How models are run.

    Attributes:
        device: Where.
        batch_size: Pictures per forward.
        bf16: Whether forwards run under bf16 autocast.
        workers: Threads that read pictures.
        processes: Those that share the reading.
    """

    device: torch.device
    batch_size: int
    bf16: bool
    workers: int
    processes: Processes = ALONE


@dataclass(frozen=True, eq=False)
class Suite:
    """A task with its data and settings, to be run on any model.

    Attributes:
        task: Name of the task.
        data: Where its images are.
        settings: Its settings.
        seeds: Seeds asked for; a deterministic task is run with the first alone.
        folder: Where runs, features and results go.
        cache: Where features are kept.
        running: How models are run.
        show: Whether records have examples, where the task has some.
    """

    task: str
    data: str
    settings: Config
    seeds: tuple[int, ...]
    folder: Path
    cache: FeatureCache
    running: Running
    show: bool = False

    def check_folder(self) -> None:
        """Checks that results may be written to the folder.

        Raises:
            PhregError: It holds those of another task, other data or other settings.
        """
        path = self.folder / RESULTS
        if not path.is_file():
            return
        try:
            held = parse_json(path.read_text(encoding="utf-8"))["models"][0]
            theirs = _asked(held["task"], held["data"], self._completed(held["settings"]))
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise PhregError(
                f"asked to write results to {self.folder}, whose {RESULTS} is none of phreg's; choose "
                "another --output, or move that file"
            ) from error
        ours = _asked(self.task, self.data, self.settings.model_dump(mode="json"))
        changed = [
            f"{name} {theirs.get(name)!r} there, {ours.get(name)!r} asked for"
            for name in dict.fromkeys([*ours, *theirs])
            if theirs.get(name) != ours.get(name)
        ]
        # Of another task or other data, the settings are beside the point.
        changed = [text for text in changed if text.startswith(("task ", "data "))] or changed
        if changed:
            raise PhregError(
                f"asked to write results to {self.folder}, which holds others: {'; '.join(changed)}. Choose "
                f"another --output (features can be shared by --cache), or remove {RESULTS} and {TABLE} there"
            )

    def _completed(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Gives settings that were not there yet when results were written their defaults."""
        try:
            return type(self.settings).model_validate(settings).model_dump(mode="json")
        except ValidationError:  # of another task
            return settings

    @cached_property
    def drawn(self) -> bool:
        """Whether a seed decides anything."""
        return is_stochastic(self.task, self.data, self.settings)

    def record(self, name: str, backbone: Backbone, reference: Backbone | None = None) -> Record:
        """Measures one model.

        Args:
            name: What the user calls it.
            backbone: The model; put into eval mode and onto the device.
            reference: The baseline, in eval mode and on the device, where there is one.

        Raises:
            PhregError: Its weights are fp16, and bf16 is asked for.
        """
        if self.running.bf16 and backbone.dtype == torch.float16:
            raise PhregError(
                f"precision bf16 asked for with {name}, whose weights are float16, which torch does not mix "
                "with bf16; leave precision out, or convert the model by .float() or .bfloat16()"
            )
        backbone.eval().to(self.running.device)
        identity = identify(backbone)
        reader = FeatureReader(
            backbone,
            identity.whole,
            self.cache,
            self.running.batch_size,
            self.running.bf16,
            self.running.workers,
            self.running.processes,
            reference,
        )
        seeds = self.seeds if self.drawn else self.seeds[:1]
        with told_of(name):
            runs = [self._run(reader, seed) for seed in seeds]
        on = hardware(self.running.device, bf16=self.running.bf16)
        decides = what_decides(self.task, self._contents, self.settings, on["precision"])
        record = summarise(
            [metrics for metrics, _ in runs],
            find_task(self.task).METRICS,
            task=self.task,
            model=name,
            sha256=identity.weights,
            registers=backbone.num_registers,
            data=self.data,
            settings=self.settings.model_dump(mode="json"),
            seeds=seeds,
            hardware=on,
            seconds=sum(seconds for _, seconds in runs),
            drawn=self.drawn,
            digest=digest(decides),
            decides=decides,
        )
        if record.sweep:
            logger.info("%s:\n%s", name, "\n".join(record.sweep))
        if not self.show:
            return record
        pictures = examples(self.task, reader, self.data, self.settings, seeds[0], record.notes[0])
        return replace(record, examples=pictures)

    @cached_property
    def _files(self) -> str:
        """A hash of the names, sizes and times of all files of the data, and of those that settings name."""
        found = [*self._stamps, *(_stamp(path) for path in _named_files(self.settings))]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @property
    def _contents(self) -> str:
        """A hash of the data that is the same wherever they lie; of a dataset of the hub, of its name."""
        root = Path(self.data).resolve()
        if not self._stamps:
            return hash_contents([(self.data, 0)])
        files = dict.fromkeys(Path(path) for path, *_ in self._stamps)  # a tar file has many pictures
        return hash_contents(
            (path.relative_to(root).as_posix() if root in path.parents else path.name, path.stat().st_size)
            for path in files
        )

    @cached_property
    def _stamps(self) -> list[tuple[Any, ...]]:
        return list(self._data_stamps())

    def _data_stamps(self) -> Iterator[tuple[Any, ...]]:
        root = Path(self.data).resolve()
        if root.is_dir():
            # What phreg itself keeps inside of the data is none of it.
            outputs = [*(self.folder / name for name in (RUNS, RESULTS, TABLE, MAPS)), self.cache.folder]
            inside = [place for path in outputs if root in (place := path.resolve()).parents]
            for path in map(Path, walk(os.fspath(root))):
                if not any(path.is_relative_to(place) for place in inside):
                    with suppress(FileNotFoundError):  # a link to nowhere; a reader that needs it says so
                        yield _stamp(path)
        elif root.is_file() or any(mark in self.data for mark in "*?[{"):
            with suppress(DataError):  # what the task cannot read, it says itself
                yield from stamps(open_images(self.data))

    def _run(self, reader: FeatureReader, seed: int) -> tuple[Metrics, float]:
        """Runs the task once, or reads what it found before."""
        asked = {
            "phreg": __version__,
            "format": RUN_FORMAT,
            **_asked(self.task, self.data, self.settings.model_dump(mode="json")),
            "files": self._files,
            "model": reader.identity,
            "reference": reader.baseline.identity if reader.baseline else None,
            "bf16": self.running.bf16,
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / RUNS / f"{self.task}-{key}.json"
        processes = self.running.processes
        done = processes.from_main(lambda: _finished(path))
        if done is not None:
            return done
        started = time.perf_counter()
        metrics = find_task(self.task).run(reader, self.data, self.settings, seed)
        seconds = time.perf_counter() - started

        def write() -> tuple[Metrics, float]:
            with writing(path, ADVICE):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(path, json.dumps({"asked": asked, "metrics": asdict(metrics), "seconds": seconds}))
            return metrics, seconds

        return processes.from_main(write)


def compare_models(
    suite: Suite,
    models: Sequence[str],
    baseline: str | None,
    open_backbone: Callable[[str], Backbone],
) -> Results:
    """Measures several models, the baseline first, and writes the results.

    Args:
        suite: What to measure.
        models: What the user calls them.
        baseline: The model they are set against, at whose artifacts they are measured too. Without one, the
            others are set against the first, and each is measured as if alone.
        open_backbone: Opens a model by name.

    Raises:
        PhregError: The folder holds other results, or anything asked for does not exist or does not fit.
    """
    processes = suite.running.processes
    processes.from_main(suite.check_folder)
    if not suite.drawn and len(suite.seeds) > 1:
        logger.info(
            "%s is deterministic here: it runs once instead of for %d seeds", suite.task, len(suite.seeds)
        )
    reference = None if baseline is None else open_backbone(baseline).eval().to(suite.running.device)
    found: dict[str, Record] = {}
    if baseline is not None and reference is not None:
        found[baseline] = suite.record(baseline, reference, reference)
    for name in models:
        if name not in found:
            found[name] = suite.record(name, open_backbone(name), reference)
    records = tuple(found[name] for name in models)
    if baseline is not None:
        results = Results(records, found[baseline])
    else:
        results = Results(records, first=records[0] if len(records) > 1 else None)
    processes.from_main(lambda: results.write(suite.folder))
    return results


def _asked(task: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Says what is measured, by dotted key, a folder by its absolute path."""
    where = os.fspath(Path(data).resolve()) if Path(data).exists() else data
    return {"task": task, "data": where, **flatten({"settings": settings})}


def _finished(path: Path) -> tuple[Metrics, float] | None:
    """Reads a run; None where it is not there, or a power cut left half of it."""
    try:
        done = parse_json(path.read_text(encoding="utf-8"))
        return Metrics(**done["metrics"]), done["seconds"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _named_files(settings: Config) -> Iterator[Path]:
    """Finds the files that settings name, whatever they are for."""
    for value in flatten(settings.model_dump(mode="json")).values():
        # By this, as a name may be longer than a path can be, or hold what none can.
        if isinstance(value, str) and os.path.isfile(value):  # noqa: PTH113
            yield Path(value).resolve()


def _stamp(path: Path) -> tuple[Any, ...]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
