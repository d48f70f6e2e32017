"""Judges what a library's tests did on patched models, by what they did on stock ones and what is expected.

Pure: outcomes and `expected.toml` go in, a `Comparison` comes out. A test that fails on stock models as well
says nothing about phreg; it is counted and left out.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Mode = Literal["stock", "patched", "removed"]
"""What becomes of constructed models: nothing, three registers, or three registers added and removed."""

MODES: tuple[Mode, ...] = ("stock", "patched", "removed")


@dataclass(frozen=True)
class Outcome:
    """What one test did.

    Attributes:
        result: `passed`, `failed` (errors of fixtures and of collection are failures) or `skipped`.
        models: Models that were patched while it ran.
        seconds: How long it took.
        message: The last line of the error; empty if there was none.
    """

    result: Literal["passed", "failed", "skipped"]
    models: int = 0
    seconds: float = 0.0
    message: str = ""


@dataclass(frozen=True)
class Expected:
    """A failure that is known: the test's name, in which `*` stands for anything, and the reason."""

    pattern: str
    reason: str

    def covers(self, test: str) -> bool:
        parts = map(re.escape, self.pattern.split("*"))
        return re.fullmatch(".*".join(parts), test) is not None


@dataclass(frozen=True)
class Comparison:
    """The verdict on one mode of one suite.

    Attributes:
        failures: Tests that fail, and neither fail on stock models nor are listed; with their errors.
        passes: Listed tests that pass, with the pattern that lists them.
        skips: Tests that pass on stock models and are skipped on patched ones.
        stale: Patterns that cover no test, where all tests were run.
        expected: Listed failures, by reason.
        stock_failures: Tests that fail on stock models too.
    """

    failures: dict[str, str] = field(default_factory=dict)
    passes: dict[str, str] = field(default_factory=dict)
    skips: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    expected: dict[str, list[str]] = field(default_factory=dict)
    stock_failures: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Says what is not as expected, a line each; empty where all is."""
        return [
            *(f"fails, and is not listed: {test}: {error}" for test, error in self.failures.items()),
            *(f"passes, though listed as {pattern}: {test}" for test, pattern in self.passes.items()),
            *(f"is skipped, though it passes on stock models: {test}" for test in self.skips),
            *(f"is listed, and there is no such test: {pattern}" for pattern in self.stale),
        ]


def compare(
    outcomes: Mapping[str, Outcome],
    stock: Mapping[str, Outcome],
    expected: Sequence[Expected],
    *,
    whole: bool = True,
) -> Comparison:
    """Compares a run on patched models with one on stock models.

    Args:
        outcomes: What each test did, by its name.
        stock: The same of stock models; of the tests that failed at least.
        expected: Known failures.
        whole: Whether all tests of the suite were run, so that a pattern without a test is out of date.
    """
    found = Comparison()
    by_reason = defaultdict(list)
    covered = set()
    for test, outcome in outcomes.items():
        entry = next((entry for entry in expected if entry.covers(test)), None)
        covered.update(entry for entry in expected if entry.covers(test))
        on_stock = stock[test].result if test in stock else None
        if on_stock == "failed":
            found.stock_failures.append(test)
        elif outcome.result == "failed" and entry is None:
            found.failures[test] = outcome.message
        elif outcome.result == "failed" and entry is not None:
            by_reason[entry.reason].append(test)
        elif outcome.result == "passed" and entry is not None:
            found.passes[test] = entry.pattern
        elif outcome.result == "skipped" and on_stock == "passed":
            found.skips.append(test)
    found.expected.update(by_reason)
    found.stale.extend(entry.pattern for entry in expected if whole and entry not in covered)
    return found


def read_expected(library: str, mode: Mode, path: Path | None = None) -> list[Expected]:
    """Reads the known failures of a library's tests in one mode.

    Raises:
        ValueError: A mode has another name, or a reason is empty.
    """
    path = path or Path(__file__).with_name("expected.toml")
    tables = tomllib.loads(path.read_text(encoding="utf-8")).get(library, {})
    if unknown := set(tables) - set(MODES[1:]):
        raise ValueError(f"{path.name} has modes {sorted(unknown)} of {library}; use {MODES[1:]}")
    entries = [Expected(pattern, reason) for pattern, reason in tables.get(mode, {}).items()]
    if empty := [entry.pattern for entry in entries if not entry.reason.strip()]:
        raise ValueError(f"{path.name} gives no reason for {empty}; say why the test fails")
    return entries
