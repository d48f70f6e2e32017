"""Printed tables fit a terminal of 80 columns, whatever models and tasks are called."""

import dataclasses

import pytest
from command_line import phreg

from phreg.cli.printing import console
from phreg.cli.tables import print_results
from phreg.evaluation.record import Metrics, MetricSpec, summarise
from phreg.evaluation.results import Results
from phreg.evaluation.tasks.table import TASKS

WIDTH = 80


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(console, "_width", WIDTH)


def table_lines(printed):
    """The lines of the tables in what was printed."""
    return [line for line in printed.splitlines() if line[:1] in {*"┏┃┡│├└┌"}]


def record(model, *values, note=None):
    """A record of two figures, over as many seeds as there are values."""
    specs = [
        MetricSpec("reference_worst_percent", about="cosine of the worst patches"),
        MetricSpec("rmse", "m", better="lower", about="error of depth"),
    ]
    swept = {f"combination {number}": number / 10 for number in range(3)}
    detail = {"rmse": swept} if note else {}
    runs = [
        Metrics({"reference_worst_percent": value, "rmse": 1 - value}, detail, note or {}) for value in values
    ]
    return summarise(
        runs, specs, task="depth", model=str(model), sha256="0", registers=0, data="data", settings={},
        seeds=tuple(range(len(values))), hardware={}, seconds=1.0,
    )  # fmt: skip


def test_tables_of_a_small_run_fit_80_columns(saved, photos, tmp_path, capsys):
    long = tmp_path / "a-folder-with-quite-a-long-name" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    long.parent.mkdir()
    saved.rename(long)
    quick = "--steps 2 --batch-size 2 --views.count 3 --measure.images 2 --measure.views 3 --data.workers 0"
    quick += " --registers 2 --measure.no-keep-best --force --device cpu"
    run = tmp_path / "run"
    assert phreg("distill", long, "--images", photos, "--output", run, *quick.split()) in (0, 3)
    assert phreg("inspect", long, "--images", photos, "--output", tmp_path / "look", "--count", 2) == 0
    asked = ["--task", "consistency", "--data", photos, "--set", "count=2", "views=2", "shift=1"]
    assert phreg("evaluate", long, run, *asked, "--output", tmp_path / "out", "--seeds", 2) == 0
    assert phreg("info", run) == 0
    assert phreg("export", run, "--format", "merged", "--output", tmp_path / "merged") == 0
    assert phreg("recipes") == 0
    lines = table_lines(capsys.readouterr().out)
    assert len(lines) > 50
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.startswith("│   vit_tiny_patch16_224.augreg_in21k_ft_in1k ") for line in lines) >= 4


def test_the_figures_of_several_models_stand_under_each_figure(tmp_path, capsys):
    (tmp_path / "runs" / "dinov2-reg").mkdir(parents=True)
    ours = record(tmp_path / "runs" / "dinov2-reg", 0.5, 0.75)
    theirs = record("facebook/dinov2-small", 0.25, 0.25)
    print_results(Results((ours,), theirs), tmp_path)
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table_lines(printed) if "│" in line]
    assert rows == [
        ["reference_worst_percent", ""],
        ["facebook/dinov2-small (baseline)", "25.00 ± 0.00"],
        ["dinov2-reg", "62.50 ± 17.68 (+37.50 ± 17.68)"],
        ["rmse", ""],
        ["facebook/dinov2-small (baseline)", "0.7500 ± 0.0000"],
        ["dinov2-reg", "0.3750 ± 0.1768 (-0.3750 ± 0.1768)"],
    ]
    assert str(tmp_path / "runs") not in printed
    assert "rmse (m, lower is better): error of depth.\n" in printed
    assert "reference_worst_percent (%, higher is better): cosine of the worst patches.\n" in printed


def test_two_folders_of_one_name_are_told_apart_by_the_folders_above_them(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
    print_results(Results(tuple(record(tmp_path / name / "run", 0.5) for name in ("a", "b"))), tmp_path)
    printed = capsys.readouterr().out
    assert "│   a/run" in printed
    assert "│   b/run" in printed


def test_the_best_of_a_sweep_is_said_to_be_chosen_on_what_is_measured_and_listed_on_request(tmp_path, capsys):
    swept = record("vit", 0.5, note={"sweep": "rmse", "best": "combination 0"})
    print_results(Results((swept,)), tmp_path)
    printed = capsys.readouterr().out
    said = " ".join(printed.split())
    assert "rmse is the best of 3 combinations, chosen on the very images that are measured" in said
    assert "(vit: combination 0)" in said
    assert "combination 2" not in printed
    assert "--sweep" in printed
    print_results(Results((swept,)), tmp_path, sweep=True)
    listed = [line for line in table_lines(capsys.readouterr().out) if "combination " in line]
    assert [line.split()[4] for line in listed[1:]] == ["0.0000", "0.1000", "0.2000"]


def test_a_model_that_is_its_own_baseline_is_one_model(tmp_path, capsys):
    base = record("vit", 0.5)
    results = Results((base, dataclasses.replace(record("other", 0.25))), base)
    print_results(results, tmp_path)
    assert capsys.readouterr().out.count("  vit (baseline)") == 2, "once a figure"


@pytest.mark.parametrize("name", [None, *TASKS])
def test_what_is_told_of_tasks_fits_80_columns(name, capsys):
    assert phreg("tasks", *([name] if name else [])) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= WIDTH
