"""The methods that repair a model's artifacts, in one protocol.

    python benchmarks/methods/run.py MODEL --images FOLDER --output FILE.json [--labels index-in-name]
    python benchmarks/methods/run.py planted:dinov2|planted:clip|planted:siglip --output FILE.json
    python benchmarks/methods/run.py --table FILE.json
    python benchmarks/methods/run.py --merge A.json B.json --output FILE.json

Each row, a method with a seed, is written as it finishes, and a rerun skips the rows that are there. So the
work can be split over processes, by --methods and --seed, into one file or into several that are merged.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import measuring
import methods
import planted_models
import result_file
import trained

import phreg
from phreg.api import open_model
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt
from phreg.config import TargetConfig
from phreg.training.runtime import keep_freed_memory

DEFAULT = ("raw", "teacher", *methods.METHODS)
Row = result_file.Row


# -- rows ----------------------------------------------------------------------------------------------------


class Bench:
    """One model with its measured images; makes rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.source, self.changes = options.model, dict(options.set)
        self.models, self.limit = options.output.parent / ".models", options.training
        photos = options.images or planted_models.photographs(options.output.parent / ".photographs")
        self.training, measured = measuring.split(photos)
        measured = measured[:: -(-len(measured) // options.measured)] if measured else measured
        if not self.training or not measured:
            raise SystemExit(f"found no images in {photos} named by numbers, some of them divisible by 5")
        self.raw = self.open()
        self.size = self.changes.get("size", self.raw.spec.input_size[0])
        self.stick = measuring.yardstick(
            self.raw,
            measured,
            self.size,
            labelled=options.labels is not None,
            twin=adapt(planted_models.build(self.kind, planted=False)) if self.kind else None,
            folder=options.output.parent / ".references",
        )
        self.protocol = {
            "model": Path(self.source).name,
            "size": self.size,
            "set": self.changes,
            "images": {"training": min(self.limit, len(self.training)), "measured": len(measured)},
            "references": ["clean twin"]
            if self.kind
            else {
                name: config.model_dump(include={"count", "max_shift"})
                for name, config in measuring.REFERENCES.items()
            },
            "key": self.stick.key,
        }

    @property
    def kind(self) -> str | None:
        """The planted model's name, where it is one."""
        return planted_models.kind_of(self.source)

    def open(self) -> Backbone:
        """Opens the raw model anew."""
        if self.kind:
            return adapt(planted_models.build(self.kind)).eval()
        return open_model(self.source)[0].eval()

    def settings(self, name: str) -> dict[str, Any]:
        """Says what a method changes from the defaults, for this model."""
        if name in methods.UNTRAINED:
            return {}
        own = methods.settings(name, self.stick.norms.emergence_block, len(self.raw.blocks))
        changes = self.changes
        if own.get("method") == "test-time":  # which trains nothing, and so has no length
            changes = {key: value for key, value in changes.items() if key not in ("steps", "epochs")}
        return json.loads(json.dumps(own | changes))

    def row(self, name: str, seed: int) -> Row:
        """Runs and measures one method with one seed."""
        settings = self.settings(name)
        row: Row = {"method": name, "seed": seed, "settings": settings, "environment": environment()}
        if name == "raw":
            return row | {"figures": measuring.figures(self.stick, self.raw, TargetConfig())}
        if name == "teacher":
            return row | self._teacher(seed)
        return row | self._distilled(name, settings, seed)

    def _teacher(self, seed: int) -> Row:
        with measuring.metering() as cost:
            cosine = measuring.against(
                self.stick,
                lambda images, number: phreg.denoise(self.raw.model, images, seed=1000 * seed + number),
                "plain",
            )
        return {"figures": {"cosine": cosine}, "cost": cost}  # it is no model, and has no other figures

    def _distilled(self, name: str, settings: dict[str, Any], seed: int) -> Row:
        settings = {"size": self.size, "seed": seed} | settings
        if self.kind:
            with tempfile.TemporaryDirectory() as folder:
                student = self.open()
                row = trained.distilled(
                    student.model, settings, self.training, Path(folder) / "run", self.limit
                )
        else:
            found, row = trained.trained(name, self.source, settings, self.training, self.models, self.limit)
            student = open_model(found)[0]
        if "refused" in row:
            return row
        target = measuring.target_of(settings, clip=self.raw.projection is not None)
        return {"figures": measuring.figures(self.stick, student.cpu(), target)} | row


def environment() -> dict[str, Any]:
    """What a row was made with."""
    packages = ("phreg", "torch", "timm", "transformers")
    return {
        "versions": {name: phreg.__version__ if name == "phreg" else version(name) for name in packages},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _order(key: str) -> tuple[int, str]:
    name, _, seed = key.partition("/")
    return methods.ROWS.index(name), seed


# -- table ---------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Renders results as Markdown: one table with the first reference, and a short one for each other."""
    rows = results["rows"].values()
    names = [name for name in methods.ROWS if any(row["method"] == name for row in rows)]
    by_name = {name: [row for row in rows if row["method"] == name] for name in names}
    measured = [row["figures"] for row in rows if "figures" in row]
    if not measured:
        return "no row was measured"
    references = list(measured[0]["cosine"])
    head = ("all", "former outliers", "ring", "worst 1 %")
    text = [
        f"Cosine to: {references[0]}.\n",
        f"| method | seeds | outliers, % | {' | '.join(head)} | pooled | worst | top-1, % | CPU s | "
        "teacher forwards |",
        "|---|---|---|" + "---|" * 9,
    ]
    for name, found in by_name.items():
        if refused := next((row["refused"] for row in found if "refused" in row), None):
            text.append(f"| {name} | refused: {refused} |" + " |" * 10)
            continue
        cells = [
            _spread(found, 100, 3, "figures", "outlier_rate"),
            *(_spread(found, 1, 3, "figures", "cosine", references[0], column) for column in head),
            _spread(found, 1, 3, "figures", "pooled", "mean"),
            _spread(found, 1, 3, "figures", "pooled", "worst"),
            _spread(found, 100, 1, "figures", "top1"),
            _spread(found, 1, 0, "cost", "cpu_seconds"),
            _spread(found, 1, 0, "cost", "teacher_forwards"),
        ]
        text.append(f"| {name} | {len(found)} | {' | '.join(cells)} |")
    for reference in references[1:]:
        text += [
            f"\nCosine to: {reference}.\n",
            f"| method | {' | '.join(head)} |",
            "|---|" + "---|" * len(head),
        ]
        for name, found in by_name.items():
            cells = [_spread(found, 1, 3, "figures", "cosine", reference, column) for column in head]
            text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def _spread(rows: Sequence[Row], scale: float, digits: int, *keys: str) -> str:
    """Mean and standard deviation over seeds of what lies at some keys; a dash where there is nothing."""
    values = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = value.get(key) if value is not None else None
        if value is not None:
            values.append(scale * value)
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


# -- command -------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="anything that phreg opens, or planted:KIND")
    parser.add_argument("--images", type=Path, help="folder of images named NNN…; planted: has its own")
    parser.add_argument("--labels", choices=["index-in-name"], help="the NNN are the model's classes")
    parser.add_argument(
        "--training",
        type=int,
        default=measuring.TRAINING,
        help="draw so many images to train on, by the seed",
    )
    parser.add_argument(
        "--measured", type=int, default=10**6, help="measure on so many images at most, evenly chosen"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--methods", type=methods.names, default=list(DEFAULT), help=", ".join(methods.ROWS))
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--seed", type=int, action="append", help="these seeds instead")
    parser.add_argument(
        "--set", type=methods.setting, action="append", default=[], help="KEY=JSON, for all methods"
    )
    parser.add_argument("--table", type=_result_file, help="only print this result file")
    parser.add_argument("--merge", type=_result_file, nargs="+", help="only merge these into --output")
    options = parser.parse_args(arguments)
    kind = planted_models.kind_of(options.model or "")
    if kind is not None and kind not in planted_models.PLANTS:
        parser.error(f"no planted model {kind!r}; there are {', '.join(planted_models.PLANTS)}")
    unknown = sorted(set(options.methods) - set(methods.ROWS))
    if unknown:
        parser.error(f"--methods: no method {', '.join(unknown)}; there are {', '.join(methods.ROWS)}")
    if not options.table and not (options.output and (options.model or options.merge)):
        parser.error("give MODEL and --output, or --table FILE, or --merge FILES and --output")
    if options.model and kind is None and options.images is None:
        parser.error("--images: give a folder of images; only planted models have photographs of their own")
    return options


def _result_file(text: str) -> Path:
    """Reads the path of a result file, which must be there."""
    try:
        found = json.loads(Path(text).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {text} as a result file ({error})") from error
    if not isinstance(found, dict) or not {"protocol", "rows"} <= found.keys():
        raise argparse.ArgumentTypeError(f"{text} is no result file: it lacks protocol or rows")
    return Path(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the rows that are missing and prints the table."""
    options = parse(arguments)
    if options.table:
        print(table(result_file.read(options.table)))
        return
    if options.merge:
        for path in options.merge:
            found = result_file.read(path)
            result_file.add(options.output, found["protocol"], found["rows"], _order)
    else:
        keep_freed_memory()  # phreg distill does; so that rows do not depend on which came first
        bench = Bench(options)
        result_file.add(options.output, bench.protocol, {}, _order)
        for seed in options.seed or range(options.seeds):
            for name in options.methods:
                key, rows = f"{name}/{seed}", result_file.read(options.output)["rows"]
                if (known := rows.get(key)) and known["settings"] == bench.settings(name):
                    continue
                if name == "raw" and any(row["method"] == "raw" for row in rows.values()):
                    continue  # no seed decides it
                print(f"{key} …", file=sys.stderr, flush=True)
                made = {key: bench.row(name, seed)}
                result_file.add(options.output, bench.protocol, made, _order)
    print(table(result_file.read(options.output)))


if __name__ == "__main__":
    main()
