"""The structure of the package, as DESIGN has it: what import-linter's layers do not say."""

from graphlib import TopologicalSorter

import grimp


def test_no_modules_import_each_other_in_a_circle():
    graph = grimp.build_graph("phreg", exclude_type_checking_imports=True)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert "phreg.api" in imports
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the circle
