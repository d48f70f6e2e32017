"""Runs the model libraries' own tests on patched models: `python -m tests.suites timm peft`."""

import argparse
import json
import sys
from pathlib import Path

from .library import LIBRARIES
from .runner import as_json, as_table, run
from .sources import SuiteError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.suites", description=__doc__)
    parser.add_argument("libraries", nargs="+", choices=sorted(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--fast", action="store_true", help="the fast core alone")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument(
        "--pytest", action="append", default=[], help="a further option of pytest; repeatable"
    )
    arguments = parser.parse_args()
    try:
        chosen = [LIBRARIES[name] for name in arguments.libraries]
        suites = [run(library, fast=arguments.fast, options=arguments.pytest) for library in chosen]
    except SuiteError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    if arguments.json:
        results = [as_json(suite) for suite in suites]
        arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    problems = [problem for suite in suites for problem in suite.problems]
    sys.stdout.write("\n".join([as_table(suites), "", *problems, ""]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
