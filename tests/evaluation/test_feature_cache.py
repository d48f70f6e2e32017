import os
import signal
import subprocess
import sys

import jaxtyping
import pytest
import torch

from phreg.backbones.resolve import adapt
from phreg.data.hub_images import HubImages
from phreg.data.sources import Files, Subset, open_images
from phreg.errors import DataError, PhregError
from phreg.evaluation.feature_cache import GLOBALS, GRIDS, INDEX, FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader

READING = FeatureConfig(size=32)


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


def entries(reader):
    return sorted(path.name for path in reader.cache.folder.iterdir())


def test_kept_features_are_those_read_in_half_precision(reader, mixed_photos):
    source = open_images(mixed_photos)
    kept = reader.features(source, READING)
    for number, dense in enumerate(reader.stream(source, READING)):
        assert torch.equal(kept[number].grid, dense.grid.half().float())
        assert torch.equal(kept[number].pooled, dense.pooled)
        assert kept[number].placement == dense.placement
    assert len(kept) == len(source)
    assert len(entries(reader)) == 1, "no temporary folder is left"


def test_a_rerun_reads_no_image_again(reader, mixed_photos):
    first = reader.features(open_images(mixed_photos), READING)
    reader.backbone.requires_grad_(False)
    reader.backbone.model.norm.weight.zero_()  # what a second reading would show
    again = reader.features(open_images(mixed_photos), READING)
    assert torch.equal(first[0].grid, again[0].grid)


@pytest.mark.parametrize("changed", ["model", "reading", "file", "subset", "turned"])
def test_another_model_reading_or_file_is_read_anew(reader, mixed_photos, changed):
    source = open_images(mixed_photos)
    reader.features(source, READING)
    reading = READING
    match changed:
        case "model":
            reader = FeatureReader(reader.backbone, "another", reader.cache)
        case "reading":
            reading = FeatureConfig(size=32, norm=False)
        case "file":
            os.utime(source.paths[0], ns=(1, 1))
        case "subset":
            source = Subset(source, [0, 1])
        case "turned":  # read as it is stored, whatever EXIF says
            source = Files(source.paths, frozenset({0}))
    reader.features(source, reading)
    assert len(entries(reader)) == 2


def test_a_damaged_entry_is_noticed(reader, mixed_photos, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # type checks read an entry at random
    kept = reader.features(open_images(mixed_photos), READING)
    path = kept.folder / GRIDS
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(PhregError, match=r"picture 0 .* checksum"):
        reader.features(open_images(mixed_photos), READING)[0]
    path.write_bytes(content[:-2])
    with pytest.raises(PhregError, match="bytes instead of"):
        reader.features(open_images(mixed_photos), READING)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", [INDEX, GLOBALS])
def test_a_damaged_description_of_an_entry_says_what_to_delete(name, content, reader, mixed_photos):
    kept = reader.features(open_images(mixed_photos), READING)
    (kept.folder / name).write_bytes(content)
    with pytest.raises(PhregError, match=r"are damaged.*delete this folder and run again"):
        reader.features(open_images(mixed_photos), READING)


def test_nothing_is_written_beyond_the_limit(reader, mixed_photos):
    small = FeatureReader(reader.backbone, "tiny", FeatureCache(reader.cache.folder, limit=1000))
    with pytest.raises(PhregError, match="--cache-limit"):
        small.features(open_images(mixed_photos), READING)
    assert entries(small) == []


def test_entries_count_towards_the_limit_together(reader, mixed_photos):
    reader.features(open_images(mixed_photos), READING)
    used = reader.cache.size()
    full = FeatureReader(reader.backbone, "another", FeatureCache(reader.cache.folder, limit=used + 100))
    with pytest.raises(PhregError, match="limit leaves"):
        full.features(open_images(mixed_photos), READING)


def test_an_interrupted_reading_leaves_nothing_behind(reader, half_broken):
    with pytest.raises(DataError, match=r"1\.png"):
        reader.features(open_images(half_broken), READING)
    assert entries(reader) == []


def test_what_a_killed_run_left_behind_is_deleted_by_the_next(reader, mixed_photos):
    killed = """
import os, signal, sys
from pathlib import Path
from phreg.evaluation.feature_cache import FeatureCache
def read():
    os.kill(os.getpid(), signal.SIGKILL)
    yield
FeatureCache(Path(sys.argv[1]))._write(Path(sys.argv[1]) / "entry", {}, read(), 1)
"""
    ended = subprocess.run([sys.executable, "-c", killed, str(reader.cache.folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [name.endswith(".tmp") for name in entries(reader)] == [True]
    reader.features(open_images(mixed_photos), READING)
    assert [name.endswith(".tmp") for name in entries(reader)] == [False]


def test_what_another_run_is_writing_is_left_alone(reader, mixed_photos):
    other = FeatureReader(reader.backbone, "another", reader.cache)
    items = reader.stream(open_images(mixed_photos), READING)
    first = next(items)

    def meanwhile():
        yield first
        other.features(open_images(mixed_photos), READING)  # another entry, in the middle of this one
        yield from items

    reader.cache._write(reader.cache.folder / "entry", {}, meanwhile(), len(open_images(mixed_photos)))
    assert len(entries(reader)) == 2
    assert not any(name.endswith(".tmp") for name in entries(reader))


def test_runs_that_read_the_same_at_the_same_time_share_one_entry(reader, mixed_photos, tmp_path):
    source = open_images(mixed_photos)
    kept = reader.features(source, READING)
    (name,) = entries(reader)
    entry = (reader.cache.folder / name).rename(tmp_path / "elsewhere")

    def meanwhile():
        yield from reader.stream(source, READING)
        entry.rename(reader.cache.folder / name)  # the other run is done first

    reader.cache._write(reader.cache.folder / name, {}, meanwhile(), len(source))
    assert entries(reader) == [name]
    again = reader.features(source, READING)
    assert torch.equal(again[0].grid, kept[0].grid)


def test_features_that_half_precision_cannot_hold_are_refused(reader, mixed_photos):
    with torch.no_grad():
        reader.backbone.model.norm.weight.fill_(1e6)
    with pytest.raises(PhregError, match="half precision"):
        reader.features(open_images(mixed_photos), READING)


def test_pictures_whose_changes_would_go_unnoticed_are_not_kept(reader):
    with pytest.raises(DataError, match="HubImages"):
        reader.features(HubImages([], "image", "somewhere"), READING)
