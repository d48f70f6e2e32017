"""Mutation testing: puts one small fault at a time into a module of phreg, and asks whether a test fails.

    python -m tests.mutants [MODULE ...] [--seed 0] [--limit 80] [--output mutants.json]

    module ──ast──► mutants ──sample──► each in a forked process ──tests that run its line──► killed, survived

A fault inside a function goes into a process that has collected the tests: the function's code object is
replaced. A fault at a module's top level (constants, defaults) goes into a process that has not imported
phreg yet. Both are compiled by jaxtyping's import hook, as in any test run. Tests run fastest first, until
one fails, or the next would take their sum over `--budget` seconds. A mutant that takes over five times as
long as its tests did is stopped, and counts as killed.

`mutants.toml` names the test files of each module, and mutants that no test can kill, with the reason.
Not mutated: log lines, messages, docstrings, annotations, and moves between devices, which only a GPU shows.
"""

import argparse
import ast
import gc
import hashlib
import importlib
import importlib.machinery
import json
import os
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PLAN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
# Imported once, ahead of all forks.
LIBRARIES = (
    "accelerate",
    "kornia",
    "matplotlib.pyplot",
    "open_clip",
    "peft",
    "timm",
    "torch",
    "transformers",
)
OPTIONS = ["-o", "addopts=--strict-markers --import-mode=importlib", "-q", "-s", "-p", "no:cacheprovider"]
OPTIONS += ["-W", "ignore:Module already imported", f"--rootdir={ROOT}"]
OPTIONS += ["-m", "not slow and not gpu and not network and not real"]

# fmt: off
SWAPS: dict[type, tuple[str, ...]] = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.Is: ("is not",), ast.IsNot: ("is",), ast.In: ("not in",), ast.NotIn: ("in",),
    ast.Add: ("-",), ast.Sub: ("+",), ast.Mult: ("/",), ast.Div: ("*",), ast.FloorDiv: ("*",),
    ast.Mod: ("*",), ast.Pow: ("*",), ast.BitAnd: ("|",), ast.BitOr: ("&",),
    ast.And: ("or",), ast.Or: ("and",),
}
# fmt: on
DROPPED_METHODS = {
    "abs",
    "clamp",
    "clamp_min",
    "clone",
    "detach",
    "double",
    "eval",
    "flip",
    "float",
    "sqrt",
    "square",
}  # fmt: skip
KEPT_KEYWORDS = {"device", "non_blocking", "pin_memory", "stacklevel", "strict"}


@dataclass(frozen=True)
class Mutant:
    """One fault: a stretch of a module's bytes, and what replaces it."""

    line: int
    code: str  # the line of source
    change: str
    inside: bool  # a function; else at the top level
    lines: tuple[int, int]  # of its statement: tests that run any of them may notice
    span: tuple[int, int]
    text: str

    def apply(self, source: bytes) -> bytes:
        # With as many line breaks as before, so that code objects are known again by their first lines.
        breaks = "\n" * source[slice(*self.span)].count(b"\n")
        text = self.text + breaks if self.text in ("pass", "break") else f"({self.text}{breaks})"
        return source[: self.span[0]] + text.encode() + source[self.span[1] :]


def changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yields what may become of one node: the part that is replaced, and its new text."""
    text = ast.unparse
    match node:
        case ast.Compare(left=left, ops=ops, comparators=others):
            signs = [text(ast.Compare(ast.Name("a"), [op], [ast.Name("b")]))[2:-2] for op in ops]
            for index, op in enumerate(ops):
                for swap in SWAPS[type(op)]:
                    swapped = [*signs[:index], swap, *signs[index + 1 :]]
                    rest = (f"{sign} {text(other)}" for sign, other in zip(swapped, others, strict=True))
                    yield node, " ".join([text(left), *rest])
        case ast.BoolOp():
            yield node, f" {SWAPS[type(node.op)][0]} ".join(f"({text(value)})" for value in node.values)
        case ast.BinOp(op=op) if type(op) in SWAPS:
            yield node, f"({text(node.left)}) {SWAPS[type(op)][0]} ({text(node.right)})"
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node, text(node.operand)
        case ast.Constant(value=bool() | int() | float() as value):
            yield node, str(not value if isinstance(value, bool) else value + 1)
        case ast.Constant(value=str() as value) if " " not in value:
            yield node, repr(value + "_")
        case ast.Return(value=ast.Tuple(elts=parts) as value):
            yield value, ", ".join(map(text, reversed(parts)))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Delete() | ast.Break():
            yield node, "pass"
        case ast.Continue():
            yield node, "break"
        case ast.Call(func=function, args=args, keywords=keywords):
            if isinstance(function, ast.Attribute) and function.attr in DROPPED_METHODS:
                yield node, text(function.value)
            for keyword in keywords:
                if keyword.arg and keyword.arg not in KEPT_KEYWORDS:
                    rest = [one for one in keywords if one is not keyword]
                    yield node, text(ast.Call(function, args, rest))
    tests = [node.test] if isinstance(node, ast.If | ast.While | ast.IfExp) else getattr(node, "ifs", [])
    for test in tests:
        if not isinstance(test, ast.Compare | ast.UnaryOp):  # which are changed as what they are
            yield test, f"not ({text(test)})"


def find(source: bytes) -> list[Mutant]:
    """Lists the mutants of a module's source."""
    rows = source.splitlines(keepends=True)
    starts = [sum(map(len, rows[:number])) for number in range(len(rows))]
    found = []

    def walk(node: ast.AST, inside: bool, lines: tuple[int, int]) -> None:
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.JoinedStr():
                return
            case ast.Expr(value=ast.Constant() | ast.Call(func=ast.Attribute(value=ast.Name(id="logger")))):
                return  # docstrings and log lines
            case ast.Assign(targets=[ast.Name(id=name)]) if not inside and not name.isupper():
                return  # names of types
            case ast.keyword(arg=arg) if arg in KEPT_KEYWORDS:
                return
            case ast.match_case(pattern=pattern):
                lines = pattern.lineno, pattern.end_lineno or 0
            case ast.stmt():
                body = getattr(node, "body", None)  # of compound statements the head
                lines = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or 0
        for part, text in changes(node):
            start = starts[part.lineno - 1] + part.col_offset
            span = start, starts[part.end_lineno - 1] + part.end_col_offset
            change = f"{' '.join(source[slice(*span)].decode().split())} -> {text}"
            code = rows[part.lineno - 1].decode().strip()
            mutant = Mutant(part.lineno, code, change, inside, lines, span, text)
            if text != ast.unparse(part) and compiles(mutant.apply(source)):
                found.append(mutant)
        if isinstance(node, ast.Raise):
            return  # its message
        if isinstance(node, ast.FunctionDef):
            for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
                walk(default, inside, lines)
            for statement in node.body:
                walk(statement, True, lines)
            return
        for field, value in ast.iter_fields(node):
            if field not in ("annotation", "decorator_list", "bases"):
                for part in value if isinstance(value, list) else [value]:
                    if isinstance(part, ast.AST):
                        walk(part, inside, lines)

    walk(ast.parse(source), False, (0, 0))
    return found


def compiles(source: bytes) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def forked(work: Callable[[], Any], seconds: float) -> tuple[str, Any]:
    """Runs something in a process of its own: "done" and its value, or "error", or "timeout"."""
    with tempfile.TemporaryFile("w+") as channel:
        child = os.fork()
        if child == 0:
            signal.alarm(round(seconds))  # which ends the process, whatever it does
            if not os.environ.get("MUTANTS_DEBUG"):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
            status = 1
            try:
                json.dump(work(), channel)
                channel.flush()
                status = 0
            finally:
                os._exit(status)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            return "timeout", None
        channel.seek(0)
        return ("done", json.load(channel)) if status == 0 else ("error", None)


class Tests:
    """A pytest plugin that hands the collected tests to `work`, in place of running them."""

    def __init__(self, path: Path, work: Callable[["Tests"], Any]) -> None:
        self.path, self.work, self.value = str(path), work, None
        self.failed, self.lines, self.of_fixture = False, set(), {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.value = self.work(self)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        before, self.lines = self.lines, set()
        try:
            return (yield)
        finally:
            self.of_fixture[fixturedef] = self.lines
            self.lines = before | self.lines

    def passes(self, names: list[str]) -> bool:
        """Runs tests in this order until one fails."""
        self.failed = False
        for name, after in zip(names, [*names[1:], None], strict=True):
            item = self.items[name]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=self.items.get(after))
            if self.failed:
                return False
        return True

    def baseline(self) -> dict[str, tuple[float, set[int]]]:
        """Runs all tests on the module as it is: seconds, and lines of the module, of each that passes."""

        def trace(frame: Any, _event: str, _argument: Any) -> Any:
            if frame.f_code.co_filename != self.path:
                return None
            self.lines.add(frame.f_lineno)
            return trace

        measured = {}
        for name, item in self.items.items():
            self.lines, start = set(), time.perf_counter()
            sys.settrace(trace)
            passed = self.passes([name])
            sys.settrace(None)
            # What a shared fixture runs is run by all tests that use it.
            shared = (group[-1] for group in item._fixtureinfo.name2fixturedefs.values())
            if passed:
                lines = self.lines.union(*(self.of_fixture.get(one, ()) for one in shared))
                measured[name] = time.perf_counter() - start, lines
        return measured


def inject(name: str, source: bytes) -> None:
    """Replaces the code objects of an imported module's functions."""
    module = importlib.import_module(name)
    stack, codes = [module.__spec__.loader.source_to_code(source, module.__file__)], {}  # type: ignore[union-attr]
    while stack:
        code = stack.pop()
        codes[code.co_qualname, code.co_firstlineno] = code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for function in gc.get_objects():
        if type(function) is FunctionType and function.__code__.co_filename == module.__file__:
            code = function.__code__
            function.__code__ = codes.get((code.co_qualname, code.co_firstlineno), code)


def replace_on_import(path: Path, source: bytes) -> None:
    """Has a module's import read another source, and no cached bytecode."""
    read = importlib.machinery.SourceFileLoader.get_data

    def get_data(self: Any, asked: str) -> bytes:
        if asked.endswith(".pyc") and Path(asked).name.startswith(f"{path.stem}."):
            raise OSError("the cache is of the module as it was")
        return source if asked == str(path) else read(self, asked)

    importlib.machinery.SourceFileLoader.get_data = get_data  # type: ignore[method-assign]
    sys.dont_write_bytecode = True


def measure(name: str, limit: int, seed: int, budget: float) -> dict[str, Any]:
    """Tries a module's mutants."""
    path = ROOT / "phreg" / f"{name.replace('.', '/')}.py"
    source, files = path.read_bytes(), [str(ROOT / file) for file in PLAN["modules"][name]]
    every = find(source)
    # In the order of a hash of what they say, so that changes elsewhere do not change the sample.
    every.sort(key=lambda one: hashlib.sha256(repr((seed, one.code, one.change)).encode()).hexdigest())
    same = {(entry["code"], entry["change"]) for entry in PLAN["equivalent"] if entry["module"] == name}
    sample = sorted(every[:limit], key=lambda one: one.span)
    tried = [one for one in sample if (one.code, one.change) not in same]

    def chosen(measured: dict[str, Any], mutant: Mutant) -> tuple[list[str], float]:
        first, last = mutant.lines
        names, total = [], 0.0
        for test, (seconds, lines) in sorted(measured.items(), key=lambda entry: entry[1][0]):
            runs = not mutant.inside or any(first <= line <= last for line in lines)
            if runs and (not names or total + seconds <= budget):
                names, total = [*names, test], total + seconds
        return names, 10 + 5 * total

    def pytest_with(work: Callable[[Tests], Any]) -> Any:
        plugin = Tests(path, work)
        there = [file for file in files if Path(file).exists()]
        pytest.main([*there, *OPTIONS, "-k", PLAN["only"].get(name, "")], plugins=[plugin])
        return plugin.value

    def collected(tests: Tests) -> Any:
        measured, outcomes = tests.baseline(), []
        for mutant in (one for one in tried if one.inside):
            names, seconds = chosen(measured, mutant)

            def work(mutant: Mutant = mutant, names: list[str] = names) -> bool:
                inject(f"phreg.{name}", mutant.apply(source))
                return tests.passes(names)

            outcomes.append(forked(work, seconds) if names else ("done", True))
        return outcomes, {test: (seconds, []) for test, (seconds, _) in measured.items()}

    def imported(mutant: Mutant, names: list[str]) -> Any:
        replace_on_import(path, mutant.apply(source))
        return pytest_with(lambda tests: tests.passes(names))  # None where a test file cannot be imported

    state, value = forked(lambda: pytest_with(collected), 3600)
    if state != "done" or value is None:
        raise SystemExit(f"{name}: the tests could not be run; MUTANTS_DEBUG=1 shows what they say")
    results, measured = iter(value[0]), value[1]
    outcomes = []
    for mutant in tried:
        names, seconds = chosen(measured, mutant)
        late = lambda mutant=mutant, names=names: imported(mutant, names)  # noqa: E731
        outcomes.append(next(results) if mutant.inside else forked(late, 30 + seconds))
    survived = [one for one, outcome in zip(tried, outcomes, strict=True) if tuple(outcome) == ("done", True)]
    return {
        "module": name, "mutants": len(every), "sampled": len(sample), "equivalent": len(sample) - len(tried),
        "killed": len(tried) - len(survived), "timeouts": sum(state == "timeout" for state, _ in outcomes),
        "errors": sum(state == "error" for state, _ in outcomes),
        "survived": [{key: asdict(one)[key] for key in ("line", "code", "change")} for one in survived],
    }  # fmt: skip


def main() -> None:
    """Prints a line a module, and its survivors; writes both as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("modules", nargs="*", help="modules of phreg; all that mutants.toml names, if none")
    parser.add_argument("--seed", type=int, default=0, help="decides the sample")
    parser.add_argument("--limit", type=int, default=80, help="most mutants of a module")
    parser.add_argument("--budget", type=float, default=20.0, help="most seconds of tests for a mutant")
    parser.add_argument("--output", type=Path, default=Path("mutants.json"))
    arguments = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)
    sys.modules["torch"].set_num_threads(1)
    print(f"seed {arguments.seed}, at most {arguments.limit} mutants a module")
    summary = []
    for name in arguments.modules or PLAN["modules"]:
        start = time.monotonic()
        result = measure(name, arguments.limit, arguments.seed, arguments.budget)
        summary.append(result)
        for one in result["survived"]:
            print(f"  phreg/{name}.py:{one['line']}: {one['change']}    in: {one['code']}")
        tried = result["killed"] + len(result["survived"])
        print(
            f"{name:10} killed {result['killed']:3} of {tried:3}, {result['killed'] / max(1, tried):4.0%}; "
            f"{result['timeouts']} by time, {result['errors']} by a crash, {result['equivalent']} equal; "
            f"{result['sampled']} of {result['mutants']} sampled; {time.monotonic() - start:.0f} s",
            flush=True,
        )
        arguments.output.write_text(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
