"""A run that trains at several image sizes: who is seen at which, what is made once, and what is told."""

import json
from collections import defaultdict

import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from torch._dynamo.backends.debugging import aot_eager

import phreg
from phreg import api
from phreg.api import distillation
from phreg.backbones.resolve import adapt
from phreg.config import ViewsConfig
from phreg.data.crops import Crops
from phreg.data.sources import open_images
from phreg.errors import PhregError
from phreg.evaluation.before_after import HeldOut
from phreg.formats.info import info
from phreg.seeding import keyed_generator
from phreg.teacher import Teacher
from phreg.training.target_cache import TargetCache
from phreg.training.task import RetrofitTask
from phreg.view_sampling import context_margin

SIZES = ((32, 32), (24, 24), (48, 24))
"""Image sizes of the tiny model here, of 8 pixels a patch: its own first."""

VIEWS = {"count": 3, "max_shift": 0.25, "fill": "context"}

QUICK = {
    "recipe": "relocate-0.1",
    "batch_size": 2,
    "mixed_sizes": SIZES[1:],
    "views": VIEWS,
    "measure": {"images": 0},
    "data": {"workers": 0},
    "device": "cpu",
    "registers": 2,
    "force": True,
    "checks": {"drift": 0.0, "agreement": 1.0, "outlier_rate": 1.0},
}


def run(model, photos, output, **settings):
    return api.distill(model, photos, output, **(QUICK | settings))


@pytest.fixture
def seen(monkeypatch):
    """Notes the shapes of images and targets of a run, by image, and whose targets its teacher makes."""
    noted = {"shapes": defaultdict(list), "grids": defaultdict(list), "made": []}
    batch, files = [], []
    read, loss, target = TargetCache.read, RetrofitTask.loss, RetrofitTask.target

    def reading(self, indices, make):
        batch[:] = indices
        found = read(self, indices, make)
        for index in indices:
            files.append(index)
            noted["grids"][index].append(tuple(load_file(self._path(index))["patches"].shape[:2]))
        return found

    def losing(self, model, images, *more):
        for index in batch:
            noted["shapes"][index].append(tuple(images.shape[-2:]))
        return loss(self, model, images, *more)

    def making(self, images, generator, margin=(0, 0)):
        noted["made"] += batch
        return target(self, images, generator, margin)

    monkeypatch.setattr(TargetCache, "read", reading)
    monkeypatch.setattr(RetrofitTask, "loss", losing)
    monkeypatch.setattr(RetrofitTask, "target", making)
    return noted


def test_each_image_is_seen_at_its_size_in_every_epoch_and_its_target_is_made_once(
    tiny, photos, tmp_path, seen
):
    run(tiny(), photos, tmp_path / "run", epochs=3)
    for index in range(12):
        rows, cols = SIZES[index % 3]
        margin = context_margin(ViewsConfig(**VIEWS), adapt(tiny()).spec, (rows, cols))
        assert margin > (0, 0)
        assert seen["shapes"][index] == [(rows + 2 * margin[0], cols + 2 * margin[1])] * 3
        assert seen["grids"][index] == [(rows // 8, cols // 8)] * 3
    assert sorted(seen["made"]) == list(range(12))


def test_an_unreadable_image_gives_way_to_one_of_its_size_whose_target_fits(tiny, photos, tmp_path, seen):
    (photos / "04.png").write_bytes(b"broken")
    result = run(tiny(), photos, tmp_path / "run", epochs=2, data={"workers": 0, "max_broken": 0.2})
    assert len(result.outcome.skipped) == 1
    assert seen["grids"][7] == [(3, 3)] * 4, "it stands in for number 4, and both are of 24 pixels"
    assert 4 not in seen["grids"]


def test_log_record_card_and_info_tell_all_sizes(tiny, photos, tmp_path, caplog):
    caplog.set_level("INFO")
    result = run(tiny(), photos, tmp_path / "run", steps=2, optim={"accumulate": 2})
    assert "12 images of 32x32 or 24x24 or 48x24 pixels" in caplog.text
    lines = [json.loads(line) for line in (result.run / "log.jsonl").read_text().splitlines()]
    assert [line["sizes"] for line in lines] == [[[32, 32], [24, 24]], [[48, 24], [32, 32]]]
    record = json.loads((result.run / "model" / "phreg.json").read_text())
    assert (record["size"], record["recipe"]["mixed_sizes"]) == (32, [24, [48, 24]])
    card = (result.run / "model" / "README.md").read_text()
    assert "2 steps of 2 images per process at 32 or 24 or 48x24 pixels" in card
    assert info(result.run).steps == 2


def test_a_run_of_one_size_tells_one(tiny, photos, tmp_path):
    result = run(tiny(), photos, tmp_path / "run", steps=1, mixed_sizes=())
    assert "sizes" not in json.loads((result.run / "log.jsonl").read_text())
    assert "at 32 pixels" in (result.run / "model" / "README.md").read_text()


def test_the_best_state_is_chosen_over_all_sizes_and_the_table_keeps_to_the_main_one(
    tiny, photos, tmp_path, monkeypatch
):
    given = []

    class Validator(distillation.Validator):
        def __init__(self, original, held_out, target):
            given.append(held_out)
            super().__init__(original, held_out, target)

    tables, compare = [], distillation.compare
    monkeypatch.setattr(distillation, "Validator", Validator)
    monkeypatch.setattr(
        distillation, "compare", lambda *args, **more: tables.append(args[2]) or compare(*args, **more)
    )
    others = tmp_path / "others"
    others.mkdir()
    for number in range(5):
        (others / f"{number}.png").write_bytes((photos / f"{number:02}.png").read_bytes())
    measure = {"source": str(others), "images": 5, "views": 4, "every": 2, "keep_best": True}
    run(tiny(), photos, tmp_path / "run", steps=2, measure=measure, seed=5)

    (held_out,) = given
    assert isinstance(held_out, HeldOut)
    assert [tuple(images.shape) for images in held_out.images] == [
        (2, 3, 32, 32), (2, 3, 24, 24), (1, 3, 48, 24)
    ]  # fmt: skip
    original, source = adapt(tiny()), open_images(others)
    teacher = Teacher(original, ViewsConfig(**VIEWS | {"count": 4, "sampler": "uniform"}))
    for number, (size, images, reference) in enumerate(
        zip(SIZES, held_out.images, held_out.references, strict=True)
    ):
        margin = context_margin(teacher.views, original.spec, size)
        keys = [(0, index) for index in range(number, 5, 3)]
        whole = Crops(source, size, crop="centre", margin=margin).batch(keys).images
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (original.spec.mean, original.spec.std))
        whole = (whole / 255 - mean) / std
        (rows, cols), (high, wide) = margin, size
        torch.testing.assert_close(images, whole[..., rows : rows + high, cols : cols + wide])
        expected = teacher(whole, keyed_generator("reference", 5, 0), margin).patches
        torch.testing.assert_close(reference, expected)
    (table,) = tables
    assert [tuple(images.shape) for images in table.images] == [(5, 3, 32, 32)]


def test_without_a_choice_of_states_quick_checks_keep_to_the_main_size(tiny, photos, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        distillation, "Validator", lambda _original, held_out, _target: given.append(held_out)
    )
    measure = {"images": 2, "views": 3, "keep_best": False}
    run(tiny(), photos, tmp_path / "run", steps=1, measure=measure)
    assert [tuple(images.shape[-2:]) for images in given[0].images] == [(32, 32)]


def test_a_size_without_an_image_to_measure_on_is_named(tiny, photos, tmp_path, caplog):
    measure = {"images": 2, "views": 3, "every": 2, "keep_best": True}
    run(tiny(), photos, tmp_path / "run", steps=2, measure=measure)
    assert "no image to measure on is left for 48x24 pixels; raise measure.images" in caplog.text


def test_the_first_step_is_bounded_on_images_of_the_main_size(tiny, photos, tmp_path, monkeypatch):
    sides, features = [], RetrofitTask.features

    def noting(self, model, images, margin=(0, 0)):
        seen, made = features(self, model, images, margin)
        sides.append(tuple(seen.shape[-2:]))
        return seen, made

    monkeypatch.setattr(RetrofitTask, "features", noting)
    run(tiny(), photos, tmp_path / "run", steps=3, optim={"trust_region": True})
    assert len(sides) > 3 + 3, "the rates took several trials"
    assert set(sides[:-3]) == {(32, 32)}
    assert sides[-3:] == list(SIZES)


# Tracing reads the gradients of everything that enters a block.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.slow
def test_compiled_blocks_are_compiled_for_any_size_at_the_second_and_lose_nothing(
    tiny, photos, tmp_path, monkeypatch
):
    torch.compiler.reset()
    compile_, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)  # which traces everything and generates no code

    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend=backend))
    sizes = {"mixed_sizes": (24, 40, 48, 56, 64), "steps": 12}
    losses = {}
    for name in ("eager", "compiled"):
        result = run(tiny(), photos, tmp_path / name, compile=name == "compiled", **sizes)
        lines = (result.run / "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    # The teacher's blocks and the student's: at most once for one size and once for any, not six times each.
    assert 2 <= len(graphs) <= 4
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-3)  # other sums, over twelve steps


def test_a_model_of_one_size_takes_no_other(photos, tmp_path):
    model = FAMILIES["transformers/aimv2-vision"]()
    with pytest.raises(PhregError, match="takes only its own size"):
        run(model, photos, tmp_path / "run", steps=1, mixed_sizes=(48,))
    assert not (tmp_path / "run").exists()


def test_other_sizes_on_resumption_are_refused(tiny, photos, tmp_path):
    run(tiny(), photos, tmp_path / "run", steps=1)
    with pytest.raises(PhregError, match="mixed_sizes: was"):
        run(tiny(), photos, tmp_path / "run", steps=1, mixed_sizes=(24,), resume=True)


def test_the_model_of_a_run_of_several_sizes_loads_back_and_takes_them_all(saved, photos, tmp_path):
    result = run(str(saved), photos, tmp_path / "run", steps=3)
    loaded, trained = (adapt(model) for model in (phreg.load(result.run), result.model))
    for size in SIZES:
        images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(loaded(images).patches, trained(images).patches)
