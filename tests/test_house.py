"""The structure of the package, as DESIGN has it: what import-linter's layers do not say."""

import ast
import importlib
import pkgutil
import re
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

import phreg


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("phreg", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "phreg.api" in imports
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle


SHARED = {"Settings"}
"""Names that a protocol gives to many modules: each task has its own `Settings`."""


def test_no_two_public_classes_or_type_aliases_share_a_name():
    modules = defaultdict(set)
    root = Path(phreg.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {node.name} if isinstance(node, ast.ClassDef) else set()
            if isinstance(node, ast.Assign):
                names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            for name in names:
                if re.match("[A-Z]+[a-z]", name):  # neither private, nor a constant, nor a function
                    modules[name].add(str(path.relative_to(root)))
    clashes = {name: sorted(found) for name, found in modules.items() if len(found) > 1}
    assert not {name: clashes[name] for name in clashes.keys() - SHARED}
    assert "Settings" in clashes


def test_no_public_function_has_the_name_of_a_module():
    modules = {module.name for module in pkgutil.iter_modules(phreg.__path__)}
    assert not modules & set(phreg.__all__)


MOST_LINES = 400
"""Lines of a module. Adapters in `backbones/` may be long, one to a library."""

MOST_LINES_OF_CODE = 60
"""Lines of a function, without its docstring, which grows with the number of arguments."""

LONG_FUNCTIONS = {"training/loop.py: train"}
"""The loop reads straight down, in the order of what happens."""


def modules():
    root = Path(phreg.__file__).parent
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in root.rglob("*.py")
    }


def test_no_module_is_too_long_to_be_read_at_once():
    lengths = {name: len(text.splitlines()) for name, text in modules().items()}
    assert lengths["training/loop.py"] > 100, "the count counts something"
    long = {name for name, length in lengths.items() if length > MOST_LINES}
    assert all(name.startswith("backbones/") for name in long)


def lines_of_code(function):
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


def test_no_function_is_too_long_to_be_read_at_once():
    long = {
        f"{name}: {node.name}"
        for name, text in modules().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and lines_of_code(node) > MOST_LINES_OF_CODE
    }
    assert long == LONG_FUNCTIONS


def test_the_public_names_are_those_of_the_stub_and_type_checkers_read_the_same():
    stub = ast.parse(Path(phreg.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    listed = [
        (alias.name, alias.asname, node.module)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    assert sorted(name for name, _, _ in listed) == phreg.__all__
    assert all(name == public for name, public, _ in listed), "only `import NAME as NAME` is public in a stub"
    for name, _, module in listed:
        assert getattr(phreg, name) is getattr(importlib.import_module(module), name)
