"""The notebooks of examples/ run from the first cell to the last, and are kept without what they printed."""

import json
from pathlib import Path

import pytest

import phreg

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))
SOON = {
    "steps": 4,
    "views": {"count": 2},
    "measure": {"images": 2, "views": 2, "keep_best": False},
    "data": {"workers": 0},
}


def code_cells(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_and_holds_no_output(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    assert path.stat().st_size < 20_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(path, tmp_path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    distill = phreg.distill
    monkeypatch.setattr(phreg, "distill", lambda *given, **settings: distill(*given, **settings | SOON))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in code_cells(path):
        exec(compile(cell, path.name, "exec"), names)
    plt.close("all")
    if path.stem == "inspect_and_repair":
        assert names["report"].outlier_rate > 0.01, "the model has artifacts to show"
        assert (tmp_path / "exported" / "model.safetensors").is_file()
    else:
        assert names["maps"].shape[1] == len(names["names"]) > 1, "CLS and registers"


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2
