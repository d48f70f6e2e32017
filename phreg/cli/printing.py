"""Prints what the verbs return: tables, verdicts, and lines to be copied.

Texts are printed without markup, since names of folders and models can hold any character.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

PLAIN: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
"""How consoles print: `[…]` and `:…:` have no special meaning."""

console = Console(**PLAIN)

REMAINING = 0.05
"""Largest share of remaining artifacts that is not reported."""


def say(text: str, *, alarm: str = "", to: Console = console) -> None:
    """Prints a path or a command, unchanged and without line breaks, so that it can be copied."""
    to.print(Text.assemble((alarm, "bold red"), text), soft_wrap=True)


def inside_quotes(path: Any) -> str:
    """Escapes a path for a Python string in double quotes."""
    return json.dumps(str(path), ensure_ascii=False)[1:-1]


def print_figures(rows: Sequence[Any], title: str | None = None) -> None:
    """Prints figures before and after."""
    table = Table("figure", "before", "after", title=title)
    for row in rows:
        sides = ("-" if value is None else f"{value:.4f}" for value in (row.before, row.after))
        table.add_row(row.name, *sides)
    console.print(table)


def print_run(result: Any) -> None:
    """Prints what a run found, and its before/after table."""
    from phreg.report import verdict

    outcome = result.outcome
    if result.unchanged:
        console.print(
            verdict.nothing_gained(outcome.steps)
            if outcome
            else verdict.nothing_to_repair(result.norms, result.consistency)
        )
        return
    if result.sinks is not None:
        console.print(verdict.causes(result.sinks))
    if outcome.steps:
        console.print(
            f"{outcome.steps} steps on {outcome.images} images in {outcome.seconds:.0f} s, over all sessions"
        )
    if outcome.skipped:
        say(f"{len(outcome.skipped)} unreadable images were skipped: {', '.join(outcome.skipped[:5])}")
    if result.comparison is None:
        console.print("Not measured (--measure.images 0), so nothing was checked.")
        return
    apart = "not trained on" if result.comparison.held_out else "that were trained on too"
    print_figures(result.comparison.rows(), title=f"on {result.comparison.images} images {apart}")
    before, after = (most.outlier_rate for most in result.comparison.most_outliers)
    if before and after > REMAINING * before:
        console.print(
            f"{after / before:.0%} of the artifacts remain. Train on more images, or for more epochs."
        )
    console.print(verdict.outcome(result.comparison))
    for failure in result.failures:
        say(f"{failure}.", alarm="Check failed: ")
    if result.failures:
        console.print(
            "The adapter is written, and marked in phreg.json and in its model card. Try, in this order: "
            "more images, more epochs, a smaller --optim.max-movement."
        )


def print_next(result: Any, model: str) -> None:
    """Prints where the report of a run is, and what to do with its model.

    Args:
        result: The run.
        model: Its base, as it was asked for.
    """
    say(f"\nReport:     {result.run / 'report' / 'report.html'}")
    say(f"Run folder: {result.run}")
    if result.unchanged:
        return
    base, run = shlex.quote(model), shlex.quote(str(result.run))
    say(f'In Python:  model = phreg.load("{inside_quotes(result.run)}")')
    say(f"Compare:    phreg evaluate {base} {run} --task TASK --data DATA --output FOLDER  (phreg tasks)")
    say(f"Export:     phreg export {run} --format FORMAT --output FOLDER  (phreg export --help)")


def print_results(results: Any, output: Path) -> None:
    """Prints the table of an evaluation, from the main one of its processes."""
    from phreg.evaluation.processes import is_main_process

    if not is_main_process():
        return
    heading, rows = results.rows()
    model = Column(heading[0], overflow="fold")  # paths are long, and told apart by their ends
    table = Table(model, *heading[1:], title=f"{results.records[0].task} on {results.records[0].data}")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    heading, rows = results.interval_rows()
    if rows:
        ranges = Table(model, *heading[1:], title="95 % intervals over pictures")
        for row in rows:
            ranges.add_row(*row)
        console.print(ranges)
    console.print(results.legend())
    say(f"Written: {output / 'results.json'} and results.md")


def description(shown: Any) -> list[tuple[str, str]]:
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
