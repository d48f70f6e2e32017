"""Runs a library's tests in its three modes, each in a process of its own, and compares them."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import phreg

from .comparison import MODES, Comparison, Mode, Outcome, compare, read_expected
from .library import HERE, Library
from .sources import SuiteError, fetch

PYTEST_RESULTS = {0, 1}
"""Exit statuses of pytest after which every test has an outcome: all passed, or some failed."""


@dataclass(frozen=True)
class Suite:
    """What a library's tests did, by mode, and the verdicts on the two modes with patched models."""

    library: str
    outcomes: dict[Mode, dict[str, Outcome]]
    comparisons: dict[Mode, Comparison]

    @property
    def problems(self) -> list[str]:
        """Says what is not as expected, a line each."""
        found = []
        for mode, comparison in self.comparisons.items():
            found += [f"{self.library}, {mode}: {problem}" for problem in comparison.problems]
            if not self.models(mode):
                found.append(f"{self.library}, {mode}: no model was patched, so that nothing was tested")
        return found

    def models(self, mode: Mode) -> int:
        """Counts the models that were patched."""
        return sum(outcome.models for outcome in self.outcomes[mode].values())

    def counts(self, mode: Mode) -> dict[str, int]:
        """Counts tests by result; on patched models, without those that fail on stock ones too."""
        left_out = self.comparisons[mode].stock_failures if mode in self.comparisons else ()
        results = Counter(
            outcome.result for test, outcome in self.outcomes[mode].items() if test not in set(left_out)
        )
        return {name: results[name] for name in ("passed", "failed", "skipped")}


def run(library: Library, *, fast: bool = False, options: Sequence[str] = ()) -> Suite:
    """Runs a library's tests on stock and patched models, and on those with registers removed again.

    Args:
        library: The library.
        fast: Whether to run the fast core alone. Of stock models it runs the tests that failed on others.
        options: Further options of pytest, which may choose some of the tests.

    Raises:
        SuiteError: The tests cannot be had, or pytest broke off.
    """
    folder = fetch(library)
    chosen = [*library.options, *(library.fast if fast else ()), *options]
    outcomes: dict[Mode, dict[str, Outcome]] = {}
    for mode in MODES[1:] if fast else MODES:
        outcomes[mode] = run_tests(folder, library, mode, [*chosen, *library.all_tests])
    if fast:
        failed = {
            test
            for found in outcomes.values()
            for test, outcome in found.items()
            if outcome.result == "failed"
        }
        again = [*library.options, *sorted(failed)]
        outcomes["stock"] = run_tests(folder, library, "stock", again) if failed else {}
    comparisons: dict[Mode, Comparison] = {}
    for mode in MODES[1:]:
        expected = read_expected(library.name, mode)
        whole = not fast and not options
        comparisons[mode] = compare(outcomes[mode], outcomes["stock"], expected, whole=whole)
    return Suite(library.name, outcomes, comparisons)


def run_tests(folder: Path, library: Library, mode: Mode, arguments: Sequence[str]) -> dict[str, Outcome]:
    """Runs tests in one mode.

    Args:
        folder: Holds `tests/`.
        library: Whose constructors are wrapped.
        mode: What becomes of constructed models.
        arguments: Names of tests, and further options of pytest.

    Returns:
        Outcomes by the tests' names.

    Raises:
        SuiteError: pytest broke off before the last test.
    """
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "outcomes.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", f"{HERE.name}.plugin"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["-c", str(folder / "pytest.ini"), f"--rootdir={folder}", "-W", "ignore"]
        command += [f"--phreg-library={library.name}", f"--phreg-mode={mode}", f"--phreg-outcomes={path}"]
        found = [str(HERE.parent), str(Path(phreg.__file__).parents[1]), str(folder / "requirements")]
        found += filter(None, [os.environ.get("PYTHONPATH")])
        environment = os.environ | dict(library.environment) | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*command, *arguments],
            cwd=folder,
            env=environment | {"PYTHONPATH": os.pathsep.join(found)},
            capture_output=True,
            text=True,
        )
        if done.returncode not in PYTEST_RESULTS or not path.is_file():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
            raise SuiteError(f"pytest of {library.name}, {mode}, ended with {done.returncode}:\n{tail}")
        read = json.loads(path.read_text(encoding="utf-8"))
    return {test: Outcome(**outcome) for test, outcome in read.items()}


def as_json(suite: Suite) -> dict[str, object]:
    """Gives counts, expected failures and problems as JSON holds them."""
    return {
        "library": suite.library,
        "counts": {mode: suite.counts(mode) for mode in suite.outcomes},
        "models_patched": {mode: suite.models(mode) for mode in suite.comparisons},
        "seconds": {
            mode: round(sum(outcome.seconds for outcome in found.values()), 1)
            for mode, found in suite.outcomes.items()
        },
        "fail_on_stock_too": {
            test: suite.outcomes[mode][test].message
            for mode, comparison in suite.comparisons.items()
            for test in comparison.stock_failures
        },
        "expected_failures": {mode: comparison.expected for mode, comparison in suite.comparisons.items()},
        "problems": suite.problems,
    }


def as_table(suites: Sequence[Suite]) -> str:
    """Draws the table of all suites in Markdown: passed / failed / skipped tests of each mode."""
    lines = [
        "| suite | stock | patched | removed | fail on stock too | models patched | expected failures |",
        "|---|---|---|---|---|---|---|",
    ]
    for suite in suites:
        cells = [" / ".join(str(count) for count in suite.counts(mode).values()) for mode in MODES]
        both = {test for comparison in suite.comparisons.values() for test in comparison.stock_failures}
        reasons = [
            f"{mode}: {len(tests)} x {reason}"
            for mode, comparison in suite.comparisons.items()
            for reason, tests in comparison.expected.items()
        ]
        cells += [str(len(both)), str(suite.models("patched")), "; ".join(reasons) or "none"]
        lines.append(f"| {suite.library} | {' | '.join(cells)} |")
    return "\n".join(lines)
