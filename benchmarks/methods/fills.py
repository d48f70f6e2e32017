"""What the teacher's average is worth, by what its views show outside the image.

    python benchmarks/methods/fills.py MODEL --images FOLDER --output FILE.json [--student FILL=RUN …]
    python benchmarks/methods/fills.py planted:dinov2|planted:clip|planted:siglip --output FILE.json
    python benchmarks/methods/fills.py --table FILE.json

Images are the center of larger crops, so that views can show the context that surrounds them. A teacher of 10
views is compared with averages over all different views, filled in each of several ways; of a planted model,
with its clean twin. So are students, models that phreg trained by teachers of a fill.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import measuring
import planted_models
import result_file

from phreg.analysis.norms import outliers
from phreg.api import open_model
from phreg.backbones.resolve import adapt
from phreg.config import ViewsConfig
from phreg.data.crops import center_crop, centre_crops
from phreg.data.sources import open_images
from phreg.seeding import keyed_generator
from phreg.teacher import Teacher
from phreg.view_sampling import context_margin, count_different

CONTEXT = "surroundings"
"""What result files call the fill `context`."""

FILLS = ("white", "black", "mean", "reflect", "replicate", "valid-crop", CONTEXT)
REFERENCES = (CONTEXT, "white", "reflect")
SHOWN = ("all", "former outliers", "ring", "worst 1 %")


class Bench:
    """One model with its measured images; makes rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        kind = planted_models.kind_of(options.model)
        photos = options.images or planted_models.photographs(options.output.parent / ".photographs")
        paths = measuring.split(photos)[1]
        paths = paths[:: max(1, len(paths) // options.count)][: options.count]
        self.raw = (adapt(planted_models.build(kind)) if kind else open_model(options.model)[0]).eval()
        side = self.raw.spec.input_size[0]
        self.margin = context_margin(ViewsConfig(fill="context"), self.raw.spec, (side, side))
        source = open_images([str(path) for path in paths])
        self.whole = list(centre_crops(self.raw, source, side, self.margin))
        self.images = [center_crop(images, self.margin) for images in self.whole]
        self.were = measuring.outlying(self.raw, self.images, outliers(self.raw, self.images, show=1))
        self.protocol = {"model": Path(options.model).name, "size": side, "images": len(paths)}
        twin = adapt(planted_models.build(kind, planted=False)).eval() if kind else None
        self.references: dict[str, Callable[[int], Tensor]] = (
            {"clean twin": lambda index: twin(self.images[index]).patches}
            if twin is not None
            else {fill: self._average(fill) for fill in REFERENCES}
        )

    def seen(self, fill: str, index: int) -> tuple[Tensor, tuple[int, int]]:
        """Returns images of a batch as views of a fill need them, and the context margin that they have."""
        return (self.whole[index], self.margin) if fill == CONTEXT else (self.images[index], (0, 0))

    def views(self, fill: Any, count: int | None) -> ViewsConfig:
        """Says how to draw views: so many, or all different ones, if those are fewer or none is asked for."""
        config = ViewsConfig(fill="context" if fill == CONTEXT else fill)
        different = count_different(config, self.raw.layout(self.images[0]).grid)
        assert different is not None  # nothing is resampled
        return config.model_copy(update={"count": min(count or different, different)})

    def _average(self, fill: Any) -> Callable[[int], Tensor]:
        config = self.views(fill, None)
        made: dict[int, Tensor] = {}

        def average(index: int) -> Tensor:
            if index not in made:
                images, margin = self.seen(fill, index)
                with torch.inference_mode():
                    made[index] = measuring.average(self.raw, images, config, index, margin)
            return made[index]

        return average

    @torch.no_grad()
    def row(self, read: Callable[[int], Tensor]) -> dict[str, Any]:
        """Compares features, batch by batch, with every reference."""
        indices = range(len(self.images))
        features = [read(index).float() for index in indices]
        return {
            name: measuring.agreement(features, [reference(index).float() for index in indices], self.were)
            for name, reference in self.references.items()
        }

    def student(self, run: Path) -> dict[str, Any]:
        """Compares a model that was trained."""
        student = open_model(str(run))[0].eval()
        return self.row(lambda index: student(self.images[index]).patches)

    def teacher(self, fill: Any, seed: int) -> dict[str, Any]:
        """Compares the teacher with the default views, filled in a way."""
        teacher = Teacher(self.raw, self.views(fill, ViewsConfig().count))

        def read(index: int) -> Tensor:
            images, margin = self.seen(fill, index)
            return teacher(images, keyed_generator("views", seed, index), margin).patches

        return self.row(read)


def table(results: dict[str, Any]) -> str:
    """Renders results as Markdown: a row for each way of reading, figures by reference, means over seeds."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for key, row in results["rows"].items():
        by_name.setdefault(key.partition("/")[0], []).append(row)
    references = list(next(iter(by_name.values()))[0])
    head = [f"{name}: {figure}" for name in references for figure in SHOWN]
    text = [f"| views show outside | {' | '.join(head)} |", "|---|" + "---|" * len(head)]
    for name, rows in by_name.items():
        cells = [
            _mean([row[reference][figure] for row in rows]) for reference in references for figure in SHOWN
        ]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def _mean(figures: list[float | None]) -> str:
    known = [figure for figure in figures if figure is not None]
    return f"{mean(known):.3f}" if known else "-"


def _order(key: str) -> tuple[int, str]:
    name, _, one = key.partition("/")
    averages = (f"all views, {fill}" for fill in REFERENCES)
    students = (f"student of {fill}" for fill in FILLS)
    return ["the model itself", *averages, *FILLS, *students].index(name), one


def _student(text: str) -> tuple[str, Path]:
    fill, _, run = text.partition("=")
    if fill not in FILLS:
        raise argparse.ArgumentTypeError(f"no fill {fill!r}; there are {', '.join(FILLS)}")
    return fill, Path(run)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="anything that phreg opens, or planted:KIND")
    parser.add_argument("--images", type=Path, help="folder of images named NNN…; planted: has its own")
    parser.add_argument("--count", type=int, default=48, help="measured images to read")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--student", type=_student, action="append", default=[], help="FILL=RUN: a model so taught"
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="only print this result file")
    options = parser.parse_args(arguments)
    if options.table:
        return options
    if not (options.model and options.output):
        parser.error("give MODEL and --output, or --table FILE")
    kind = planted_models.kind_of(options.model)
    if kind is not None and kind not in planted_models.PLANTS:
        parser.error(f"no planted model {kind!r}; there are {', '.join(planted_models.PLANTS)}")
    if kind is None and options.images is None:
        parser.error("--images: give a folder of images; only planted models have photographs of their own")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Makes the rows that are missing and prints the table."""
    options = parse(arguments)
    if options.table:
        print(table(result_file.read(options.table)))
        return
    bench = Bench(options)
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "the model itself": lambda: bench.row(lambda index: bench.raw(bench.images[index]).patches)
    }
    for name, reference in bench.references.items():
        if name in REFERENCES:
            rows[f"all views, {name}"] = partial(bench.row, reference)
    for fill, seed in product(FILLS, range(options.seeds)):
        rows[f"{fill}/{seed}"] = partial(bench.teacher, fill, seed)
    for fill, run in options.student:
        rows[f"student of {fill}/{run.name}"] = partial(bench.student, run)
    known = result_file.add(options.output, bench.protocol, {}, _order)
    for key in rows.keys() - known.keys():
        result_file.add(options.output, bench.protocol, {key: rows[key]()}, _order)
    print(table(result_file.read(options.output)))


if __name__ == "__main__":
    main()
