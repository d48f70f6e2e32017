"""The structure of the package, as DESIGN has it: what import-linter's layers do not say."""

import ast
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

PENDING = {"Images", "Model", "Reader", "Record", "Tower"}
"""Clashes inside formats/ and evaluation/ that are still to be resolved; nothing may be added."""


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
    assert not {name: clashes[name] for name in clashes.keys() - SHARED - PENDING}
    assert "Settings" in clashes


def test_no_public_function_has_the_name_of_a_module():
    modules = {module.name for module in pkgutil.iter_modules(phreg.__path__)}
    assert not modules & set(phreg.__all__)
