"""The commands: flags in, tables out. The work is done in `phreg.api`.

A command imports what it runs when it runs, so that `phreg --help` stays fast.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, get_args

from rich.table import Column, Table
from tyro.conf import Positional, UseAppendAction, arg
from tyro.extras import SubcommandApp

from phreg.cli.flags import Settings, task_settings, unset
from phreg.cli.printing import (
    console,
    description,
    inside_quotes,
    print_figures,
    print_next,
    print_run,
    say,
)
from phreg.cli.progress import ProgressReporter
from phreg.cli.tables import print_norms, print_results, print_task, print_tasks
from phreg.config import DistillConfig
from phreg.errors import MaxDropError
from phreg.formats import Format
from phreg.progress import told_to
from phreg.settings import read_toml
from phreg.settings import recipes as shipped_recipes

app = SubcommandApp()

ABOUT = """Give register tokens to a pretrained Vision Transformer, so that its patch
features lose their artifacts.

The usual order, with a model, a folder of images, and a task's data:

  phreg inspect facebook/dinov2-small --images photos/ --output look/
  phreg distill facebook/dinov2-small --images photos/ --output run/
  phreg evaluate facebook/dinov2-small run/ --task dense-nn --data voc/ \\
      --output scores/
  phreg export run/ --format transformers --output dinov2-small-reg/

phreg COMMAND --help tells more of each. phreg quickstart shows all in minutes,
phreg --version the version.
"""

CHECK_FAILED = 3
"""Exit status of a run or an evaluation with a failed check."""


@app.command
def quickstart(output: Path = Path("runs/quickstart")) -> None:
    """Repair a demonstration model with planted artifacts: offline, minutes on a CPU.

    Args:
        output: Run folder to write.
    """
    from phreg import api

    started = time.perf_counter()
    with ProgressReporter() as doing, told_to(doing, doing.stopping):
        result = api.quickstart(output, observe=doing.step)
    print_run(result)
    seconds = time.perf_counter() - started
    say(f"\nDone in {seconds:.0f} s. Open {output / 'report' / 'report.html'} in a browser.")
    say("This was a demonstration model. For a real model:")
    say("  phreg distill facebook/dinov2-small --images photos/ --output runs/dinov2-small-reg")
    if result.failures:
        sys.exit(CHECK_FAILED)


@app.command
def distill(
    model: Annotated[Positional[str | None], unset("[MODEL]")] = None,
    /,
    *,
    settings: Annotated[Settings, arg(name="")],
    recipe: Annotated[str | None, unset("NAME|FILE")] = None,
    resume: bool = False,
) -> None:
    """Retrofit registers onto a model by self-distillation.

    The flags that most runs need come first. The others have defaults for any model.

      phreg distill facebook/dinov2-small --images photos/ --output run/
      phreg distill timm/vit_small_patch16_224 --images photos/ --output run/
      phreg distill --recipe mine.toml --resume

    Args:
        model: Hub id, timm or open_clip name, or local folder. The recipe can name it instead.
        settings: The settings of phreg.config.
        recipe: Name of a shipped recipe (`phreg recipes` lists them), or path of a TOML file.
        resume: Continue the run in --output.
    """
    from phreg import api

    with ProgressReporter() as doing, told_to(doing, doing.stopping):
        result = api.distill(model, recipe=recipe, resume=resume, observe=doing.step, **settings)
    if result.main_process:
        print_run(result)
        print_next(result, model or "MODEL")
    if result.failures:
        sys.exit(CHECK_FAILED)


@app.command
def inspect(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    /,
    images: str,
    output: Path,
    baseline: Annotated[tuple[str, ...], unset("MODEL…")] = (),
    size: Annotated[int | tuple[int, int] | None, unset("HEIGHT [WIDTH]")] = None,
    count: int = 64,
    labels: Annotated[str | None, unset("PATH")] = None,
    texts: Annotated[tuple[str, ...], unset("TEXT…")] = (),
    mean: Annotated[tuple[float, float, float] | None, unset("R G B")] = None,
    std: Annotated[tuple[float, float, float] | None, unset("R G B")] = None,
    device: Annotated[str | None, unset("DEVICE")] = None,
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

    with ProgressReporter() as doing, told_to(doing):
        inspection = api.inspect(
            model, images, baseline=baseline, output=output, size=size, count=count, labels=labels,
            texts=texts, mean=mean, std=std, device=device,
        )  # fmt: skip
    for found in inspection.models:
        print_norms(found)
        console.print(verdict(found.norms))
        if found.sinks is not None:
            console.print(causes(found.sinks))
        if said := advice(found):
            console.print(said)
    say(f"Written: {output / 'report.html'}, inspect.json and pictures")


@app.command
def export(
    model: Annotated[Positional[str], arg(metavar="RUN")],
    /,
    output: Path,
    format: Format,
    revision: Annotated[str | None, unset("COMMIT")] = None,
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
    figures = api.export(model, output, format=format, revision=revision)
    for size in figures:
        pixels = f"{size.size[0]}x{size.size[1]}"
        equal = "yes" if size.claimed else "no: differs at this size"
        table.add_row(pixels, f"{size.difference:.1e}", f"{size.relative:.1e}", equal)
    console.print(table)
    if not all(size.claimed for size in figures):
        console.print(
            f"At sizes that differ, the class of {format} resamples position embeddings in another way than "
            "the trained model. Use images of an equal size, or a format that is equal at all: remote-code, "
            "merged. A run with --target.native-size makes --size the model's own."
        )
    say(f"Written and loaded back by {format}: {output}")
    load_line = find_spec(format).load_line
    say(f"In Python:  {load_line.format(folder=inside_quotes(output))}")


@app.command
def evaluate(
    models: Annotated[Positional[tuple[str, ...]], arg(metavar="MODEL…", help_behavior_hint="(required)")],
    /,
    task: str,
    data: str,
    output: Path,
    baseline: Annotated[str | None, unset("MODEL")] = None,
    seeds: int = 1,
    protocol: Annotated[str | None, unset("NAME")] = None,
    set: UseAppendAction[Annotated[tuple[tuple[str, ...], ...], arg(metavar="KEY=VALUE…")]] = (),
    max_drop: Annotated[float | None, unset("DROP")] = None,
    mean: Annotated[tuple[float, float, float] | None, unset("R G B")] = None,
    std: Annotated[tuple[float, float, float] | None, unset("R G B")] = None,
    device: Annotated[str | None, unset("DEVICE")] = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 16,
    workers: Annotated[int | None, unset("THREADS")] = None,
    seed: int = 0,
    cache: Annotated[Path | None, unset("DIR")] = None,
    cache_limit: Annotated[float, arg(metavar="GB")] = 20.0,
    sweep: bool = False,
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
        workers: Threads that decode images. Unset means as many as there are cores, at most 8.
        seed: The first seed.
        cache: Folder for cached features. Unset means features/ in the output.
        cache_limit: Largest size of the cache, in gigabytes.
        sweep: Print what every combination reached, in a task that tries several, such as object discovery.
    """
    with _evaluating(output), ProgressReporter() as doing:
        from phreg import api

        results = api.evaluate(
            *models, task=task, data=data, output=output, baseline=baseline, seeds=seeds, seed=seed,
            protocol=protocol, max_drop=max_drop, mean=mean, std=std, device=device, precision=precision,
            batch_size=batch_size, workers=workers, cache=cache, cache_limit=cache_limit, observe=doing,
            **task_settings([*chain(*set)], evaluate),
        )  # fmt: skip
    print_results(results, output, sweep=sweep)
    if max_drop is not None:
        console.print(f"Check passed: no drop of more than {max_drop:g}.")


@contextmanager
def _evaluating(output: Path) -> Iterator[None]:
    """Shows what was found where a figure dropped too far."""
    try:
        yield
    except MaxDropError as failed:
        print_results(failed.results, output)
        raise


@app.command
def tasks(task: Annotated[Positional[str | None], unset("[TASK]")] = None, /) -> None:
    """List the tasks of `phreg evaluate`, or the data, figures and settings of one.

    Args:
        task: Task to describe.
    """
    from phreg.evaluation.tasks.table import TASKS, find_task, protocols

    if task is None:
        print_tasks({name: find_task(name) for name in TASKS})
        return
    found = find_task(task)
    print_task(task, found, [*protocols(found)])


@app.command
def push(
    model: Annotated[Positional[str], arg(metavar="RUN")],
    repository: Annotated[Positional[str], arg(metavar="OWNER/NAME")],
    /,
    format: Annotated[Format | None, unset("|".join(get_args(Format)))] = None,
    private: bool = False,
    revision: Annotated[str | None, unset("BRANCH")] = None,
    dry_run: Annotated[Path | None, unset("DIR")] = None,
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
        say(f"Nothing was pushed. {repository} would hold {pushed.folder}: {what}")
    else:
        say(f"Pushed {what}: {pushed.commit}")
        say(f'In Python:  model = phreg.load("{repository}")')


@app.command
def info(
    path: Annotated[Positional[str], arg(metavar="PATH")],
    /,
    base: Annotated[str | None, unset("MODEL")] = None,
    revision: Annotated[str | None, unset("COMMIT")] = None,
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
    for name, value in description(shown):
        table.add_row(name, value)
    console.print(table)
    if shown.figures:
        print_figures(shown.figures)


@app.command
def recipes() -> None:
    """List the shipped recipes."""
    # Names are there to be copied.
    table = Table(Column("recipe", overflow="fold"), Column("model", overflow="fold"), "method")
    for name, path in shipped_recipes().items():
        settings = read_toml(path)
        table.add_row(
            name,
            settings.get("model", "any"),
            settings.get("method", DistillConfig.model_fields["method"].default),
        )
    console.print(table)


COMMANDS = {
    command.__name__: command
    for command in (quickstart, distill, inspect, export, evaluate, tasks, push, info, recipes)
}
"""The functions of the commands, by name."""
