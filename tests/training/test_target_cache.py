"""A target is made once, is the same however often it is read, and goes when the run ends."""

import logging
import shutil
from collections import namedtuple

import pytest
import torch
from short_runs import SHORT

from phreg import api
from phreg.backbones import resolve
from phreg.backbones.base import Features
from phreg.config import DistillConfig
from phreg.errors import CheckpointError
from phreg.training.checkpoint import RunFolder
from phreg.training.target_cache import CachePlan, TargetCache, check_room, plan_cache


class Teacher:
    """Makes the targets of some images, and remembers how often it was asked; each time they are others."""

    def __init__(self):
        self.calls = 0

    def __call__(self, places=(0, 1)):
        self.calls += 1
        count = len(places)
        draw = torch.Generator().manual_seed(self.calls)
        return Features(torch.randn(count, 2, 3, 8, generator=draw), torch.randn(count, 5, generator=draw))


@pytest.fixture
def teacher():
    return Teacher()


@pytest.fixture
def kept(tmp_path):
    return TargetCache(tmp_path / "targets", torch.device("cpu"))


def same(first, second):
    return torch.equal(first.patches, second.patches) and torch.equal(first.pooled, second.pooled)


def test_each_target_is_made_once_and_is_the_same_in_any_batch(kept, teacher):
    first = kept.read([3, 8], teacher)
    again = kept.read([8, 3], teacher)
    assert teacher.calls == 1
    assert same(again, Features(first.patches.flip(0), first.pooled.flip(0)))


def test_what_is_read_is_what_was_made_rounded_to_bf16_from_the_first_time_on(kept, teacher):
    found = kept.read([0, 1], teacher)
    made = Teacher()()
    assert found.patches.dtype == torch.float32
    assert same(found, Features(made.patches.bfloat16().float(), made.pooled.bfloat16().float()))


def test_a_run_killed_between_two_files_ends_with_the_same_targets(kept, teacher):
    whole = kept.read([0, 1], teacher)
    (kept.folder / "00000001.safetensors").unlink()
    (kept.folder / "00000001.4711.tmp").write_bytes(b"cut short")
    after = kept.read([0, 1], Teacher())  # which makes what was made before, as views are keyed by step
    assert same(after, whole)


@pytest.mark.parametrize("content", [b"", b"cut short"])
def test_a_target_that_a_power_cut_left_half_written_is_made_again(kept, teacher, content):
    whole = kept.read([0, 1], teacher)
    (kept.folder / "00000001.safetensors").write_bytes(content)
    assert same(kept.read([0, 1], Teacher()), whole)


def test_a_target_that_is_there_stays_where_another_of_its_batch_is_missing(kept, teacher):
    first = kept.read([0, 1], teacher)
    mixed = kept.read([1, 2], teacher)
    assert teacher.calls == 2
    assert torch.equal(mixed.patches[0], first.patches[1])


def test_all_are_removed_at_the_end_even_if_none_were_made(kept, teacher):
    kept.remove()
    kept.read([0, 1], teacher)
    kept.remove()
    assert not kept.folder.exists()


def numbered(places):
    """Targets that say which place of a batch they are of."""
    values = torch.tensor(places, dtype=torch.float32)
    return Features(values[:, None, None, None].expand(-1, 2, 3, 8), values[:, None].expand(-1, 5))


def test_images_beyond_the_limit_are_made_anew_and_all_come_in_the_order_of_the_batch(tmp_path):
    cache, asked = TargetCache(tmp_path / "targets", torch.device("cpu"), cached=10), []

    def make(places):
        asked.append(list(places))
        return numbered(places)

    for _ in range(2):
        found = cache.read([12, 3, 10, 9], make)
        assert found.pooled[:, 0].tolist() == [0, 1, 2, 3]
        assert found.patches[:, 1, 2, 7].tolist() == [0, 1, 2, 3]
    # Together what is cached, apart what is not: so a killed run makes the same whatever files it left.
    assert asked == [[1, 3], [0, 2], [0, 2]]
    assert sorted(file.name for file in cache.folder.iterdir()) == [
        "00000003.safetensors",
        "00000009.safetensors",
    ]


def test_targets_that_are_not_cached_are_rounded_as_cached_ones_are(tmp_path):
    values = torch.full((1, 1, 1, 1), 1 + 2**-10)  # between two bf16 numbers, 1 and 1 + 2^-7
    for number in (0, 1):
        cache = TargetCache(tmp_path / str(number), torch.device("cpu"), cached=number)
        found = cache.read([0], lambda _: Features(values, values[..., 0, 0]))
        assert found.patches.item() == 1
        assert found.patches.dtype == torch.float32


def test_the_plan_counts_the_bytes_that_files_take(tiny, photos, tmp_path, monkeypatch):
    removed = []
    monkeypatch.setattr(TargetCache, "remove", lambda cache: removed.append(cache.folder))
    api.distill(tiny(), photos, tmp_path / "run", **SHORT | {"steps": 6})  # three batches are a pass
    sizes = [file.stat().st_size for file in removed[0].glob("*.safetensors")]
    plan = plan_cache(resolve.adapt(tiny()), 12, DistillConfig(batch_size=4, steps=6), 1)
    assert (plan.images, plan.cached, len(sizes)) == (12, 12, 12)
    assert plan.gigabytes * 1e9 == pytest.approx(sum(sizes), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "processes", "cached"),
    [
        ({"epochs": 2}, 1, 100),
        ({"epochs": 1}, 1, 0),  # no image is seen twice
        ({"steps": 10}, 1, 0),
        ({"steps": 11}, 1, 100),
        ({"steps": 6}, 2, 100),
        ({"steps": 6, "optim": {"accumulate": 2}}, 1, 100),
        ({"epochs": 2, "target": {"cache": False}}, 1, 0),
    ],
    ids=str,
)
def test_targets_are_cached_only_where_images_are_seen_again(tiny, settings, processes, cached):
    config = DistillConfig(batch_size=10, **settings)
    assert plan_cache(resolve.adapt(tiny()), 100, config, processes).cached == cached


def test_a_limit_in_gigabytes_bounds_how_many_are_cached_at_the_mean_of_all_sizes(tiny):
    # 32 channels of 2 bytes; 16 patches at 32 pixels and 64 at 64, and a pooled output each.
    each = 2 * 32 * ((16 + 64) / 2 + 1)
    config = DistillConfig(
        batch_size=10, epochs=2, mixed_sizes=(64,), target={"cache_limit": 50.5 * (each + 160) / 1e9}
    )
    assert plan_cache(resolve.adapt(tiny()), 100, config, 1).cached == 50


def disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**15, 0, free))


def test_a_disk_that_is_too_small_is_told_in_gigabytes_before_anything_is_written(
    tiny, photos, tmp_path, monkeypatch
):
    disk(monkeypatch, free=1000)
    with pytest.raises(
        CheckpointError, match=r"of 12 of 12 images take .*GB in .*targets, and 1e-06 GB are free"
    ) as e:
        api.distill(tiny(), photos, tmp_path / "run", **SHORT | {"steps": 6})
    assert "--target.cache-limit" in str(e.value)
    assert not (tmp_path / "run").exists()
    # With the limit that it names, the run goes through.
    api.distill(tiny(), photos, tmp_path / "run", **SHORT | {"steps": 6, "target": {"cache_limit": 1e-6}})


def test_room_counts_what_a_killed_run_left_and_says_what_it_will_take(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets" / "00000000.safetensors").write_bytes(b" " * 400_000)
    plan = CachePlan(images=20, cached=10, bytes_per_image=1e5)
    disk(monkeypatch, free=500_000)
    with pytest.raises(CheckpointError, match=r"take 0\.001 GB .*0\.0005 GB are free"):
        check_room(plan, RunFolder(tmp_path))
    disk(monkeypatch, free=700_000)
    check_room(plan, RunFolder(tmp_path))
    assert "targets of 10 of 20 images are cached until the run ends: 0.001 GB" in caplog.text
    disk(monkeypatch, free=0)
    check_room(CachePlan(20, 0, 1e5), RunFolder(tmp_path))


def test_a_run_with_a_limit_that_is_killed_and_resumed_has_the_same_weights(tiny, photos, tmp_path):
    limited = {
        "target": {"cache_limit": 5.5 * (2 * 32 * 17 + 160) / 1e9}
    }  # five images of 4x4 patches and 32 channels
    extra = SHORT | limited | {"steps": 6}
    whole = api.distill(tiny(), photos, tmp_path / "whole", **extra)
    observed = []

    def stop(record, _steps):
        observed.append(record.step)
        if record.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api.distill(tiny(), photos, tmp_path / "parts", checkpoint_every=2, observe=stop, **extra)
    assert len(list((tmp_path / "parts" / "targets").iterdir())) == 5
    parts = api.distill(tiny(), photos, tmp_path / "parts", checkpoint_every=2, resume=True, **extra)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, other)
