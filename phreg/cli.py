"""The command line: flags in, tables out. The work is done in `phreg.api`.

Each setting of `phreg.config` is a flag of `phreg distill`. Only given flags are passed on, so a flag wins
over a recipe, and a recipe over what its method implies.

Texts are printed without markup, since names of folders and models can hold any character.
"""

import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from inspect import signature
from itertools import chain
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, Union, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from tyro.conf import Positional, UseAppendAction, arg
from tyro.extras import SubcommandApp

from phreg import __version__, config
from phreg.deprecated import OldNameWarning, current_command_line, current_name
from phreg.errors import ConfigError, Interrupted, MaxDropError, PhregError
from phreg.formats import Format
from phreg.methods import METHODS
from phreg.parsing import parse_toml

app = SubcommandApp()
PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
"""How consoles print: `[…]` and `:…:` have no special meaning."""

console = Console(**PLAIN)
logger = logging.getLogger("phreg")

LINE_EVERY = 10.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""


def _unset(metavar: str) -> Any:
    """Describes a flag whose help says itself what leaving it out means."""
    return arg(metavar=metavar, help_behavior_hint="")


def _flags(section: type[BaseModel] = config.DistillConfig, prefix: str = "") -> Any:
    """Builds the type of distill's flags from the settings: a dictionary of given flags, by section."""
    flags: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        kind: Any = field.annotation
        if prefix + name == "model":
            continue
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            flags[name] = _flags(kind, f"{prefix}{name}.")
            continue
        # A flag that is not given is unset; none needs a way to say None.
        kinds = tuple(kind for kind in get_args(kind) if kind is not NoneType)
        kind = Union[kinds] if get_origin(kind) in (Union, UnionType) else kind  # noqa: UP007
        description = field.description
        if prefix + name == "method":
            kind = Literal[tuple(METHODS)]
            description = f"{description} {' '.join(f'{m.name}: {m.summary}.' for m in METHODS.values())}"
        text = " ".join(f"{description} {_defaults(prefix + name, field.default)}".split())
        flags[name] = Annotated[kind, arg(help=text, help_behavior_hint="")]
    make: Any = TypedDict
    made = make(section.__name__, flags, total=False)
    made.__doc__ = section.__doc__
    return made


def _defaults(key: str, default: Any) -> str:
    """Lists the default of a setting, and the methods that imply another one."""

    def text(value: Any) -> str:
        return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    parts = [] if default in (None, ()) else [f"default: {text(default)}"]
    parts += [
        f"{name}: {text(method.settings[key])}" for name, method in METHODS.items() if key in method.settings
    ]
    return f"({'; '.join(parts)})" if parts else ""


if TYPE_CHECKING:
    Settings = dict[str, Any]
else:
    Settings = _flags()


@app.command
def quickstart(output: Path = Path("runs/quickstart")) -> None:
    """Repair a demonstration model with planted artifacts: offline, minutes on a CPU.

    Args:
        output: Run folder to write.
    """
    from phreg import api

    started = time.perf_counter()
    with TrainingProgress() as steps:
        result = api.quickstart(output, observe=steps)
    _show(result)
    seconds = time.perf_counter() - started
    _say(f"\nDone in {seconds:.0f} s. Open {output / 'report' / 'report.html'} in a browser.")
    _say("This was a demonstration model. For a real model:")
    _say("  phreg distill facebook/dinov2-small --images photos/ --output runs/dinov2-small-reg")
    if result.failures:
        sys.exit(CHECK_FAILED)


@app.command
def distill(
    model: Annotated[Positional[str | None], _unset("[MODEL]")] = None,
    /,
    *,
    settings: Annotated[Settings, arg(name="")],
    recipe: Annotated[str | None, _unset("NAME|FILE")] = None,
    resume: bool = False,
) -> None:
    """Retrofit registers onto a model by self-distillation.

    Args:
        model: Hub id, timm or open_clip name, or local folder. The recipe can name it instead.
        settings: The settings of phreg.config.
        recipe: Name of a shipped recipe (`phreg recipes` lists them), or path of a TOML file.
        resume: Continue the run in --output.
    """
    from phreg import api

    with TrainingProgress() as steps:
        result = api.distill(model, recipe=recipe, resume=resume, observe=steps, **settings)
    if result.main_process:
        _show(result)
        _say(f"\nRun folder: {result.run}")
        if not result.unchanged:
            _say(f'In Python:  model = phreg.load("{_inside_quotes(result.run)}")')
    if result.failures:
        sys.exit(CHECK_FAILED)


@app.command
def inspect(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    images: str,
    output: Path,
    baseline: Annotated[tuple[str, ...], _unset("MODEL…")] = (),
    size: Annotated[int | tuple[int, int] | None, _unset("HEIGHT [WIDTH]")] = None,
    count: int = 64,
    labels: Annotated[str | None, _unset("PATH")] = None,
    texts: Annotated[tuple[str, ...], _unset("TEXT…")] = (),
    mean: Annotated[tuple[float, float, float] | None, _unset("R G B")] = None,
    std: Annotated[tuple[float, float, float] | None, _unset("R G B")] = None,
    device: Annotated[str | None, _unset("DEVICE")] = None,
) -> None:
    """Look for artifacts, and report how many there are, where, what causes them and what they hold.

    Args:
        model: Hub id, timm or open_clip name, local folder, run or adapter.
        images: Folder, text file of paths, tar shards or Hugging Face dataset.
        output: Folder for inspect.json, report.html and pictures: new, empty, or of an earlier inspection.
        baseline: Models to compare it with, on the same images.
        size: Size of the images in pixels: one number for a square, or height and width. Unset means each
            model's own size.
        count: Images to look at.
        labels: Labelled images, such as a folder of class folders. They show what single tokens know of a
            class.
        texts: Texts whose similarity is mapped over the images, for models with a text tower.
        mean: Mean that images are normalised with, on a scale of 0 to 1. Unset takes it from each model or
            its image processor.
        std: Standard deviation that images are normalised with. Unset works as for mean.
        device: Device to run on. Unset means a GPU if there is one.
    """
    from phreg import api
    from phreg.report.verdict import advice, causes, verdict

    with ProgressReporter() as doing:
        inspection = api.inspect(
            model, images, baseline=baseline, output=output, size=size, count=count, labels=labels,
            texts=texts, mean=mean, std=std, device=device, observe=doing,
        )  # fmt: skip
    for found in inspection.models:
        table = Table(
            "block",
            "median norm",
            "outliers",
            "their norm",
            "outliers after the final norm",
            title=found.name,
        )
        for before, after in zip(found.norms.blocks, found.norms.normed, strict=True):
            norm = f"{before.outlier_norm:.1f}" if before.outlier_norm is not None else "-"
            rate, normed = (f"{100 * side.outlier_rate:.2f} %" for side in (before, after))
            table.add_row(str(before.block), f"{before.median:.1f}", rate, norm, normed)
        console.print(table)
        console.print(verdict(found.norms))
        if found.sinks is not None:
            console.print(causes(found.sinks))
        if said := advice(found):
            console.print(said)
    _say(f"Written: {output / 'report.html'}, inspect.json and pictures")


@app.command
def export(
    model: Annotated[Positional[str], arg(metavar="RUN")],
    /,
    output: Path,
    format: Format,
    revision: Annotated[str | None, _unset("COMMIT")] = None,
) -> None:
    """Write a patched model in another format, load it back, and compare the two.

    Args:
        model: Run, adapter folder, or hub id of an adapter.
        output: Folder to write.
        format: timm, transformers (DINOv2 becomes DINOv2 with registers) and open_clip load in their own
            library without phreg. remote-code loads in transformers, with code in the folder. onnx loads in
            onnxruntime. merged (all weights) and adapter (changed weights) load by phreg.load.
        revision: Hub commit, branch or tag to pin.
    """
    from phreg import api
    from phreg.formats.export.spec import find_spec

    table = Table("size", "largest difference", "relative", "equal")
    for size in api.export(model, output, format=format, revision=revision):
        pixels = f"{size.size[0]}x{size.size[1]}"
        equal = "yes" if size.claimed else "no: differs at this size"
        table.add_row(pixels, f"{size.difference:.1e}", f"{size.relative:.1e}", equal)
    console.print(table)
    _say(f"Written and loaded back by {format}: {output}")
    load_line = find_spec(format).load_line
    _say(f"In Python:  {load_line.format(folder=_inside_quotes(output))}")


@app.command
def evaluate(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL…", help_behavior_hint="(required)")],
    /,
    task: str,
    data: str,
    output: Path,
    baseline: Annotated[str | None, _unset("MODEL")] = None,
    seeds: int = 1,
    protocol: Annotated[str | None, _unset("NAME")] = None,
    set: UseAppendAction[Annotated[tuple[tuple[str, ...], ...], arg(metavar="KEY=VALUE…")]] = (),
    max_drop: Annotated[float | None, _unset("DROP")] = None,
    mean: Annotated[tuple[float, float, float] | None, _unset("R G B")] = None,
    std: Annotated[tuple[float, float, float] | None, _unset("R G B")] = None,
    device: Annotated[str | None, _unset("DEVICE")] = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 16,
    seed: int = 0,
    cache: Annotated[Path | None, _unset("DIR")] = None,
    cache_limit: Annotated[float, arg(metavar="GB")] = 20.0,
) -> None:
    """Compare models in a task: segmentation, classification and more.

    Args:
        models: Hub ids, timm or open_clip names, local folders, runs or adapters.
        task: Name of the task; `phreg tasks` lists them.
        data: Images and labels of the task.
        output: Folder for results.json, results.md and, in object discovery, maps.png. A rerun continues
            after finished runs. Results of another task, other data or other settings are refused.
        baseline: Model that the others are compared with; figures at artifacts use its artifacts. Unset
            compares with the first model, without figures at artifacts.
        seeds: Runs of each model. Several runs give a standard deviation. A deterministic task runs once.
        protocol: Named set of the task's settings.
        set: Settings of the task, such as `neighbours=10 reading.size=448`. `phreg tasks TASK` lists them.
        max_drop: Largest drop behind the baseline, e.g. 0.01, of the first figure and, in classification, of
            every top-1. A larger drop exits with status 3.
        mean: Mean that images are normalised with, on a scale of 0 to 1. Unset takes it from each model or
            its image processor.
        std: Standard deviation that images are normalised with. Unset works as for mean.
        device: Device to run on. Unset means a GPU if there is one.
        precision: Precision of the models' forward passes.
        batch_size: Images per forward pass.
        seed: The first seed.
        cache: Folder for cached features. Unset means features/ in the output.
        cache_limit: Largest size of the cache, in gigabytes.
    """
    with _evaluating(output), ProgressReporter() as doing:
        from phreg import api

        results = api.evaluate(
            *models, task=task, data=data, output=output, baseline=baseline, seeds=seeds, seed=seed,
            protocol=protocol, max_drop=max_drop, mean=mean, std=std, device=device, precision=precision,
            batch_size=batch_size, cache=cache, cache_limit=cache_limit, observe=doing,
            **_assignments([*chain(*set)]),
        )  # fmt: skip
    _show_results(results, output)
    if max_drop is not None:
        console.print(f"Check passed: no drop of more than {max_drop:g}.")


@contextmanager
def _evaluating(output: Path) -> Iterator[None]:
    """Shows what was found where a figure dropped too far, and says how to go on where the user stopped."""
    try:
        yield
    except MaxDropError as failed:
        _show_results(failed.results, output)
        raise
    except KeyboardInterrupt as stopped:
        raise Interrupted(
            f"stopped; finished runs and features are in {output}: give the same command again to continue "
            "after them"
        ) from stopped


@app.command
def tasks(task: Annotated[Positional[str | None], _unset("[TASK]")] = None, /) -> None:
    """List the tasks of `phreg evaluate`, or the settings of one.

    Args:
        task: Task whose settings to list.
    """
    from phreg.evaluation.tasks.table import TASKS, find_task, protocols

    if task is None:
        table = Table("task", "what it measures")
        for name in TASKS:
            table.add_row(name, (find_task(name).__doc__ or "").partition("\n")[0])
        console.print(table)
        return
    found = find_task(task)
    table = Table("setting", "default", "what it is", title=task)
    defaults = config.flatten(found.Settings().model_dump())
    for key, field in config.fields(found.Settings).items():
        table.add_row(key, str(defaults[key]), " ".join((field.description or "").split()))
    console.print(table)
    console.print(f"Data: {found.DATA}.")
    if protocols(found):
        console.print(f"Protocols: {', '.join(protocols(found))}")


def _assignments(given: Sequence[str]) -> dict[str, Any]:
    """Reads settings of a task given as KEY=VALUE."""
    flags = [
        name for name, flag in signature(evaluate).parameters.items() if flag.kind != flag.POSITIONAL_ONLY
    ]
    problems = [f"{text}: expected KEY=VALUE" for text in given if not text.partition("=")[2]]
    keys = [text.partition("=")[0] for text in given]
    for key in dict.fromkeys(keys):
        if (flag := current_name("evaluate", key)) in flags:
            problems.append(f"{key}: no setting of a task; give it by --{flag.replace('_', '-')}")
        elif key == "observe":
            problems.append(f"{key}: unknown key")  # of phreg.evaluate alone
        if keys.count(key) > 1:
            problems.append(f"{key}: given {keys.count(key)} times; keep one")
    if problems:
        raise ConfigError("--set", problems)
    return {key: _value(text) for key, _, text in (item.partition("=") for item in given)}


def _value(text: str) -> Any:
    """Reads lists and tables as TOML; all else stays a text, which the setting makes sense of, commas too."""
    if text[0] not in "[{" or text == "{}":  # which is a template, and no table
        return text
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


@app.command
def push(
    model: Annotated[Positional[str], arg(metavar="RUN")],
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    /,
    format: Annotated[Format | None, _unset("|".join(get_args(Format)))] = None,
    private: bool = False,
    revision: Annotated[str | None, _unset("BRANCH")] = None,
    dry_run: Annotated[Path | None, _unset("DIR")] = None,
) -> None:
    """Upload a run's adapter, or an export, to the Hugging Face hub, with a generated model card.

    Args:
        model: Run, adapter, or exported folder.
        repository: Repository to push to. It is created if it does not exist.
        format: Format of `phreg export` to convert to first. Unset means no conversion.
        private: Push to a private repository. A public one is refused.
        revision: Branch to commit to. Unset means the main branch.
        dry_run: Folder to write instead of pushing.
    """
    from phreg import api

    pushed = api.push(model, repository, format=format, private=private, revision=revision, dry_run=dry_run)
    what = f"{len(pushed.files)} files, {pushed.num_bytes / 1e6:.1f} MB"
    if pushed.commit is None:
        _say(f"Nothing was pushed. {repository} would hold {pushed.folder}: {what}")
    else:
        _say(f"Pushed {what}: {pushed.commit}")
        _say(f'In Python:  model = phreg.load("{repository}")')


@app.command
def info(
    path: Annotated[Positional[str], arg(metavar="PATH")],
    /,
    base: Annotated[str | None, _unset("MODEL")] = None,
    revision: Annotated[str | None, _unset("COMMIT")] = None,
    json: bool = False,
) -> None:
    """Describe an adapter, a run, an export or a hub id, and check whether its base fits.

    Args:
        path: Folder, or hub id.
        base: Model to check as its base. Unset means the base that it names, if that is on this disk.
        revision: Hub commit, branch or tag to pin.
        json: Print JSON.
    """
    from phreg.formats.info import info as describe

    shown = describe(path, revision=revision, base=base)
    if json:
        console.print_json(data=shown.to_json())
        return
    table = Table("", Column("", overflow="fold"), show_header=False)
    for name, value in _described(shown):
        table.add_row(name, value)
    console.print(table)
    if shown.figures:
        _table(shown.figures)


@app.command
def recipes() -> None:
    """List the shipped recipes."""
    # Names are there to be copied.
    table = Table(Column("recipe", overflow="fold"), Column("model", overflow="fold"), "method")
    for name, path in config.recipes().items():
        settings = config.read_toml(path)
        table.add_row(name, settings.get("model", "any"), settings.get("method", "relocate"))
    console.print(table)


class ProgressReporter(AbstractContextManager["ProgressReporter"]):
    """Shows progress by the name of the work: bars on a terminal, a line every few seconds elsewhere."""

    def __init__(self) -> None:
        what = TextColumn("{task.description}", markup=False)
        columns = [what, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._progress = Progress(*columns, console=console, transient=True)
        self._tasks: dict[str, Any] = {}
        self._last = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Shows one more part done."""
        if console.is_terminal:
            if what not in self._tasks:
                self._progress.start()
                self._tasks[what] = self._progress.add_task(what, total=total)
            self._progress.update(self._tasks[what], completed=done, visible=done < total)
        elif what not in self._tasks or done == total or time.perf_counter() - self._last > LINE_EVERY:
            self._tasks[what] = None  # one line when it begins
            self._last = time.perf_counter()
            _say(f"{what} {done}/{total}")


class TrainingProgress(AbstractContextManager["TrainingProgress"]):
    """Shows training steps: a bar on a terminal, a line every few seconds elsewhere."""

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
            console.print(f"step {record.step}/{steps}  loss {record.loss:.4f}  {speed}")


def _say(text: str, *, alarm: str = "", to: Console = console) -> None:
    """Prints a path or a command, unchanged and without line breaks, so that it can be copied."""
    to.print(Text.assemble((alarm, "bold red"), text), soft_wrap=True)


def _inside_quotes(path: Any) -> str:
    """Escapes a path for a Python string in double quotes."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1]


def _show_results(results: Any, output: Path) -> None:
    """Prints the table of an evaluation."""
    heading, rows = results.rows()
    model = Column(heading[0], overflow="fold")  # paths are long, and told apart by their ends
    table = Table(model, *heading[1:], title=f"{results.records[0].task} on {results.records[0].data}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(results.legend())
    _say(f"Written: {output / 'results.json'} and results.md")


def _show(result: Any) -> None:
    """Prints what a run found, and its before/after table."""
    from phreg.report.verdict import causes, nothing_gained, nothing_to_repair

    outcome = result.outcome
    if result.unchanged:
        console.print(nothing_gained(outcome.steps) if outcome else nothing_to_repair(result.norms))
        return
    if result.sinks is not None:
        console.print(causes(result.sinks))
    if outcome.images:
        done = (
            f"{outcome.steps} steps in all; in this session {outcome.images} images, {outcome.seconds:.0f} s"
        )
        console.print(done)
    elif outcome.steps:
        console.print("The run had finished before.")
    if outcome.skipped:
        _say(f"{len(outcome.skipped)} unreadable images were skipped: {', '.join(outcome.skipped[:5])}")
    if result.comparison is None:
        console.print("Not measured (--measure.images 0), so nothing was checked.")
        return
    apart = "not trained on" if result.comparison.held_out else "that were trained on too"
    _table(result.comparison.rows(), title=f"on {result.comparison.images} images {apart}")
    before, after = (norms.outlier_rate for norms in result.comparison.norms)
    if before and after > REMAINING * before:
        console.print(
            f"{after / before:.0%} of the artifacts remain. Train on more images, or for more epochs."
        )
    for failure in result.failures:
        _say(f"{failure}.", alarm="Check failed: ")
    if result.failures:
        console.print("The adapter is written, and marked in phreg.json and in its model card.")


REMAINING = 0.05
"""Largest share of remaining artifacts that is not reported."""

CHECK_FAILED = 3
"""Exit status of a run or an evaluation with a failed check."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells set it."""

TERMINATED = 143
"""Exit status after SIGTERM, as shells set it."""


def _table(rows: Sequence[Any], title: str | None = None) -> None:
    """Prints figures before and after."""
    table = Table("figure", "before", "after", title=title)
    for row in rows:
        sides = ("-" if value is None else f"{value:.4f}" for value in (row.before, row.after))
        table.add_row(row.name, *sides)
    console.print(table)


def _described(shown: Any) -> list[tuple[str, str]]:
    """Describes what `phreg info` found, line by line."""
    from phreg.formats.export.spec import needs_base

    base = shown.base
    fits = {
        "whole": "yes, this base is the one it was made from",
        "tower": "yes, this vision tower is that of its base",
        "no": "no, this base has other weights",
        "unknown": "not checked; give the base by --base",
    }
    checks = "none failed" if shown.figures else "not made"
    if shown.failures:
        checks = f"failed: {'; '.join(shown.failures)}"
    sizes = (f"{high}x{wide} {'yes' if claimed else 'no'}" for (high, wide), claimed in shown.sizes)
    lines = [
        ("format", f"{shown.format}, version {shown.format_version}"),
        ("class", shown.model_class),
        ("base", "-" if base is None else f"{base.source} ({base.library})"),
        ("base revision", base.revision or "-" if base else "-"),
        ("base sha256", base.sha256 if base else "-"),
        ("registers", str(shown.registers)),
        ("method", "-" if shown.method is None else f"{shown.method}, {shown.steps} steps"),
        ("checks", checks),
        ("tensors", f"{shown.tensors}, {shown.num_bytes / 1e6:.2f} MB"),
        ("equal at", ", ".join(sizes) or "-"),
        ("versions", ", ".join(f"{name} {number}" for name, number in shown.versions.items())),
    ]
    if needs_base(shown.format):
        lines.append(("fits", fits[shown.fits]))
    return lines


@contextmanager
def _old_names_logged() -> Iterator[None]:
    """Logs each old name that is used, once, in place of Python's warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", OldNameWarning)
        show, logged = warnings.showwarning, set[str]()

        def log(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, OldNameWarning):
                show(message, category, *where, **more)
            elif str(message) not in logged:
                logged.add(str(message))
                logger.warning("%s", message)

        warnings.showwarning = log
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a deliberate error is printed without a traceback."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", datefmt="[%X]",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_level=False)],
    )  # fmt: skip
    logger.setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # which warns of fonts that no chart needs
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        console.print(f"phreg {__version__}")
        return
    # Ends as an exception does, so that what was begun is tidied up.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with _old_names_logged():
            app.cli(prog="phreg", args=current_command_line(words))
    except PhregError as error:
        _say(str(error), alarm="phreg: ", to=Console(stderr=True, **PLAIN))
        if isinstance(error, MaxDropError):
            sys.exit(CHECK_FAILED)
        sys.exit(INTERRUPTED if isinstance(error, Interrupted) else 1)
    finally:
        signal.signal(signal.SIGTERM, before)
