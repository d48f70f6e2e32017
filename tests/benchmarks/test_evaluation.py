"""benchmarks/evaluation: every row has its figures, nothing held out is trained on, nothing is done twice."""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from PIL import Image

from phreg.backbones.resolve import adapt
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.settings import build

FOLDER = Path(__file__).parents[2] / "benchmarks" / "evaluation"

sys.path.insert(0, str(FOLDER.with_name("methods")))

# Other benchmarks have a run.py too.
found = importlib.util.spec_from_file_location("evaluation_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(found)
sys.modules["evaluation_run"] = run  # dataclasses look their module up
found.loader.exec_module(run)


@pytest.fixture
def data(photos, tmp_path):
    """The three data sets, tiny: twelve samples, four street pictures with masks, three salient objects."""
    root = tmp_path / "data"
    shutil.copytree(photos, root / "imagenet_samples")
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "masks"):
            (root / "camvid" / kind / part).mkdir(parents=True)
        for number in range(2):
            name = f"0001TP_{part}{number}.png"
            shape = (48, 64)
            picture = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
            Image.fromarray(picture).save(root / "camvid" / "images" / part / name)
            mask = random.integers(0, 12, shape, dtype=np.uint8)
            Image.fromarray(mask).save(root / "camvid" / "masks" / part / name)
    for kind in ("images", "masks"):
        (root / "ecssd" / kind).mkdir(parents=True)
    for number, path in enumerate(sorted(photos.glob("*.png"))[:3]):
        shutil.copy(path, root / "ecssd" / "images" / path.name)
        mask = np.zeros((48, 64), np.uint8)
        mask[8 : 20 + number, 8:40] = 255
        Image.fromarray(mask).save(root / "ecssd" / "masks" / path.name)
    return root


SMALL = {
    "linear-segmentation": {"reading": {"size": 48, "window": 32, "stride": 32}, "steps": 2},
    "dense-nn": {"reading": {"size": 48, "window": 32, "stride": 32}, "neighbours": 2},
    "lost": {"layers": (-1,), "expansion": 4},
    "tokencut": {},
    "top1": {"methods": ("head",)},
    "top1-crops": {"methods": ("head",)},
    "coarse": {"features": ("pooled", "patch-mean"), "neighbours": 2},
    "consistency": {"views": 2, "shift": 1},
}


@pytest.fixture
def small(monkeypatch):
    """Tasks cut down, and all numbers below 12 in two groups that are on both sides of the split."""
    for name, settings in SMALL.items():
        monkeypatch.setitem(run.TASKS, name, replace(run.TASKS[name], settings=settings))
    monkeypatch.setattr(run, "COARSE", {"early": ((0, 7),), "late": ((8, 999),)})
    monkeypatch.setattr(run, "_class_of", lambda path: run.measuring.number(path) // 3)
    monkeypatch.setattr(run, "coarse", lambda number: "even" if number % 2 else "odd")


def test_groups_take_every_class_once():
    numbers = [n for ranges in run.COARSE.values() for low, high in ranges for n in range(low, high + 1)]
    assert sorted(numbers) == list(range(1000))


def test_held_out_samples_are_not_trained_on(photos, tmp_path):
    training = run.link_samples(photos, tmp_path / "links")
    held_out = {path.name for path in (tmp_path / "links" / "coarse" / "val").rglob("*.png")}
    assert held_out == {"00.png", "05.png", "10.png"}
    assert not held_out & {path.name for path in training}
    assert (tmp_path / "links" / "numbered" / "labels.csv").read_text().split() == [
        "00.png,0", "05.png,5", "10.png,10",
    ]  # fmt: skip
    crops = (tmp_path / "links" / "crops" / "labels.csv").read_text().split()
    assert {line.split("-")[0] for line in crops} == {"00", "05", "10"}
    assert len(set(crops)) == 3 * sum(run.CROPS.values())
    with Image.open(tmp_path / "links" / "crops" / crops[0].split(",")[0]) as crop:
        assert crop.size == (224, 224)


def test_a_result_file_takes_rows_of_a_new_task_and_none_of_a_changed_one(tmp_path):
    path, row = tmp_path / "a.json", {"top1/raw/0": {"figures": {}}}
    run.store(path, {"model": "a", "tasks": {"top1": 1}}, row)
    rows = run.store(path, {"model": "a", "tasks": {"top1": 1, "lost": 2}}, {"lost/raw/0": {"figures": {}}})
    assert set(rows) == {"top1/raw/0", "lost/raw/0"}
    for other in ({"model": "b", "tasks": {"top1": 1, "lost": 2}}, {"model": "a", "tasks": {"top1": 3}}):
        with pytest.raises(SystemExit, match="another model"):
            run.store(path, other, {})


def test_every_task_has_its_row_and_nothing_is_done_twice(saved, data, small, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "tiny.json"
    flags = [
        str(saved), "--data", str(data), "--output", str(output), "--seeds", "2", "--set", "steps=1",
        "--set", "force=true", "--set", "size=32", "--set", "data.workers=0", "--set", "views.count=1",
        "--set", "batch_size=9", "--models", str(tmp_path / "models"),
    ]  # fmt: skip
    asked = ("raw", "teacher", "relocate-0.1")
    run.main([*flags, "--methods", ",".join(asked), "--seed", "0"])
    rows = json.loads(output.read_text())["rows"]
    read_as_teacher = ("linear-segmentation", "dense-nn", "coarse")
    assert list(rows) == [
        f"{task}/{method}/0"
        for task in run.TASKS
        for method in asked
        if method != "teacher" or task in read_as_teacher
    ]
    for key, row in rows.items():
        assert row["seconds"] > 0
        first = run.TASKS[key.split("/")[0]].figures[0]
        assert math.isfinite(row["figures"][first]), key
    raw, teacher = (rows[f"coarse/{method}/0"]["detail"] for method in ("raw", "teacher"))
    assert teacher == raw, "pooled outputs, the headline, are the model's own"
    held = json.loads((output.parent / ".work/evaluations/dense-nn-teacher/results.json").read_text())
    (record,) = held["models"]
    assert record["settings"]["reading"] | {"views": 10, "window": 32} == record["settings"]["reading"]
    assert rows["dense-nn/teacher/0"]["figures"] != rows["dense-nn/raw/0"]["figures"]
    printed = capsys.readouterr().out
    assert "| raw |" in printed
    assert printed.count("| teacher |") == 3

    def refuse(*_args, **_settings):
        raise AssertionError("trained or measured again")

    monkeypatch.setattr(run.trained.phreg, "distill", refuse)
    monkeypatch.setattr(run.phreg, "evaluate", refuse)
    run.main([*flags, "--methods", ",".join(asked), "--seed", "0"])


def test_rows_that_were_measured_otherwise_than_the_raw_models_are_named():
    row = {"figures": {"miou": 0.5}, "seconds": 1.0}
    rows = {
        f"dense-nn/{method}/0": row | digest
        for method, digest in (
            ("raw", {"digest": "a"}),
            ("teacher", {"digest": "b"}),
            ("paper", {"digest": "a"}),
            ("before", {}),  # from before there were digests
        )
    }
    assert run.table("dense-nn", rows).endswith("|\n\nNot measured as `raw` was: `teacher`.")
    del rows["dense-nn/teacher/0"]
    assert "Not measured" not in run.table("dense-nn", rows)


def test_a_difference_is_marked_where_it_is_within_the_spread():
    def rows(task, method, values):
        return {
            f"{task}/{method}/{seed}": {"figures": {"corloc": value, "artifact_seeds": None}, "seconds": 1.0}
            for seed, value in enumerate(values)
        }

    # LOST has no seed of its own, so that the raw model has one row and no spread.
    made = rows("tokencut", "raw", [0.5]) | rows("tokencut", "paper", [0.51, 0.49, 0.515])
    made |= rows("tokencut", "relocate-0.1", [0.6, 0.61, 0.62])
    lines = run.table("tokencut", made).splitlines()
    assert lines[2].startswith("| raw | 50.00 ± 0.00 |")
    assert "(+0.50 ± 1.32~)" in lines[3]
    assert "(+11.00 ± 1.00)" in lines[4]


@pytest.mark.parametrize(("patch", "grid", "of_window"), [(14, (32, 43), 16), (16, (28, 37), 14)])
def test_windows_hold_whole_patches_of_either_size(patch, grid, of_window, tiny, tmp_path, monkeypatch):
    model = tiny(img_size=518 if patch == 14 else 224, patch_size=patch, embed_dim=8, depth=1)
    reader = FeatureReader(adapt(model).eval(), "tiny", FeatureCache(tmp_path / "cache"), batch_size=16)
    reading = build(FeatureConfig, run.WINDOWS | {"views": 3}, source="reading")
    pixels, _ = reader.place(noise((480, 360)), reading)
    seen, forward = [], reader.backbone.run
    monkeypatch.setattr(reader.backbone, "run", lambda images: seen.append(images) or forward(images))
    found = reader(reader.normalise(pixels[None]), reading)
    assert found.grids.shape[1:3] == grid, "360x480 pixels become 448x597, in whole patches"
    assert {tuple(images.shape[-2:]) for images in seen} == {(of_window * patch, of_window * patch)}
    assert sum(map(len, seen)) == 3 * 2 * 3, "2x3 windows, and three views of each"
