"""A target is made once, is the same however often it is read, and goes when the run ends."""

import pytest
import torch

from phreg.backbones.base import Features
from phreg.training.target_cache import TargetCache


class Teacher:
    """Makes the targets of some images, and remembers how often it was asked; each time they are others."""

    def __init__(self):
        self.calls = 0

    def __call__(self, count=2):
        self.calls += 1
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
