"""Artifact places: where the baseline has outliers, in each of the windows that it looks through."""

import pytest

from phreg.backbones.resolve import adapt
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureReader, Reading
from phreg.evaluation.places import artifact_places
from phreg.images import open_images


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
    whole = artifact_places(reader, source, Reading(size=48))  # 6x8 patches
    windows = artifact_places(reader, source, Reading(size=48, window=32, stride=32))  # of 4x4
    for once, each in zip(whole, windows, strict=True):
        assert once.nonzero().tolist() == [[0, 0]]
        assert each.nonzero().tolist() == [[0, 0], [0, 4], [2, 0], [2, 4]]


def test_without_a_baseline_or_artifacts_there_are_no_places(reader, photos):
    source = open_images(photos)
    alone = FeatureReader(reader.backbone, "clean", reader.cache)
    itself = FeatureReader(reader.backbone, "clean", reader.cache, reference=reader.backbone)
    assert artifact_places(alone, source, Reading(size=48)) is None
    assert artifact_places(itself, source, Reading(size=48)) is None
