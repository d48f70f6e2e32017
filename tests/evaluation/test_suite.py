import copy
import json
import shutil

import pytest
import torch
from families import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file

import phreg
from phreg import cli
from phreg.errors import GateError
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


def test_a_failed_gate_ends_with_a_status_of_its_own_and_shows_the_table(saved, colours, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    weights = load_file(broken / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(zeros, broken / "model.safetensors")
    code = evaluate(
        broken, "--task", "classification", "--data", colours, "--output", tmp_path / "out",
        "--device", "cpu", "--set", "neighbours=3", "--baseline", saved, "--gate", "0.01",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == cli.GATE_FAILED == 3
    assert "top1" in printed.out
    assert "gate: asked for a drop" in printed.err


def test_a_student_is_measured_as_it_was_trained_in_every_form_and_its_original_plainly(photos, tmp_path):
    model = FAMILIES["open_clip/clip"]()
    original = copy.deepcopy(model)
    quick = {"steps": 1, "batch_size": 2, "views": {"count": 2}, "measure": {"images": 0}, "device": "cpu"}
    phreg.distill(model, photos, tmp_path / "run", method="paper", data={"workers": 0}, **quick)
    loaded = phreg.load(tmp_path / "run", into=copy.deepcopy(original))
    asked = {"task": "consistency", "data": photos, "device": "cpu", "count": 2, "shift": 1, "views": 2}
    results = phreg.evaluate(model, loaded, baseline=original, **asked)
    assert results.baseline.notes[0]["readout"] == "plain"
    assert [record.notes[0]["readout"] for record in results.records] == ["value-only", "value-only"]
    assert results.records[0].figures == results.records[1].figures
    plain = phreg.evaluate(model, readout="plain", **asked)
    assert plain.records[0].notes[0]["readout"] == "plain"
    assert plain["shift_agreement"] != results["shift_agreement"]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (["--task", "classify"], "there are classification"),
        (["--task", "classification", "--set", "k=3"], "k: unknown key"),
        (["--task", "classification", "--set", "neighbours"], "expected KEY=VALUE"),
        (["--task", "classification", "--protocol", "mine"], "no protocol 'mine'"),
        (["--task", "classification", "--seeds", "0"], "seeds"),
        (["--task", "classification", "--gate", "0.1"], "--baseline"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_run(saved, colours, tmp_path, capsys, wrong, named):
    assert evaluate(saved, "--data", colours, "--output", tmp_path / "out", *wrong) == 1
    errors = " ".join(capsys.readouterr().err.split())
    assert errors.startswith("phreg:")
    assert named in errors
    assert not (tmp_path / "out").exists()


def test_tasks_and_their_settings_are_listed(capsys):
    cli.main(["tasks"])
    assert all(name in capsys.readouterr().out for name in ("classification",))
    cli.main(["tasks", "linear-segmentation"])
    printed = capsys.readouterr().out
    assert "weight_decay" in printed
    assert "ph-reg" in printed
