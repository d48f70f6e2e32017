import copy
import inspect
import json
import logging
import shutil
import sys
from types import ModuleType

import pytest
import torch
from families import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file

import phreg
from phreg import cli
from phreg.api.evaluation import _check_names
from phreg.backbones.resolve import adapt
from phreg.cli.commands import CHECK_FAILED
from phreg.cli.commands import evaluate as evaluate_command
from phreg.cli.flags import task_settings
from phreg.config import Config
from phreg.errors import MaxDropError, PhregError
from phreg.evaluation.record import Metrics, MetricSpec
from phreg.evaluation.tasks import classification
from phreg.evaluation.tasks.table import TASKS, find_task, is_stochastic, resolve_settings
from phreg.sinks.test_time import install

FAST = {"neighbours": 3}


@pytest.fixture
def colours(tmp_path):
    for name, colour in (("blue", (20, 20, 220)), ("red", (220, 20, 20))):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(4):
            tint = tuple(part + 3 * number for part in colour)
            Image.new("RGB", (32, 32), tint).save(tmp_path / "set" / name / f"{number}.png")
    return tmp_path / "set"


class Settings(Config):
    """Those of a task that reads nothing."""

    words: str | None = None
    """A file, or a name."""
    number: int = 1
    """Any number."""


@pytest.fixture
def stand_in(monkeypatch):
    """Puts a task in place that reads nothing, and counts how often it is run."""
    task = ModuleType("stand_in")
    task.Settings, task.METRICS, task.runs = Settings, [MetricSpec("score")], []
    task.DATA = task.TREE = "none"

    def run(reader, _data, _settings, seed):
        task.runs.append(seed)
        swept = {"once": 0.25, "twice": 0.5}
        return Metrics({"score": 0.5 + 0.1 * len(task.runs)}, {"score": swept}, {"sweep": "score"})

    task.run = run
    monkeypatch.setitem(sys.modules, "stand_in", task)
    monkeypatch.setitem(TASKS, "stand-in", "stand_in")
    return task


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


def test_the_progress_is_told_with_the_name_of_the_model(saved, colours):
    told = []
    asked = {
        "task": "classification",
        "data": colours,
        "device": "cpu",
        "observe": lambda *of: told.append(of),
    }
    phreg.evaluate(saved, **asked, **FAST)
    assert told[-1] == (f"{saved}: training images", 6, 6)  # of 8, a share of .2 of each class held back


def test_models_of_the_same_tensors_are_not_taken_for_each_other(tiny, photos, tmp_path, stand_in):
    models = []
    for units in ({1: [(0, 1)]}, {0: [(3, 1)], 2: [(1, -1)]}):  # moved by hooks, which no tensor shows
        models.append(tiny())
        install(adapt(models[-1]), units)
    phreg.evaluate(*models, task="stand-in", data=photos, output=tmp_path / "out", device="cpu")
    assert len(stand_in.runs) == 2


def test_a_file_that_a_setting_names_counts_as_data(saved, photos, tmp_path, stand_in):
    asked = {"task": "stand-in", "data": photos, "output": tmp_path / "out", "device": "cpu"}
    for text in ("road = ['road']", "road = ['way']"):
        (tmp_path / "words.toml").write_text(text)
        phreg.evaluate(saved, **asked, words=str(tmp_path / "words.toml"))
    assert len(stand_in.runs) == 2


def test_a_picture_that_a_list_names_counts_as_data(saved, photos, tmp_path, stand_in):
    (tmp_path / "list.txt").write_text("photos/00.png\nphotos/01.png\n")
    asked = {"task": "stand-in", "data": tmp_path / "list.txt", "output": tmp_path / "out", "device": "cpu"}
    for changed in ("02.png", "01.png"):
        phreg.evaluate(saved, **asked)
        Image.new("RGB", (8, 8)).save(photos / changed)
    phreg.evaluate(saved, **asked)
    assert len(stand_in.runs) == 2, "02.png is not listed"


def test_what_phreg_keeps_inside_of_the_data_is_none_of_it(saved, photos, stand_in, monkeypatch):
    monkeypatch.chdir(photos.parent)
    asked = {"output": "photos/out", "cache": "photos/kept", "task": "stand-in", "device": "cpu"}
    for data in (photos.resolve(), "photos"):
        phreg.evaluate(saved, data=data, **asked)
        (photos / "kept" / "entry").mkdir(parents=True, exist_ok=True)
        (photos / "kept" / "entry" / "grids.f16").write_bytes(b"0")
    assert len(stand_in.runs) == 1


@pytest.mark.parametrize("output", ["", "photos"])
def test_data_count_wherever_results_are_written(saved, photos, tmp_path, stand_in, output):
    for number in range(2):
        Image.new("RGB", (8 + number, 8)).save(photos / "00.png")
        asked = {"output": tmp_path / output, "cache": tmp_path, "task": "stand-in", "device": "cpu"}
        phreg.evaluate(saved, data=photos, **asked)
    assert len(stand_in.runs) == 2


@pytest.mark.parametrize(
    ("task", "settings", "drawn"),
    [
        ("object-discovery", {}, False),
        ("object-discovery", {"count": 2}, True),
        ("video-propagation", {}, False),
        ("zero-shot-segmentation", {}, False),
        ("linear-segmentation", {}, True),
        ("classification", {}, True),
        ("classification", {"methods": "head,zero-shot"}, False),
        ("quantised", {"classification": {"methods": ["head"]}}, False),
    ],
)
def test_a_task_says_whether_it_draws_anything(colours, task, settings, drawn):
    assert is_stochastic(task, str(colours), resolve_settings(task, settings)) is drawn


@pytest.mark.parametrize(("task", "section"), [("classification", None), ("quantised", "classification")])
def test_images_that_are_divided_already_are_not_drawn(colours, tmp_path, task, section):
    for part in ("train", "val"):
        (tmp_path / "divided").mkdir(exist_ok=True)
        (tmp_path / "divided" / part).symlink_to(colours)
    settings = resolve_settings(task, {section: {"methods": ["knn"]}} if section else {"methods": ["knn"]})
    assert is_stochastic(task, str(colours), settings)
    assert not is_stochastic(task, str(tmp_path / "divided"), settings)


def test_a_task_that_draws_nothing_runs_once_and_says_so(saved, photos, tmp_path, stand_in, caplog):
    stand_in.is_stochastic = lambda _data, _settings: False
    asked = {"task": "stand-in", "data": photos, "output": tmp_path / "out", "device": "cpu"}
    with caplog.at_level(logging.INFO, "phreg"):
        results = phreg.evaluate(saved, seeds=3, **asked)
    assert stand_in.runs == [0]
    assert results.records[0].seeds == (0,)
    assert results.records[0].figures["score"].std is None
    assert caplog.text.count("it runs once instead of for 3 seeds") == 1
    assert "nothing is drawn" in (tmp_path / "out" / "results.md").read_text()


def test_a_sweep_is_told_again_by_a_run_that_was_finished_before(saved, photos, tmp_path, stand_in):
    asked = {"task": "stand-in", "data": photos, "output": tmp_path / "out", "device": "cpu"}
    told = [phreg.evaluate(saved, **asked).records[0].sweep for _ in range(2)]
    assert len(stand_in.runs) == 1
    assert told[0] == told[1] == ["score 25.00 with once", "score 50.00 with twice"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"number": 2}, r"settings\.number 1 there, 2 asked for"),
        ({"task": "object-discovery"}, "task 'stand-in' there, 'object-discovery' asked for"),
        ({"data": "elsewhere"}, "data .*photos' there, 'elsewhere' asked for"),
    ],
)
def test_results_of_something_else_are_not_overwritten(
    saved, photos, tmp_path, stand_in, other, named, monkeypatch
):
    asked = {"task": "stand-in", "data": photos, "output": tmp_path / "out", "device": "cpu"}
    phreg.evaluate(saved, **asked)
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(PhregError, match=f"{named}.*another --output"):
        phreg.evaluate(saved, **asked | other)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    monkeypatch.chdir(tmp_path)  # the same data by another path
    phreg.evaluate(saved, **asked | {"data": "photos"}, seeds=2)
    assert stand_in.runs == [0, 1]


def test_results_from_before_a_setting_existed_are_gone_on_with(saved, photos, tmp_path, stand_in):
    asked = {"task": "stand-in", "data": photos, "output": tmp_path / "out", "device": "cpu"}
    phreg.evaluate(saved, **asked)
    path = tmp_path / "out" / "results.json"
    results = json.loads(path.read_text())
    assert results["models"][0]["settings"].pop("number") == 1, "its default"
    path.write_text(json.dumps(results))
    with pytest.raises(PhregError, match=r"settings\.number 1 there, 2 asked for"):
        phreg.evaluate(saved, **asked | {"number": 2})
    assert phreg.evaluate(saved, **asked).to_json()["models"][0]["settings"]["number"] == 1


@pytest.mark.parametrize("text", ["[]", "{", '{"models": [{"task": 3}]}'])
def test_results_of_another_program_are_not_overwritten(saved, photos, tmp_path, stand_in, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(PhregError, match="none of phreg's"):
        phreg.evaluate(saved, task="stand-in", data=photos, output=tmp_path, device="cpu")
    assert (tmp_path / "results.json").read_text() == text


def test_without_a_baseline_the_others_are_set_against_the_first(saved, tiny, photos, tmp_path, stand_in):
    asked = {"task": "stand-in", "data": photos, "output": tmp_path / "out", "device": "cpu"}
    results = phreg.evaluate(saved, tiny(depth=1), tiny(depth=2), **asked, seeds=2)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["baseline"] is None, "none is measured at another's artifacts"
    assert written["against"] == str(saved)
    changes = [found["score"]["change"] for found in written["differences"]]
    assert changes == pytest.approx([0, 0.2, 0.4])  # a tenth more with every run
    lines = results.to_markdown().splitlines()
    assert "(" not in lines[2]
    assert "(+20.00 ± 0.00)" in lines[3]
    assert f"in brackets the difference to {saved}" in results.legend()
    assert phreg.evaluate(saved, **asked, seeds=2).to_json()["against"] is None, "alone"


def test_ctrl_c_ends_in_a_line_and_the_same_command_goes_on(saved, photos, tmp_path, stand_in, capsys):
    done = stand_in.run

    def run(reader, data, settings, seed):
        if seed == 1:
            raise KeyboardInterrupt
        return done(reader, data, settings, seed)

    stand_in.run = run
    asked = (saved, "--task", "stand-in", "--data", photos, "--output", tmp_path / "out", "--seeds", 2)
    assert evaluate(*asked, "--device", "cpu") == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("phreg: stopped")
    assert "Finished runs and features are kept. To go on: phreg evaluate" in said
    stand_in.run = done
    assert evaluate(*asked, "--device", "cpu") == 0
    assert stand_in.runs == [0, 1]


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
        "--set", "neighbours=3", "methods=knn", "--baseline", saved, "--max-drop", "0", "--device", "cpu",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0
    assert "top1" in printed
    assert "Check passed" in printed
    assert (tmp_path / "out" / "results.md").is_file()


def test_a_drop_beyond_max_drop_ends_in_an_error_after_the_results(saved, tiny, colours, tmp_path):
    broken = tiny()
    for parameter in broken.parameters():
        torch.nn.init.zeros_(parameter)
    asked = {"task": "classification", "data": colours, "output": tmp_path, "device": "cpu"}
    with pytest.raises(MaxDropError, match="max_drop: asked for a drop of at most") as failed:
        phreg.evaluate(broken, baseline=saved, max_drop=0.01, **asked, **FAST)
    assert failed.value.results["top1"] < 1
    assert (tmp_path / "results.json").is_file()


def test_a_failed_check_ends_with_a_status_of_its_own_and_shows_the_table(saved, colours, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(saved, broken)
    weights = load_file(broken / "model.safetensors")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(zeros, broken / "model.safetensors")
    code = evaluate(
        broken, "--task", "classification", "--data", colours, "--output", tmp_path / "out",
        "--device", "cpu", "--set", "neighbours=3", "--baseline", saved, "--max-drop", "0.01",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert code == CHECK_FAILED == 3
    assert "top1" in printed.out
    assert "max_drop: asked for a drop" in printed.err


def test_a_student_is_measured_as_it_was_trained_in_every_form_and_its_original_plainly(photos, tmp_path):
    model = FAMILIES["open_clip/clip"]()
    original = copy.deepcopy(model)
    quick = {"steps": 1, "batch_size": 2, "views": {"count": 2}, "measure": {"images": 0}, "device": "cpu"}
    phreg.distill(model, photos, tmp_path / "run", method="paper", force=True, data={"workers": 0}, **quick)
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
        (["--task", "classification", "--max-drop", "0.1"], "--baseline"),
        (["--task", "classification", "--max-drop", "nan"], "max_drop: should be"),
        (["--task", "classification", "--max-drop", "-1"], "max_drop: should be"),
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
    found = resolve_settings(task, task_settings(given, evaluate_command))
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
        _check_names([["a", "b"]], None, colours)
    with pytest.raises(PhregError, match="no model; name one or more"):
        _check_names([], saved, colours)
    with pytest.raises(PhregError, match="data of type list"):
        _check_names([saved], None, [colours])


def test_tasks_and_their_settings_are_listed(capsys):
    cli.main(["tasks"])
    assert all(name in capsys.readouterr().out for name in ("classification",))
    cli.main(["tasks", "linear-segmentation"])
    printed = capsys.readouterr().out
    assert "weight_decay" in printed
    assert "ph-reg" in printed
