"""The methods that repair a model's artifacts, in the tasks by which dense features are judged, on real data.

    python benchmarks/evaluation/run.py MODEL --data FOLDER --output FILE.json
    python benchmarks/evaluation/run.py --table FILE.json

    method, seed ──phreg.distill──► run, kept ─┐
    raw model ─────────────────────────────────┴──phreg.evaluate, task, seed──► row ──► FILE.json ──► tables

A row, a task of a method with a seed, is written as it finishes; a rerun makes the rows that are missing. So
the work can be split over processes, by --tasks, --methods and --seed, into one file.
"""

import argparse
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
import measuring
import methods
import result_file
import trained

import phreg
from phreg.api import open_model
from phreg.backbones.resolve import weights_sha256
from phreg.data.paths import SUFFIXES
from phreg.evaluation.record import Metrics, summarise, versions
from phreg.evaluation.results import Results
from phreg.evaluation.tasks.table import find_task
from phreg.training.checkpoint import write_text
from phreg.training.runtime import keep_freed_memory

METHODS = ("raw", "teacher", "test-time", "paper", "before", "relocate-0.1", "auto")
Row = result_file.Row

TEACHER = {"reading.views": 10}
"""Settings of a task with which the raw model is read as the teacher of a distillation: the average over as
many views as distillation has by default."""


# -- tasks ---------------------------------------------------------------------------------------------------

WINDOWS = {"size": 448, "window": 224, "stride": 224}
"""A canvas of 448 pixels on its shorter side, seen through windows of the size that the model is made for."""

COARSE = {
    "fish": ((0, 6), (389, 397)),
    "bird": ((7, 24), (80, 100), (127, 146)),
    "reptile or amphibian": ((25, 68),),
    "invertebrate": ((69, 79), (107, 126), (300, 329)),
    "dog": ((151, 268),),
    "other mammal": ((101, 106), (147, 150), (269, 299), (330, 388)),
    "food or plant": ((923, 969), (984, 998)),
    "landscape": ((970, 980),),
    "thing": ((398, 922), (981, 983), (999, 999)),
}
"""Groups of ImageNet's 1000 classes, by the first and last number of each range."""


@dataclass(frozen=True)
class Task:
    """A row's task.

    Attributes:
        name: What `phreg evaluate` calls it.
        data: Finds its data, given the folder of all data and the one of prepared links.
        settings: Settings of the task.
        figures: Figures in the table.
        protocol: Its named set of settings.
        drawn: Whether the seed of the evaluation decides anything; else one does for all.
        averages: Whether it reads patch tokens by its `reading`, so that there is a row of the teacher.
    """

    name: str
    data: Callable[[Path, Path], Path]
    figures: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    protocol: str | None = None
    drawn: bool = True
    averages: bool = False

    def has(self, method: str) -> bool:
        """Says whether there is a row of a method."""
        return method != "teacher" or self.averages


def own_classifier(folder: str) -> Task:
    """Asks the model's own classifier for the numbers of images in a folder of links."""
    return Task(
        "classification",
        lambda _, links: links / folder,
        ("top1", "top5"),
        {"methods": ("head",)},
        drawn=False,
    )


TASKS = {
    "linear-segmentation": Task(
        "linear-segmentation",
        lambda data, _: data / "camvid",
        ("miou", "mean_accuracy", "pixel_accuracy", "artifact_accuracy"),
        {"reading": WINDOWS},
        averages=True,
    ),
    "dense-nn": Task(
        "dense-nn",
        lambda data, _: data / "camvid",
        ("miou", "mean_accuracy", "pixel_accuracy", "artifact_accuracy"),
        {"reading": WINDOWS, "bank_size": 20_000},
        averages=True,
    ),
    "head-transfer": Task(
        "head-transfer",
        lambda data, _: data / "camvid",
        ("miou", "miou_original", "miou_again"),
        {"reading": WINDOWS},
    ),
    "lost": Task(
        "object-discovery",
        lambda data, _: data / "ecssd",
        ("corloc", "corloc_first", "artifact_seeds"),
        drawn=False,
    ),
    "tokencut": Task(
        "object-discovery",
        lambda data, _: data / "ecssd",
        ("corloc", "artifact_seeds"),
        protocol="tokencut",
        drawn=False,
    ),
    "top1": own_classifier("numbered"),
    "top1-crops": own_classifier("crops"),
    "coarse": Task(
        "classification",
        lambda _, links: links / "coarse",
        ("knn_pooled_top1", "knn_patch_mean_top1", "linear_pooled_top1", "linear_patch_mean_top1"),
        {"features": ("pooled", "patch-mean")},
        drawn=False,
        averages=True,
    ),
    "consistency": Task(
        "consistency",
        lambda _, links: links / "coarse" / "val",
        (
            "shift_agreement",
            "flip_agreement",
            "reference_agreement",
            "reference_worst_percent",
            "artifact_agreement",
            "outlier_rate",
        ),
    ),
}
"""Tasks by the name of their table, which `--tasks` takes."""


CROPS = {224: 6, 248: 6, 288: 6}
"""Crops of 224 pixels from each held-out sample image, by the length of its shorter side."""


def coarse(number: int) -> str:
    """Names the group of an ImageNet class."""
    return next(name for name, ranges in COARSE.items() if any(low <= number <= high for low, high in ranges))


def link_samples(samples: Path, links: Path) -> list[Path]:
    """Links the sample images into the layouts that the tasks read, held-out ones apart.

    Args:
        samples: Images named `NNN…` by their ImageNet class.
        links: Folder to fill: coarse/{train,val}/GROUP/; held-out ones in numbered/, and crops of them in
            crops/, both with a labels.csv.

    Returns:
        The images that a method may train on.
    """
    parts = dict(zip(("train", "val"), measuring.split(samples), strict=True))
    if not all(parts.values()):
        raise SystemExit(f"found no images in {samples} named by numbers, some of them divisible by 5")
    for part, paths in parts.items():
        for path in paths:
            _link(path, links / "coarse" / part / coarse(_class_of(path)) / path.name)
    for path in parts["val"]:
        _link(path, links / "numbered" / path.name)
    _write_labels(links / "numbered", {path.name: path for path in parts["val"]})
    crops = links / "crops"
    if not (crops / "labels.csv").exists():
        crops.mkdir(parents=True, exist_ok=True)
        cut: dict[str, Path] = {}
        for path in parts["val"]:
            for number, crop in enumerate(_crops(path)):
                cut[f"{path.stem}-{number}.png"] = path
                crop.save(crops / f"{path.stem}-{number}.png")
        _write_labels(crops, cut)
    return parts["train"]


def _crops(path: Path, side: int = 224) -> Iterator[Image.Image]:
    """Draws crops of a picture, every second of them mirrored."""
    generator = random.Random(path.name)
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    for shorter, count in CROPS.items():
        ratio = shorter / min(picture.size)
        scaled = picture.resize([round(ratio * length) for length in picture.size], Image.Resampling.BICUBIC)
        for number in range(count):
            left, top = (generator.randint(0, length - side) for length in scaled.size)
            crop = scaled.crop((left, top, left + side, top + side))
            yield ImageOps.mirror(crop) if number % 2 else crop


def _write_labels(folder: Path, files: Mapping[str, Path]) -> None:
    write_text(folder / "labels.csv", "".join(f"{name},{_class_of(path)}\n" for name, path in files.items()))


def _class_of(path: Path) -> int:
    found = measuring.number(path)
    assert found is not None  # others are in neither part
    return found


def _link(path: Path, to: Path) -> None:
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        to.symlink_to(path)


# -- rows ----------------------------------------------------------------------------------------------------


def store(path: Path, protocol: Mapping[str, Any], rows: Mapping[str, Row]) -> dict[str, Row]:
    """Adds rows to a result file, and returns all; a task may have come since."""
    return result_file.add(path, protocol, rows, _place, growing=("tasks",))


def _place(key: str) -> tuple[int, int, int]:
    task, method, seed = key.split("/")
    return list(TASKS).index(task), METHODS.index(method), int(seed)


class Bench:
    """One model with its data; makes rows.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, self.data = options.model, options.data.resolve()
        self.work = options.output.parent / ".work"
        self.changes = dict(options.set)
        self.models = options.models
        self.training = link_samples(self.data / "imagenet_samples", self.work / "links")
        raw = open_model(self.model)[0]
        self.size = raw.spec.input_size[0]
        self.protocol = {
            "model": Path(self.model).name,
            "weights": weights_sha256(raw.disk_state()),
            "images": {"training": min(measuring.TRAINING, len(self.training))}
            | {name: _count(self.data / name) for name in ("camvid", "ecssd", "imagenet_samples")},
            "tasks": {
                name: {"task": task.name, "protocol": task.protocol, **task.settings}
                for name, task in TASKS.items()
            },
            "set": self.changes,
        }

    def row(self, name: str, method: str, seed: int) -> Row:
        """Measures one method with one seed in one task, set against the raw model."""
        task = TASKS[name]
        model = self.patched("raw" if method in methods.UNTRAINED else method, seed)
        # Read in another way, the baseline is another too, and a folder holds the results of one way.
        changes, folder = (TEACHER, f"{name}-teacher") if method == "teacher" else ({}, name)
        cpu = time.process_time()
        results = phreg.evaluate(
            model,
            task=task.name,
            data=task.data(self.data, self.work / "links"),
            output=self.work / "evaluations" / folder,
            cache=self.work / "features",
            baseline=self.model,
            seed=seed if task.drawn else 0,
            protocol=task.protocol,
            device="cpu",
            **task.settings,
            **changes,
        ).to_json()
        record = results["models"][0]
        return {
            "figures": {figure: found["mean"] for figure, found in record["figures"].items()},
            "detail": {
                kind: {part: found["mean"] for part, found in parts.items()}
                for kind, parts in record["detail"].items()
            },
            "notes": record["notes"][0],
            "digest": record["digest"],
            "intervals": {
                figure: found["interval"]
                for figure, found in record["figures"].items()
                if "interval" in found
            },
            "seconds": round(record["seconds"], 3),
            # The raw model's too, where they were not known yet.
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "environment": {
                "versions": versions(),
                "machine": platform.machine(),
                "threads": torch.get_num_threads(),
            },
        }

    def patched(self, method: str, seed: int) -> str:
        """Finds the model of a method, trained with the seed where it is not there yet."""
        if method == "raw":
            return self.model
        own = {"size": self.size, "seed": seed} | methods.settings(method, None, 0)
        found, row = trained.trained(method, self.model, own | self.changes, self.training, self.models)
        if "refused" in row:
            raise SystemExit(f"{method}: {row['refused']}")
        return found


def _count(folder: Path) -> int:
    return sum(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))


# -- tables --------------------------------------------------------------------------------------------------


def table(name: str, rows: Mapping[str, Row]) -> str:
    """Renders a task's rows as Markdown: mean and spread over seeds, and the difference to the raw model.

    Differences are seed by seed, and marked where they are within their spread. Rows that were measured in
    another way than those of the raw model are named below.
    """
    task = TASKS[name]
    found: dict[str, dict[int, Row]] = {}
    for key, row in rows.items():
        of, method, seed = key.split("/")
        if of == name:
            found.setdefault(method, {})[int(seed)] = row
    seeds = sorted({seed for each in found.values() for seed in each})
    records = {}
    for method, each in found.items():
        # What no seed decides is the same with every seed.
        known = (
            dict.fromkeys(seeds, *each.values()) if method in methods.UNTRAINED and not task.drawn else each
        )
        records[method] = summarise(
            [Metrics({figure: _number(row["figures"].get(figure)) for figure in task.figures})
             for row in known.values()],
            find_task(task.name).METRICS,
            task=name, model=method, sha256="", registers=0, data="", settings={},
            seeds=tuple(known), hardware={}, seconds=sum(row["seconds"] for row in each.values()),
        )  # fmt: skip
    heading, cells = Results(tuple(records.values()), records.get("raw")).rows()
    lines = [[*heading, "seeds", "seconds"], ["---"] * (len(heading) + 2)]
    for method, line in zip(records, cells, strict=True):
        seconds = records[method].seconds / len(found[method])
        lines.append([method, *line[1:], str(len(found[method])), f"{seconds:.0f}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([text, *_measured_otherwise(found)])


def _measured_otherwise(found: Mapping[str, Mapping[int, Row]]) -> list[str]:
    """Names the methods whose rows have another digest than the raw model's; rows of old have none."""
    digests = {
        method: {row["digest"] for row in each.values() if "digest" in row} for method, each in found.items()
    }
    raw = digests.get("raw", set())
    others = [method for method, known in digests.items() if raw and known - raw]
    return [f"Not measured as `raw` was: {', '.join(f'`{name}`' for name in others)}."] if others else []


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def tables(rows: Mapping[str, Row]) -> str:
    """Renders the tables of all tasks that have rows."""
    return "\n\n".join(
        f"**{name}**\n\n{table(name, rows)}"
        for name in TASKS
        if any(key.startswith(f"{name}/") for key in rows)
    )


# -- command -------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="anything that phreg opens")
    parser.add_argument("--data", type=Path, help="folder with camvid, ecssd and imagenet_samples")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tasks", type=methods.names, default=list(TASKS), help=", ".join(TASKS))
    parser.add_argument("--methods", type=methods.names, default=list(METHODS), help=", ".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--seed", type=int, action="append", help="these seeds instead")
    parser.add_argument(
        "--set", type=methods.setting, action="append", default=[], help="KEY=JSON, for distillation"
    )
    parser.add_argument("--models", type=Path, default=trained.FOLDER, help="where distilled models are kept")
    parser.add_argument("--table", type=Path, help="only print this result file")
    options = parser.parse_args(arguments)
    for flag, known in (("tasks", TASKS), ("methods", METHODS)):
        unknown = [name for name in getattr(options, flag) if name not in known]
        if unknown:
            parser.error(f"--{flag}: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    if not options.table and not (options.model and options.data and options.output):
        parser.error("give MODEL, --data and --output, or --table FILE")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the rows that are missing and prints the tables."""
    options = parse(arguments)
    if options.table:
        print(tables(result_file.read(options.table)["rows"]))
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    keep_freed_memory()
    bench = Bench(options)
    rows = store(options.output, bench.protocol, {})
    for method in options.methods:
        for index, seed in enumerate(options.seed or range(options.seeds)):
            for name in options.tasks:
                key = f"{name}/{method}/{seed}"
                once = method in methods.UNTRAINED and not TASKS[name].drawn
                known = key in rows or (
                    once and (index or any(k.startswith(f"{name}/{method}/") for k in rows))
                )
                if known or not TASKS[name].has(method):
                    continue
                print(f"{key} …", file=sys.stderr, flush=True)
                rows = store(options.output, bench.protocol, {key: bench.row(name, method, seed)})
    print(tables(rows))


if __name__ == "__main__":
    main()
