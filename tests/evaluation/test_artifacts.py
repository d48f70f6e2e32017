"""Artifact places: where the baseline has outliers, in each of the windows that it looks through."""

from dataclasses import replace

import pytest
import torch

from phreg.backbones.resolve import adapt
from phreg.data.sources import open_images
from phreg.errors import PhregError
from phreg.evaluation.artifacts import artifact_places
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader


@pytest.fixture
def reader(tiny, tmp_path):
    """Its baseline has an artifact in the first patch of whatever it sees."""
    clean, baseline = adapt(tiny()), adapt(tiny())

    def push(_module, _args, output):
        output[:, 1] += 1000  # behind CLS
        return output

    baseline.blocks[-1].register_forward_hook(push)
    return FeatureReader(clean, "clean", FeatureCache(tmp_path / "cache"), reference=baseline)


def test_each_window_has_artifacts_of_its_own(reader, photos):
    source = open_images(photos)
    whole = artifact_places(reader, source, FeatureConfig(size=48))  # 6x8 patches
    windows = artifact_places(reader, source, FeatureConfig(size=48, window=32, stride=32))  # of 4x4
    for once, each in zip(whole, windows, strict=True):
        assert once.nonzero().tolist() == [[0, 0]]
        assert each.nonzero().tolist() == [[0, 0], [0, 4], [2, 0], [2, 4]]


def test_they_are_looked_for_once_whatever_is_measured(reader, photos, tiny, monkeypatch):
    looked = []
    stream = FeatureReader.stream
    monkeypatch.setattr(FeatureReader, "stream", lambda *words: looked.append(words[2]) or stream(*words))
    first = artifact_places(reader, open_images(photos), FeatureConfig(size=48, window=32))
    another = replace(reader, backbone=adapt(tiny(depth=2)), identity="another")
    again = artifact_places(another, open_images(photos), FeatureConfig(size=48, window=32))
    assert len(looked) == 1
    assert all(torch.equal(*masks) for masks in zip(first, again, strict=True))
    views = artifact_places(another, open_images(photos), FeatureConfig(size=48, window=32, views=4))
    assert len(looked) == 1, "an average over views is no other place"
    assert all(torch.equal(*masks) for masks in zip(first, views, strict=True))
    artifact_places(another, open_images(photos), FeatureConfig(size=32))
    assert len(looked) == 2, "on another canvas they are others"


def test_that_there_are_none_is_kept_too(reader, photos, monkeypatch):
    itself = replace(reader, reference=reader.backbone)
    assert artifact_places(itself, open_images(photos), FeatureConfig(size=48)) is None
    monkeypatch.setattr(FeatureReader, "stream", None)
    assert artifact_places(replace(itself), open_images(photos), FeatureConfig(size=48)) is None


def test_places_that_were_damaged_are_noticed(reader, photos):
    artifact_places(reader, open_images(photos), FeatureConfig(size=48))
    (path,) = reader.cache.folder.glob("masks/*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PhregError, match="damaged"):
        artifact_places(reader, open_images(photos), FeatureConfig(size=48))


def test_without_a_baseline_or_artifacts_there_are_no_places(reader, photos):
    source = open_images(photos)
    alone = FeatureReader(reader.backbone, "clean", reader.cache)
    itself = FeatureReader(reader.backbone, "clean", reader.cache, reference=reader.backbone)
    assert artifact_places(alone, source, FeatureConfig(size=48)) is None
    assert artifact_places(itself, source, FeatureConfig(size=48)) is None
