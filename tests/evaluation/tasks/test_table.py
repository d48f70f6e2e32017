"""A new task is one file and one line in the table: everything else follows from what the file says."""

import json

import pytest
import torch
from PIL import Image

import phreg
from phreg import cli
from phreg.errors import MaxDropError
from phreg.evaluation.tasks.table import TASKS, find_task


@pytest.fixture
def added(monkeypatch):
    """Adds a task by its line in the table."""
    monkeypatch.setitem(TASKS, "lengths", "lengths_task")


@pytest.fixture
def asked(added, photos, tmp_path):
    return {"task": "lengths", "data": photos, "output": tmp_path / "out", "device": "cpu"}


def longer(tiny, factor):
    """The tiny model with features so many times longer: its final norm has no bias yet."""
    model = tiny()
    torch.nn.init.constant_(model.norm.weight, factor)
    return model


def test_an_added_task_runs_end_to_end_with_its_units_and_directions(tiny, asked, tmp_path):
    results = phreg.evaluate(longer(tiny, 2.0), baseline=tiny(), **asked)
    once = results.baseline.figures["length"].mean
    assert results["length"] == pytest.approx(2 * once, rel=1e-5)  # fp32 sums
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["length"] == results["length"]
    assert written["counts"]["length"] == {"patches": 12 * 4 * 5, "images": 12}, "48x64 becomes 32x40 pixels"
    found = written["differences"][0]["length"]
    assert (found["change"], found["better"]) == (pytest.approx(once, rel=1e-5), False), "longer is worse"
    heading, (_, row) = results.rows()
    assert heading == ["model", "aligned", "mean length"]
    assert row[1] == f"{100 * results['aligned']:.2f} (+0.00)", "a share is in per cent"
    assert row[2] == f"{2 * once:.4f} (+{once:.4f})", "a norm as it is"


def test_an_added_task_is_checked_in_its_own_direction(tiny, asked):
    phreg.evaluate(longer(tiny, 0.5), baseline=tiny(), max_drop=0.0, **asked)
    with pytest.raises(MaxDropError, match=r"length .*, the baseline's is"):
        phreg.evaluate(longer(tiny, 2.0), baseline=tiny(), max_drop=0.01, **asked)


def test_the_pictures_of_an_added_task_are_drawn_for_all_models_side_by_side(tiny, asked, tmp_path):
    results = phreg.evaluate(longer(tiny, 2.0), baseline=tiny(), **asked)
    assert list(results.examples) == ["baseline 1", "instance 1"]
    base, doubled = ([panels[0].image for panels in examples] for examples in results.examples.values())
    assert len(base) == 2
    torch.testing.assert_close(doubled[1], 2 * base[1])
    with Image.open(tmp_path / "out" / "maps.png") as drawn:
        (width, height), columns, rows = drawn.size, 2 * 2, 2
    assert width / columns / (height / rows) == pytest.approx(1.9 / 1.7, rel=0.01), "panels of one shape"


def test_an_added_task_makes_no_pictures_where_nothing_is_written(tiny, asked):
    assert phreg.evaluate(tiny(), **asked | {"output": None}).examples == {}


def test_an_added_task_is_listed_with_what_it_measures_and_needs(added, capsys):
    cli.main(["tasks"])
    assert "how long patch features are" in " ".join(capsys.readouterr().out.split())
    cli.main(["tasks", "lengths"])
    printed = capsys.readouterr().out
    assert "reading.size=32\n" in printed
    assert "reading.views=1\n" in printed
    assert "Data: any images." in printed
    assert "photos/\n  0001.jpg" in printed, "how the data lies on disk"
    assert "mean length (norm, lower is better): of patch features." in printed


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_how_its_data_lies_on_disk_and_what_each_figure_is(name):
    task = find_task(name)
    lines = task.TREE.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert all(spec.about for spec in task.METRICS)
