import inspect
import json

import pytest
import torch
from PIL import Image

import phreg
from phreg import api, cli
from phreg.errors import GateError, PhregError
from phreg.evaluation import classification
from phreg.evaluation.tasks import TASKS, find_task, resolve_settings

FAST = {"neighbours": 3}


@pytest.fixture
def colours(tmp_path):
    for name, colour in (("blue", (20, 20, 220)), ("red", (220, 20, 20))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            tint = tuple(part + 3 * number for part in colour)
            Image.new("RGB", (32, 32), tint).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


def evaluate(*arguments):
    """Runs the command line here and returns its exit code."""
    try:
        cli.main(["evaluate", *map(str, arguments)])
    except SystemExit as end:
        return end.code or 0
    return 0


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_defaults_that_are_valid_and_described(name):
    task = find_task(name)
    assert resolve_settings(name, {}) == task.Settings()
    assert all(field.description for field in task.Settings.model_fields.values())
    for protocol in getattr(task, "PROTOCOLS", {}):
        resolve_settings(name, {}, protocol)


def test_several_models_stand_side_by_side_with_their_differences(saved, tiny, colours, tmp_path):
    results = phreg.evaluate(
        saved,
        tiny(depth=1),
        task="classification",
        data=colours,
        output=tmp_path / "out",
        baseline=saved,
        seeds=2,
        device="cpu",
        **FAST,
    )
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["top1"] == results["top1"] == 1
    assert [model["model"] for model in written["models"]] == [str(saved), "instance 2"]
    assert written["models"][0]["seeds"] == [0, 1]
    assert written["models"][0]["settings"]["neighbours"] == 3
    assert written["models"][0]["sha256"] != written["models"][1]["sha256"]
    assert written["differences"][0]["top1"]["change"] == 0


def test_a_finished_run_is_not_done_again(saved, colours, tmp_path, monkeypatch):
    asked = {"task": "classification", "data": colours, "output": tmp_path / "out", "device": "cpu"}
    first = phreg.evaluate(saved, **asked, **FAST)
    done = []
    run = classification.run
    monkeypatch.setattr(classification, "run", lambda *words: done.append(words[3]) or run(*words))
    again = phreg.evaluate(saved, seeds=2, **asked, **FAST)
    assert done == [1], "only the second seed"
    assert again.records[0].figures["top1"].values[0] == first["top1"]
    phreg.evaluate(saved, **asked, neighbours=2)
    assert done == [1, 0], "other settings are another run"


def test_a_run_on_data_that_changed_is_done_again(saved, colours, tmp_path):
    asked = {"task": "classification", "data": colours, "output": tmp_path / "out", "device": "cpu"}
    assert phreg.evaluate(saved, **asked, **FAST)["top1"] == 1
    for number in range(4):  # what is in the folder of red pictures is blue now
        Image.new("RGB", (32, 32), (20, 20, 220 + number)).save(colours / "red" / f"{number}.png")
    assert phreg.evaluate(saved, **asked, **FAST)["top1"] < 1


def test_a_run_that_was_cut_short_is_done_again(saved, colours, tmp_path):
    asked = {"task": "classification", "data": colours, "output": tmp_path / "out", "device": "cpu"}
    phreg.evaluate(saved, **asked, **FAST)
    (path,) = (tmp_path / "out" / "runs").iterdir()
    path.write_text(path.read_text()[:50])
    phreg.evaluate(saved, **asked, **FAST)
    assert json.loads(path.read_text())["metrics"]["figures"]["top1"] == 1


def test_without_output_nothing_is_written(saved, colours, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    results = phreg.evaluate(saved, task="classification", data=colours, device="cpu", **FAST)
    assert results["top1"] == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_prints_the_table_and_passes_the_gate(saved, colours, tmp_path, capsys):
    code = evaluate(
        saved, "--task", "classification", "--data", colours, "--output", tmp_path / "out",
        "--set", "neighbours=3", "methods=knn", "--baseline", saved, "--gate", "0", "--device", "cpu",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert "top1" in printed
    assert "Gate passed" in printed
    assert (tmp_path / "out" / "results.md").is_file()


def test_a_drop_beyond_the_gate_ends_in_an_error_after_the_results(saved, tiny, colours, tmp_path):
    broken = tiny()
    for parameter in broken.parameters():
        torch.nn.init.zeros_(parameter)
    asked = {"task": "classification", "data": colours, "output": tmp_path, "device": "cpu"}
    with pytest.raises(GateError, match="gate: asked for a drop of at most") as failed:
        phreg.evaluate(broken, baseline=saved, gate=0.01, **asked, **FAST)
    assert failed.value.results["top1"] < 1
    assert (tmp_path / "results.json").is_file()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--task", "classify"], "there are classification"),
        (["--task", "classification", "--set", "k=3"], "k: unknown key"),
        (["--task", "classification", "--set", "neighbours"], "expected KEY=VALUE"),
        (["--task", "classification", "--protocol", "mine"], "no protocol 'mine'"),
        (["--task", "classification", "--seeds", "0"], "seeds"),
        (["--task", "classification", "--gate", "0.1"], "--baseline"),
        (["--task", "classification", "--gate", "nan"], "gate: should be"),
        (["--task", "classification", "--gate", "-1"], "gate: should be"),
        (["--task", "classification", "--batch-size", "0"], "batch_size: should be greater than 0"),
        (["--task", "classification", "--batch-size", "-1"], "batch_size: should be greater than 0"),
        (["--task", "classification", "--cache-limit", "nan"], "cache_limit: should be"),
        (["--task", "classification", "--device", "foo"], "device 'foo'"),
        (["--task", "classification", "--device", "meta"], "device 'meta'"),
        (["--task", "classification", "--output", __file__], "is no folder"),
        (["--task", "classification", "--cache", f"{__file__}/features"], "is no folder"),
        (["--task", "classification", "--set", "seed=3"], "give it by --seed"),
        (["--task", "linear-depth", "--set", "batch_size=3"], "give it by --batch-size"),
        (["--task", "classification", "--set", "observe=3"], "observe: unknown key"),
        (["--task", "classification", "--set", "models=3"], "models: unknown key"),
        (["--task", "classification", "--set", "neighbours=3", "--set", "neighbours=4"], "given 2 times"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(saved, colours, tmp_path, capsys, wrong, named):
    assert evaluate(saved, "--data", colours, "--output", tmp_path / "out", *wrong) == 1
    errors = " ".join(capsys.readouterr().err.split())
    assert errors.startswith("phreg:")
    assert named in errors
    assert not (tmp_path / "out").exists()


def test_settings_may_come_in_several_flags(saved, colours, tmp_path):
    out = tmp_path / "out"
    code = evaluate(
        saved, "--task", "classification", "--data", colours, "--output", out, "--device", "cpu",
        "--set", "neighbours=3", "methods=knn", "--set", "reading.size=24",
    )  # fmt: skip
    settings = json.loads((out / "results.json").read_text())["models"][0]["settings"]
    assert code == 0
    assert (settings["neighbours"], settings["methods"], settings["reading"]["size"]) == (3, ["knn"], 24)


@pytest.mark.parametrize(
    ("task", "given", "expected"),
    [
        ("object-discovery", ["layers=-1"], {"layers": (-1,)}),
        ("object-discovery", ["layers=-1,-2", "biases=0"], {"layers": (-1, -2), "biases": (0.0,)}),
        ("object-discovery", ["layers=[-1]", "reading={size=64}"], {"layers": (-1,)}),
        ("linear-depth", ["crop.size=[32, 48]", "flip=false", "lr=1e-3"], {"flip": False, "lr": 1e-3}),
        ("linear-depth", ["crop.size=64", "train_batch_size=2"], {"train_batch_size": 2}),
        ("classification", ["template={}", "words=2024"], {"template": "{}", "words": "2024"}),
    ],
)
def test_settings_are_understood_as_they_are_typed(task, given, expected):
    found = resolve_settings(task, cli._assignments(given))
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("name", TASKS)
def test_no_setting_is_hidden_by_a_keyword_of_evaluate(name):
    hidden = set(inspect.signature(phreg.evaluate).parameters) & set(find_task(name).Settings.model_fields)
    assert not hidden


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_is_run(saved, colours, tmp_path):
    asked = {"task": "classification", "data": colours, "output": tmp_path / "out"}
    with pytest.raises(PhregError, match="'cuda', which cannot be used here"):
        phreg.evaluate(saved, device="cuda", **asked)
    assert not (tmp_path / "out").exists()


def test_lists_of_models_or_of_data_are_refused(saved, colours):
    with pytest.raises(PhregError, match="are none: list"):
        api._check_names([["a", "b"]], None, colours)
    with pytest.raises(PhregError, match="0 models"):
        api._check_names([], saved, colours)
    with pytest.raises(PhregError, match="data of type list"):
        api._check_names([saved], None, [colours])


def test_tasks_and_their_settings_are_listed(capsys):
    cli.main(["tasks"])
    assert all(name in capsys.readouterr().out for name in ("classification",))
    cli.main(["tasks", "linear-segmentation"])
    printed = capsys.readouterr().out
    assert "weight_decay" in printed
    assert "ph-reg" in printed
