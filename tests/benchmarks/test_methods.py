"""benchmarks/methods: nothing measured is trained on, planted models are as planted, rows are kept."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from phreg.analysis.norms import outliers
from phreg.backbones.resolve import adapt
from phreg.methods import METHODS
from phreg.sinks.locate import find_sinks

FOLDER = Path(__file__).parents[2] / "benchmarks" / "methods"

sys.path.insert(0, str(FOLDER))
import fills  # noqa: E402
import measuring  # noqa: E402
import methods  # noqa: E402
import picture  # noqa: E402
import planted_models  # noqa: E402

# Other benchmarks have a run.py too.
found = importlib.util.spec_from_file_location("methods_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(found)
found.loader.exec_module(run)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Twelve measured photographs, as batches of one."""
    folder = planted_models.photographs(tmp_path_factory.mktemp("crops"), 60)
    return measuring.split(folder)[1]


@pytest.fixture
def numbered(photos):
    """The twelve small pictures, in folders, and one that has no number."""
    (photos / "more").mkdir()
    for path in sorted(photos.glob("*.png"))[6:]:
        path.rename(photos / "more" / f"{path.stem}_n0.png")
    (photos / "cover.png").write_bytes((photos / "00.png").read_bytes())
    return photos


def test_no_measured_image_is_trained_on(numbered, tmp_path):
    training, measured = measuring.split(numbered)
    assert [measuring.number(path) for path in measured] == [0, 5, 10]
    assert len(training) == 9
    for seed in range(20):
        listed = measuring.training_list(training, seed, tmp_path / "images.txt", limit=4).read_text()
        paths = [Path(line) for line in listed.splitlines()]
        assert len(set(paths)) == 4
        assert not set(paths) & set(measured)


def test_a_seed_draws_its_own_training_images(numbered, tmp_path):
    training, _ = measuring.split(numbered)
    draws = [
        measuring.training_list(training, seed, tmp_path / "images.txt", limit=4).read_text()
        for seed in (0, 1, 0)
    ]
    assert draws[0] == draws[2] != draws[1]


@pytest.mark.parametrize("kind", ["dinov2", "clip", "siglip"])
def test_planted_models_have_sinks_and_their_twins_none(kind, crops):
    model, twin = (adapt(planted_models.build(kind, planted=planted)) for planted in (True, False))
    images = list(run.measuring.centre_crops(model, measuring.open_images(list(map(str, crops))), 160))
    before, clean = outliers(model, images), outliers(twin, images)
    assert clean.outlier_rate == 0
    assert 0.005 < before.outlier_rate < 0.04  # the plant: flat ones of the 5 % of patches with a mark
    assert before.emergence_block == planted_models.SINK_BLOCK
    # Content sets them off: no place has one in every image, and only marked places have any.
    share = before.position_histogram
    assert share.max() < 1
    assert (share > 0).sum() <= 5


KINDS = {  # emergence block, last block, side, writer, role, share of patches
    "fixed": (3, 5, "high", "units", "ignored", (0.045, 0.055)),
    "native": (3, 5, "high", "units", "ignored", (0.005, 0.04)),
    "diffuse": (2, 5, "high", "many units", "ignored", (0.005, 0.04)),
    "attention": (3, 5, "high", "attention", "parked", (0.005, 0.04)),
    "two": (2, 5, "high", "units", "ignored", (0.005, 0.04)),
    "low-norm": (3, 5, "low", "units", "ignored", (0.005, 0.04)),
    "inner": (2, 4, "high", "units", "ignored", (0.005, 0.04)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_planted_kind_is_told_from_the_others(kind, tmp_path):
    model, twin = (adapt(planted_models.build(kind, planted=planted)).eval() for planted in (True, False))
    # Enough that the rarer population of two is no handful of tokens.
    crops = sorted(map(str, planted_models.photographs(tmp_path, 60).glob("*.png")))
    images = list(run.measuring.centre_crops(model, measuring.open_images(crops), 160))
    assert find_sinks(twin, images) is None
    found = find_sinks(model, images)
    largest = max(found.populations, key=lambda each: each.rate)
    block, last, side, writer, role, (least, most) = KINDS[kind]
    assert (largest.block, largest.last_block, largest.side) == (block, last, side)
    assert (largest.kind.writer, largest.kind.role) == (writer, role)
    assert least < largest.rate < most
    assert found.fixed == (kind == "fixed")
    assert {direction.block for direction in largest.directions} == set(range(block, last + 1))
    if kind == "diffuse":
        assert {unit.block for unit in largest.units} == {2, 3, 4}
        assert 100 < len(largest.units) <= 150
    if kind == "two":
        assert [each.block for each in found.populations] == [2, 4]
        assert {(unit.block, unit.index) for unit in found.units} == {(2, 57), (4, 58)}
    with torch.no_grad():
        cosine = torch.cosine_similarity(model(images[0]).patches, twin(images[0]).patches, dim=-1)
    # The twin is a fair target: other patches are the same in both.
    assert cosine.flatten().quantile(0.15) > 0.98


def test_planted_builds_differ_as_their_families_do():
    models = {kind: planted_models.build(kind) for kind in ("dinov2", "clip", "siglip")}
    assert {kind: model.cls_token is not None for kind, model in models.items()} == {
        "dinov2": True,
        "clip": True,
        "siglip": False,
    }
    assert models["siglip"].attn_pool is not None
    assert adapt(models["clip"]).projection is not None
    assert adapt(models["dinov2"]).mlp(0).up[0].out_features == 2 * planted_models.HIDDEN  # gated


def test_a_reference_of_all_views_has_each_once_and_counts_a_patch_where_it_was_seen(tiny):
    every = measuring.shifts(measuring.ViewsConfig(count=50, max_shift=0.15), (14, 14))
    assert len(every) == len({tuple(view) for view in every.tolist()}) == 50
    assert every[0].tolist() == [0, 0, 0]
    # A patch that is the image's alone comes back from every view; the model is a patch embedding here.
    backbone = adapt(tiny(depth=1))
    for parameter in backbone.blocks[0].parameters():
        parameter.data.zero_()
    backbone.model.pos_embed.data.zero_()
    images = torch.rand(1, 3, 8, 8).repeat_interleave(1, 0).tile(1, 1, 4, 4)
    images = (
        images + images.unflatten(3, (4, 8)).flip(-1).flatten(3)
    ) / 2  # patches even, so mirroring is none
    mean = measuring.average(backbone, images, measuring.ViewsConfig(count=9, max_shift=0.25), 0)
    # fp32 sums of nine equal features
    torch.testing.assert_close(mean, backbone(images).patches, rtol=0, atol=1e-5)


def test_the_ring_is_what_touches_a_marked_patch():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 0, 1] = True
    assert measuring.ring(mask)[0].int().tolist() == [[0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("name", [*methods.METHODS, *methods.VARIANTS])
def test_every_method_is_one_that_phreg_takes(name):
    config = measuring.resolve(overrides=methods.settings(name, emergence=1, depth=3))
    assert config.method in METHODS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["planted:foo", "--output", "out.json"], "no planted model 'foo'; there are"),
        (["--table", "nofile.json"], "cannot read nofile.json as a result file"),
        (["--merge", "run.py", "--output", "out.json"], "as a result file"),
        (["--table", "bare.json"], "lacks protocol or rows"),
    ],
)
def test_what_is_not_there_is_an_error_of_the_command_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_teachers_are_compared_by_what_their_views_show_outside(saved, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "fills.json"
    flags = ["--images", str(photos), "--output", str(output), "--seeds", "1"]
    fills.main([str(saved), *flags])
    before = json.loads(output.read_text())["rows"]
    assert len(before) == 1 + len(fills.REFERENCES) + len(fills.FILLS)
    monkeypatch.delattr(fills.Teacher, "__call__")  # what is there is not made again
    fills.main([str(saved), *flags, "--student", f"white={saved}"])
    rows = json.loads(output.read_text())["rows"]
    assert rows == before | {f"student of white/{saved.name}": before["the model itself"]}
    for name in fills.REFERENCES:
        # What it is compared with itself is itself; the slack is fp32's.
        assert rows[f"all views, {name}"][name]["all"] == pytest.approx(1, abs=1e-5)
        # A teacher of few views comes nearest to the average of many that show the same outside.
        near = {fill: rows[f"{fill}/0"][name]["all"] for fill in fills.REFERENCES}
        assert max(near, key=near.get) == name
    assert "| surroundings |" in capsys.readouterr().out


@pytest.mark.slow
def test_rows_are_kept_and_a_rerun_makes_only_what_is_missing(saved, photos, tmp_path, monkeypatch, capsys):
    output = tmp_path / "results" / "tiny.json"
    flags = [
        str(saved), "--images", str(photos), "--output", str(output), "--seed", "0", "--set", "steps=1",
        "--set", "force=true", "--set", "size=32", "--set", "data.workers=0", "--set", "views.count=1",
        "--set", "batch_size=9",
    ]  # fmt: skip
    run.main([*flags, "--methods", "raw,no-registers"])
    stored = json.loads(output.read_text())
    assert list(stored["rows"]) == ["raw/0", "no-registers/0"]
    assert "refused" not in stored["rows"]["no-registers/0"], stored["rows"]["no-registers/0"]["refused"]
    assert stored["rows"]["no-registers/0"]["cost"]["steps"] == 1
    # One epoch's batch of the nine training images, each with one view.
    assert stored["rows"]["no-registers/0"]["cost"]["teacher_forwards"] == 9

    made = []
    monkeypatch.setattr(
        run.Bench,
        "row",
        lambda self, name, seed: made.append(name) or stored["rows"]["raw/0"] | {"method": name},
    )
    run.main([*flags, "--methods", "raw,no-registers,relocate-0.1"])
    assert made == ["relocate-0.1"]
    assert "| no-registers | 1 |" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="data or protocol"):
        run.main([*flags, "--set", "seed=1", "--methods", "raw"])


@pytest.mark.parametrize(("flags", "across"), [([], 4), (["--norms"], 3)])
def test_a_picture_shows_photos_beside_features_before_and_after(saved, photos, tmp_path, flags, across):
    output, images = tmp_path / "picture.png", sorted(map(str, photos.iterdir()))[:2]
    picture.main(
        [str(saved), str(saved), "--images", *images, "--size", "32", "--output", str(output), *flags]
    )
    with Image.open(output) as drawn:
        pixels = np.array(drawn.convert("RGB")).astype(int)
    assert pixels.shape == (2 * 32 + 6, across * 38 - 6, 3), "two rows of maps, 6 pixels apart"
    before, after = (pixels[:32, 38 * column : 38 * column + 32] for column in (1, 2))
    assert (before == after).all(), "of one model"
    assert before.std() > 0
