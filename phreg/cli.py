"""The command line: flags in, tables out. What is done is done in `phreg.api`.

The flags of `phreg distill` are the settings of `phreg.config`, one for one; only those given are passed on,
so that a flag wins over a recipe, and a recipe over what its method implies.
"""

import logging
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, arg
from tyro.extras import SubcommandApp

from phreg import config
from phreg.errors import PhregError

app = SubcommandApp()
console = Console()
logger = logging.getLogger("phreg")

LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""


def _flags() -> Any:
    """Makes the type of distill's flags from the settings: a dictionary of those given, by dotted key."""
    flags = {}
    for key, field in config.fields().items():
        if key == "model":
            continue
        default = "" if field.default is None else f" (default: {field.default})"
        # A flag that is not given is unset; none needs a way to say None.
        kinds = tuple(kind for kind in get_args(field.annotation) if kind is not NoneType)
        kind = Union[kinds] if get_origin(field.annotation) in (Union, UnionType) else field.annotation  # noqa: UP007
        text = " ".join(f"{field.description}{default}".split())
        flags[key] = Annotated[kind, arg(help=text, help_behavior_hint="")]
    make: Any = TypedDict
    return make("Settings", flags, total=False)


if TYPE_CHECKING:
    Settings = dict[str, Any]
else:
    Settings = _flags()


@app.command
def quickstart(output: Path = Path("runs/quickstart")) -> None:
    """Retrofit registers onto a demonstration model with planted artifacts: offline, minutes on a CPU.

    Args:
        output: Run folder to write.
    """
    from phreg import api

    started = time.perf_counter()
    with Steps() as steps:
        result = api.quickstart(output, observe=steps)
    _show(result)
    seconds = time.perf_counter() - started
    console.print(f"\nDone in {seconds:.0f} s. Open {output / 'report' / 'report.html'} in a browser.")
    console.print("This model is a demonstration. The same with a real one:")
    console.print(
        "  phreg distill facebook/dinov2-small --images photos/ --output runs/dinov2-small-reg",
        highlight=False,
    )


@app.command
def distill(
    model: Annotated[Positional[str | None], arg(metavar="MODEL")] = None,
    /,
    *,
    settings: Annotated[Settings, arg(name="")],
    recipe: Annotated[str | None, arg(metavar="NAME|FILE")] = None,
    resume: bool = False,
) -> None:
    """Retrofit registers onto a model by self-distillation.

    Args:
        model: Hub id, timm or open_clip name, or local folder; may come from the recipe.
        settings: The settings of phreg.config.
        recipe: Name of a shipped recipe (`phreg recipes` lists them), or path of a TOML file.
        resume: Go on with the run in --output.
    """
    from phreg import api

    with Steps() as steps:
        result = api.distill(model, recipe=recipe, resume=resume, observe=steps, **settings)
    if result.main_process:
        _show(result)
        console.print(f"\nRun folder: {result.run}", highlight=False)
        console.print(f'In Python:  model = phreg.load("{result.run}")', highlight=False)


@app.command
def inspect(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    images: str,
    output: Path,
    size: Annotated[int | None, arg(metavar="PIXELS")] = None,
    count: int = 64,
) -> None:
    """Look for artifacts: outlier rate per block, where they are, and norm maps.

    Args:
        model: Hub id, timm or open_clip name, local folder, run or adapter.
        images: Folder, text file of paths, tar shards or Hugging Face dataset.
        output: Folder to write inspect.json, pictures and report.html to.
        size: Image side in pixels; unset means the model's own.
        count: Images to look at.
    """
    from phreg import api
    from phreg.report.verdict import verdict

    with console.status("running the model …") if console.is_terminal else nullcontext():
        report = api.inspect(model, images, output=output, size=size, count=count)
    table = Table("block", "median norm", "outliers", "their norm", "outliers after the final norm")
    for before, after in zip(report.blocks, report.normed, strict=True):
        norm = f"{before.outlier_norm:.1f}" if before.outlier_norm is not None else "-"
        rates = (f"{100 * side.outlier_rate:.2f} %" for side in (before, after))
        rate, normed = rates
        table.add_row(str(before.block), f"{before.median:.1f}", rate, norm, normed)
    console.print(table)
    console.print(verdict(report))
    console.print(f"Written: {output / 'report.html'}, inspect.json and pictures", highlight=False)


@app.command
def export(
    model: Annotated[Positional[str], arg(metavar="RUN")],
    /,
    output: Path,
    format: Literal["timm", "transformers", "remote-code", "onnx", "merged", "adapter"],
    revision: Annotated[str | None, arg(metavar="COMMIT")] = None,
) -> None:
    """Write a patched model in a stock format, which loads where phreg is not installed; checked on writing.

    Args:
        model: Run, adapter folder, or hub id of an adapter.
        output: Folder to write.
        format: timm; transformers (DINOv2 becomes DINOv2 with registers); remote-code (any model of
            transformers, with the code to load it); onnx; merged (all weights) or adapter (the changed ones),
            both for phreg.load.
        revision: Hub commit, branch or tag to pin.
    """
    from phreg import api

    table = Table("size", "largest difference", "relative", "equal")
    for size in api.export(model, output, format=format, revision=revision):
        pixels = f"{size.size[0]}x{size.size[1]}"
        equal = "yes" if size.claimed else "no, use another size"
        table.add_row(pixels, f"{size.difference:.1e}", f"{size.relative:.1e}", equal)
    console.print(table)
    console.print(f"Written and loaded back by {format}: {output}", highlight=False)


@app.command
def recipes() -> None:
    """List the shipped recipes."""
    table = Table("recipe", "model", "method")
    for name, path in config.recipes().items():
        settings = config.read_toml(path)
        table.add_row(name, settings.get("model", "any"), settings.get("method", "distill"))
    console.print(table)


class Steps(AbstractContextManager["Steps"]):
    """Shows training steps as they come: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        loss, speed = "loss {task.fields[loss]:.4f}", "{task.fields[speed]:.1f} images/s"
        columns = [
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn(loss),
            TextColumn(speed),
            TimeRemainingColumn(),
        ]
        self._progress = Progress(TextColumn("step"), *columns, console=console, transient=True)
        self._task: Any = None
        self._last = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, record: Any, steps: int) -> None:
        """Shows one step's record."""
        if console.is_terminal:
            if self._task is None:
                self._progress.start()
                self._task = self._progress.add_task("train", total=steps, loss=record.loss, speed=0.0)
            self._progress.update(
                self._task, completed=record.step, loss=record.loss, speed=record.images_per_second
            )
        elif time.perf_counter() - self._last > LINE_EVERY or record.step == steps:
            self._last = time.perf_counter()
            speed = f"{record.images_per_second:.1f} images/s"
            console.print(f"step {record.step}/{steps}  loss {record.loss:.4f}  {speed}", highlight=False)


def _show(result: Any) -> None:
    """Prints the before/after table of a run."""
    outcome = result.outcome
    if outcome.images:
        done = (
            f"{outcome.steps} steps in all; in this session {outcome.images} images, {outcome.seconds:.0f} s"
        )
        console.print(done, highlight=False)
    else:
        console.print("The run was finished already.")
    if outcome.skipped:
        console.print(
            f"{len(outcome.skipped)} unreadable images were skipped: {', '.join(outcome.skipped[:5])}",
            markup=False,
        )
    if result.comparison is None:
        return
    table = Table("figure", "before", "after", title=f"on {result.comparison.images} images")
    for row in result.comparison.rows():
        sides = ("-" if value is None else f"{value:.4f}" for value in (row.before, row.after))
        table.add_row(row.name, *sides)
    console.print(table)
    if result.comparison.drift.mean < DRIFT_ALARM:
        console.print(
            f"[bold red]The pooled output drifted: cosine {result.comparison.drift.mean:.3f} to the "
            "original's.[/] Whatever reads it (a classifier, zero-shot text) will suffer; "
            "raise --loss.pooled or train less."
        )


DRIFT_ALARM = 0.95
"""Mean cosine of the pooled output below which a run says loudly that it drifted."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a deliberate error is printed without a traceback."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", datefmt="[%X]",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False)],
    )  # fmt: skip
    logger.setLevel(logging.INFO)
    try:
        app.cli(prog="phreg", args=arguments)
    except PhregError as error:
        Console(stderr=True).print(
            f"[bold red]phreg:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(130 if type(error).__name__ == "Interrupted" else 1)
