"""Runs a task on several models and seeds, and keeps what is done, so that an interrupted run goes on.

    for each model: open ─► for each seed: task.run ─► runs/<key>.json ─► summarise ─► Record
    records ─► Results ─► results.json, results.md

A finished run is found again by a hash of task, settings, model, data and seed. Data on the disk are known by
the names, sizes and times of their files, so that a run on what has changed since is done again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

from phreg import __version__
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import weights_sha256
from phreg.checkpoint import write_text
from phreg.config import Config
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader, Observer
from phreg.evaluation.records import Metrics, Record, Results, hardware, summarise
from phreg.evaluation.tasks import find_task
from phreg.images import walk


@dataclass(frozen=True, eq=False)
class Suite:
    """A task with its data and settings, to be run on any model.

    Attributes:
        task: Name of the task.
        data: Where its images are.
        settings: Its settings.
        seeds: One run each.
        folder: Where runs, features and results go.
        cache: Where features are kept.
        device: Where models run.
        batch_size: Pictures per forward.
        bf16: Whether forwards run under bf16 autocast.
        observe: Told of progress.
        watch: Shown each model, ready to be read, with its record.
    """

    task: str
    data: str
    settings: Config
    seeds: tuple[int, ...]
    folder: Path
    cache: FeatureCache
    device: torch.device
    batch_size: int
    bf16: bool
    observe: Observer
    watch: Callable[[FeatureReader, Record], None] = lambda _reader, _record: None

    def record(self, name: str, backbone: Backbone, reference: Backbone | None = None) -> Record:
        """Measures one model.

        Args:
            name: What the user calls it.
            backbone: The model; put into eval mode and onto the device.
            reference: The baseline, in eval mode and on the device, where there is one.
        """
        backbone.eval().to(self.device)
        sha256 = weights_sha256(backbone.disk_state())
        reader = FeatureReader(
            backbone,
            sha256,
            self.cache,
            self.batch_size,
            self.bf16,
            lambda what, done, total: self.observe(f"{name}: {what}", done, total),
            reference,
        )
        runs = [self._run(reader, seed) for seed in self.seeds]
        record = summarise(
            [metrics for metrics, _ in runs],
            task=self.task,
            model=name,
            sha256=sha256,
            registers=backbone.num_registers,
            data=self.data,
            settings=self.settings.model_dump(mode="json"),
            seeds=self.seeds,
            hardware=hardware(self.device, bf16=self.bf16),
            seconds=sum(seconds for _, seconds in runs),
        )
        self.watch(reader, record)
        return record

    @cached_property
    def _files(self) -> str:
        """A hash of the names, sizes and times of all files of the data, labels among them."""
        stamps = []
        for path in map(Path, walk(self.data) if Path(self.data).is_dir() else ()):
            with suppress(FileNotFoundError):  # a link to nowhere; a reader that needs it says so
                if not path.is_relative_to(self.folder):
                    stamps.append((str(path), path.stat().st_size, path.stat().st_mtime_ns))
        return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()

    def _run(self, reader: FeatureReader, seed: int) -> tuple[Metrics, float]:
        """Runs the task once, or reads what it found before."""
        asked = {
            "phreg": __version__,
            "task": self.task,
            "data": str(Path(self.data).resolve()) if Path(self.data).exists() else self.data,
            "files": self._files,
            "settings": self.settings.model_dump(mode="json"),
            "model": reader.identity,
            "reference": weights_sha256(reader.reference.disk_state()) if reader.reference else None,
            "readout": reader.backbone.readout,
            "trained_readout": reader.backbone.trained_readout,
            "bf16": self.bf16,
            "seed": seed,
        }
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        path = self.folder / "runs" / f"{self.task}-{key}.json"
        # A run that is not there, or of which a power cut left half, is done again.
        with suppress(OSError, ValueError):
            done = json.loads(path.read_text(encoding="utf-8"))
            return Metrics(**done["metrics"]), done["seconds"]
        started = time.perf_counter()
        metrics = find_task(self.task).run(reader, self.data, self.settings, seed)
        seconds = time.perf_counter() - started
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"asked": asked, "metrics": asdict(metrics), "seconds": seconds}))
        return metrics, seconds


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
        baseline: The model they are set against.
        open_backbone: Opens a model by name.
    """
    reference = None if baseline is None else open_backbone(baseline).eval().to(suite.device)
    found: dict[str, Record] = {}
    if baseline is not None and reference is not None:
        found[baseline] = suite.record(baseline, reference, reference)
    for name in models:
        if name not in found:
            found[name] = suite.record(name, open_backbone(name), reference)
    results = Results(
        tuple(found[name] for name in models), found[baseline] if baseline is not None else None
    )
    results.write(suite.folder)
    return results
