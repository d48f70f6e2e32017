"""The tables of `phreg evaluate`, `phreg inspect` and `phreg tasks`, each within 80 columns.

Folders of models are named by their last parts; their whole paths are in the files that are written.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.padding import Padding
from rich.table import Column, Table

from phreg.cli.printing import NUMBER, console, say
from phreg.settings import fields, flatten


def print_results(results: Any, output: Path, *, sweep: bool = False) -> None:
    """Prints what an evaluation found, one figure after the other, and a line about each.

    Of several processes, only the main one prints.

    Args:
        results: The results.
        output: Where they were written.
        sweep: Print every combination of a task that tried several.
    """
    from phreg.evaluation.processes import is_main_process

    if not is_main_process():
        return
    shown = _with_short_names(results)
    first = shown.records[0]
    heading, rows = shown.rows()
    say(f"{first.task} on {first.data}" + (f": {rows[0][0]}" if len(rows) == 1 else ""))
    console.print(_results_table(heading, rows))
    heading, ranges = shown.interval_rows()
    if ranges:
        console.print("95 % intervals over pictures:")
        console.print(_results_table(heading, ranges))
    for name in first.figures:
        console.print(first.metrics[name].sentence())
    console.print(shown.legend())
    if sweep:
        others = [record for record in shown.records if record is not shown.baseline]
        for record in [*([shown.baseline] if shown.baseline else []), *others]:
            _print_sweep(record)
    elif first.sweep:
        console.print("With --sweep, the same command lists every combination.")
    say(f"Written: {output / 'results.json'} and results.md")


def _with_short_names(results: Any) -> Any:
    """Names the models of results by the last parts of their folders."""
    from phreg.api.arguments import short_names

    records = [record for record in (*results.records, results.baseline, results.first) if record is not None]
    named = {record.model: record for record in records}
    # By the old name, so that a record that stands twice stays one.
    renamed = {record.model: replace(record, model=short) for short, record in short_names(named).items()}
    others = {
        place: renamed[record.model]
        for place in ("baseline", "first")
        if (record := getattr(results, place)) is not None
    }
    return replace(results, records=tuple(renamed[record.model] for record in results.records), **others)


def _results_table(heading: list[str], rows: list[list[str]]) -> Table:
    """Lays out a row a figure or, of several models, a row a model under each figure."""
    several = len(rows) > 1
    name = Column("figure, model" if several else "figure", overflow="fold")
    table = Table(name, Column("value", justify="right", overflow="fold"))
    for column, figure in enumerate(heading[1:], start=1):
        if not several:
            table.add_row(figure, rows[0][column])
            continue
        table.add_row(figure, "")
        for row in rows:
            table.add_row(f"  {row[0]}", row[column], end_section=row is rows[-1])
    return table


def _print_sweep(record: Any) -> None:
    """Prints what each combination reached."""
    name = record.notes[0]["sweep"]
    spec = record.metrics[name]
    table = Table("combination", Column(f"{spec.heading}, {spec.shown_unit}", **NUMBER), title=record.model)
    for combination in record.detail[name]:
        table.add_row(combination, record.detail_text(name, combination))
    console.print(table)


def print_norms(found: Any) -> None:
    """Prints the norms of a model's patch tokens, block by block."""
    names = ("block", "median norm", "outliers", "their norm", "after the final norm")
    table = Table(*(Column(name, justify="right") for name in names), title=found.name)
    for before, after in zip(found.norms.blocks, found.norms.normed, strict=True):
        norm = f"{before.outlier_norm:.1f}" if before.outlier_norm is not None else "-"
        rate, normed = (f"{100 * side.outlier_rate:.2f} %" for side in (before, after))
        table.add_row(str(before.block), f"{before.median:.1f}", rate, norm, normed)
    console.print(table)
    console.print(
        "outliers: share of patch tokens whose norm lies beyond a gap in the model's own norms; the last "
        "column counts them after the final norm. Fewer are better."
    )


def _summary(task: Any) -> str:
    return (task.__doc__ or "").partition("\n")[0]


def print_tasks(tasks: dict[str, Any]) -> None:
    """Prints what each task measures, and which data it takes."""
    for name, task in tasks.items():
        say(name)
        for line in (_summary(task), f"--data: {task.DATA}"):
            console.print(Padding(line, (0, 0, 0, 2), expand=False))
    console.print("phreg tasks TASK shows how its data lies on disk, its figures and its settings.")


def print_task(name: str, task: Any, protocols: list[str]) -> None:
    """Prints a task's data as a folder tree, its figures, and its settings."""
    console.print(f"{name}: {_summary(task)}")
    console.print(f"\nData: {task.DATA}.")
    console.print(task.TREE)
    console.print("\nFigures:")
    for spec in task.METRICS:
        console.print(Padding(spec.sentence(), (0, 0, 0, 2), expand=False))
    console.print("\nSettings, for --set:")
    defaults = flatten(task.Settings().model_dump())
    for key, field in fields(task.Settings).items():
        say(f"  {key}={defaults[key]}")
        console.print(Padding(" ".join((field.description or "").split()), (0, 0, 0, 6), expand=False))
    if protocols:
        console.print(f"Protocols: {', '.join(protocols)}")
