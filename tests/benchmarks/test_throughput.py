"""benchmarks/throughput: it compares the same mathematics, and its record says all that a reader needs."""

import importlib.util
import json
import sys
from multiprocessing import active_children
from pathlib import Path

import families_timm
import families_transformers
import pytest
import torch

from phreg.backbones.resolve import adapt
from phreg.config import ViewsConfig
from phreg.methods import resolve
from phreg.registers import add_registers, initial_registers
from phreg.teacher import Teacher
from phreg.training.losses import Outputs, distillation_terms, total_loss
from phreg.training.trainable import unlock
from phreg.view_sampling import sample_views
from phreg.views import Views

FOLDER = Path(__file__).parents[2] / "benchmarks" / "throughput"
SETTINGS = {
    "size": 64, "batch-size": 2, "views": 3, "registers": 4, "steps": 2, "workers": 1, "device": "cpu",
    "precision": "fp32",
}  # fmt: skip
FLAGS = [f"--{name}={value}" for name, value in SETTINGS.items()]
QUICK = [*FLAGS, "--no-keep-freed-memory", "--no-details"]  # what is kept would stay with this process

sys.path.insert(0, str(FOLDER))
import published  # noqa: E402
import sides  # noqa: E402
import stopwatch  # noqa: E402

# Other benchmarks have a run.py too.
found = importlib.util.spec_from_file_location("throughput_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(found)
found.loader.exec_module(run)

MODELS = {
    "timm": families_timm.FAMILIES["vit"],
    "transformers": families_transformers.FAMILIES["dinov2"],
}
# Attention written out sums in another order than the fused kernel, in fp32 (6e-8), through three blocks.
CLOSE = {"rtol": 0, "atol": 1e-5}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=MODELS)
def build(request):
    """Builds one and the same tiny model, 4x4 patches of 8 pixels, as often as it is called."""
    return MODELS[request.param]


@pytest.fixture
def drawn(build):
    """Three images, and the views that phreg draws of them."""
    images = torch.randn(3, 3, 32, 32, generator=seeded())
    config = ViewsConfig(count=5)
    (views,) = sample_views(config, adapt(build()).spec, (32, 32), len(images), seeded(1))
    assert views.flips.any()
    assert views.offsets.any()
    return images, views


def published_copies(images, views: Views, spec):
    """Moves the images as the published side does, by phreg's draw."""
    white = (1 - torch.tensor(spec.mean)) / torch.tensor(spec.std)
    moved = [
        published.moved_copies(image, offsets, flips.tolist(), spec.patch_size[0], white)
        for image, offsets, flips in zip(images, views.offsets, views.flips, strict=True)
    ]
    return torch.stack([copies for copies, _ in moved]), torch.stack([positions for _, positions in moved])


def test_the_published_views_are_phregs(build, drawn):
    images, views = drawn
    copies, _ = published_copies(images, views, adapt(build()).spec)
    # Both move pixels and compute none, but for white, which two formulas round differently (6e-8 of 3).
    torch.testing.assert_close(copies, views.apply(images), rtol=0, atol=1e-6)


def test_the_published_target_is_phregs(build, drawn):
    images, views = drawn
    backbone = adapt(build()).requires_grad_(False)
    copies, positions = published_copies(images, views, backbone.spec)
    teacher = published.PlainViT(build(), backbone.spec, None)
    with torch.no_grad():
        grids = teacher(copies.flatten(0, 1)).unflatten(0, copies.shape[:2])
        found = published.aligned_mean(grids, positions)
    expected = Teacher(backbone, ViewsConfig(count=5))(images, seeded(1)).patches
    torch.testing.assert_close(found, expected, **CLOSE)


def test_the_published_student_trains_the_same_weights_on_the_same_loss(build, drawn):
    images, _ = drawn
    config = resolve(overrides={"method": "paper", "registers": 4})
    backbone = add_registers(adapt(build()), 4)
    spec, tokens = backbone.spec, initial_registers(4, backbone.spec.width)
    student = published.PlainViT(build(), spec, tokens)
    trained = unlock(backbone, config.unlock)
    target = backbone(torch.randn(3, 3, 32, 32, generator=seeded(2)))
    target = type(target)(*(part.detach() for part in target))

    found = published.loss_terms(student(images), target.patches)
    outputs = Outputs(images, backbone(images), target)
    loss, terms = total_loss(distillation_terms(config.loss), outputs)
    torch.testing.assert_close(torch.stack(found), torch.stack([terms["cosine"], terms["mse"]]), **CLOSE)

    parameters = student.unlock()
    sum(found).backward()
    loss.backward()
    # timm keeps the position of CLS in the position embedding, phreg's patched model in the frozen CLS token.
    row = spec.width if spec.library == "timm" else 0
    assert sum(map(torch.numel, parameters)) == sum(map(torch.numel, trained.values())) + row
    torch.testing.assert_close(student.registers.grad, backbone.registers.grad[0], **CLOSE)


def test_published_shifts_are_spread_out_and_leave_the_first_view_alone():
    offsets = published.spread_out(reach=4, count=10)
    assert offsets.shape == (10, 2)
    assert offsets.abs().max() <= 4
    assert not offsets[0].any()
    distances = torch.cdist(offsets[1:].float(), offsets[1:].float()) + 100 * torch.eye(9)
    assert distances.min() >= 2, "independent draws of nine would nearly always have closer ones"


def test_the_floor_reads_what_phreg_reads():
    options, *_ = run.read_options(QUICK)
    floor = sides.Floor(options)
    floor.step()
    for backbone in (floor.original, floor.student):
        expected = backbone(floor.pixels).patches.flatten(1, 2)
        torch.testing.assert_close(floor.patches(backbone, floor.pixels), expected, **CLOSE)


def test_the_record_has_speeds_ratios_and_what_they_were_measured_on(tmp_path, capsys):
    file = tmp_path / "results" / "record.json"
    record = run.main([*QUICK, f"--output={file}"])

    assert json.loads(file.read_text()) == record == json.loads(capsys.readouterr().out)
    assert record["settings"]["views"] == 3
    assert set(record["machine"]) == {"processor", "cores", "threads", "load_before", "gpu"}
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert set(record["images_per_second"]) == {"loop", "floor", "published"}
    assert set(record["ratios"]) == {"loop_to_floor", "published_to_loop"}
    for table in ("images_per_second", "seconds_per_step", "ratios"):
        for row in record[table].values():
            assert 0 < row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
    assert not active_children(), "no reader is left behind, asleep or awake"


def test_sides_left_out_are_missing_from_the_record():
    record = run.main([*QUICK, "--no-published"])
    assert set(record["seconds_per_step"]) == {"loop", "floor"}
    assert set(record["ratios"]) == {"loop_to_floor"}


def test_the_parts_of_a_step_are_those_of_the_loop(tmp_path):
    options, *_ = run.read_options(QUICK)
    parts = run.parts(options, sides.write_photos(tmp_path / "photos", count=4))
    named = {part for part in stopwatch.PARTS.values() if isinstance(part, str)}
    assert set(parts) == named | {"teacher forward", "student forward", "waiting for data", "rest"}
    assert min(parts.values()) > 0


def test_an_inner_part_does_not_count_for_the_outer_one(monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr(stopwatch, "read", lambda device: stopwatch.Reading(next(seconds), 0, 0))
    watch = stopwatch.Stopwatch("cpu")  # 0
    with watch.part("outer"), watch.part("inner"):  # 1, 2; and 3, 4 on the way out
        pass
    assert watch.seconds == {"rest": 1, "outer": 2, "inner": 1}


@pytest.mark.slow
def test_details_come_from_processes_of_their_own():
    record = run.main(FLAGS)
    assert set(record["peak_memory_mib"]) == {"loop", "floor", "published"}
    assert all(100 < peak < 10_000 for peak in record["peak_memory_mib"].values()), (
        "torch alone takes 200 MiB"
    )
    assert record["allocator_as_it_comes"]["ratios"]["loop_to_floor"]["median"] > 0
    assert record["allocator_as_it_comes"]["page_faults_per_step"]["loop"]["median"] >= 0
