"""Head transfer: a head that tells colours, on models whose features are the same, turned, or wider."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import phreg
from phreg.backbones.identity import identify
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.tasks import head_transfer, linear_segmentation

COLOURS = np.array([(200, 30, 30), (30, 30, 200)], dtype=np.uint8)
SMALL = {"reading": FeatureConfig(size=32), "steps": 60, "lr": 0.03, "train_batch_size": 2}


@pytest.fixture
def halves(tmp_path):
    """Pictures of two colours, the border at a multiple of 8 pixels."""
    root = tmp_path / "halves"
    for split, borders in (("train", (8, 16, 24)), ("val", (8, 24))):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number, border in enumerate(borders):
            mask = np.zeros((32, 32), dtype=np.uint8)
            mask[:, border:] = 1
            Image.fromarray(COLOURS[mask]).save(root / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("red\nblue\n")
    return str(root)


@pytest.fixture
def measure(tiny, halves, tmp_path):
    """Measures a model with the tiny one as the baseline."""

    def run(model, baseline=True, **changes):
        backbone, original = adapt(model), adapt(tiny())
        reader = FeatureReader(
            backbone, identify(backbone).whole, FeatureCache(tmp_path / "cache"), batch_size=4,
            reference=original if baseline else None,
        )  # fmt: skip
        return head_transfer.run(reader, halves, head_transfer.Settings(**SMALL | changes), seed=0)

    return run


def turned(model):
    """The same model with its features negated, which no head of the original reads."""
    with torch.no_grad():
        model.norm.weight.neg_()
        model.norm.bias.neg_()
    return model


def test_of_the_original_itself_nothing_is_lost(measure, tiny, halves, tmp_path):
    found = measure(tiny())
    assert list(found.figures) == ["miou", "miou_original", "miou_again"]
    assert found.figures["miou"] == found.figures["miou_original"]
    reader = FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "other"), batch_size=4)
    alone = linear_segmentation.run(reader, halves, linear_segmentation.Settings(**SMALL), seed=0)
    assert found.figures["miou"] == alone.figures["miou"], "the head is linear segmentation's"


def test_a_model_that_breaks_heads_is_told_from_one_that_does_not(measure, tiny):
    kept, broken = measure(tiny()), measure(turned(tiny()))
    assert broken.figures["miou_original"] == kept.figures["miou"] > 0.8
    assert broken.figures["miou"] < 0.3
    assert set(broken.detail["iou"]) == {"red", "blue"}


def test_training_again_brings_back_what_the_head_can_learn(measure, tiny):
    short, long = (measure(turned(tiny()), again=share) for share in (1 / 60, 1.0))
    assert (short.notes["steps_again"], long.notes["steps_again"]) == (1, 60)
    assert long.figures["miou"] == short.figures["miou"], "the head that is tested unchanged is"
    assert long.figures["miou_again"] > 0.8 > short.figures["miou_again"]


def test_without_a_baseline_there_is_no_head(measure, tiny):
    with pytest.raises(PhregError, match=r"without the model that heads were trained on.*--baseline"):
        measure(tiny(), baseline=False)


def test_a_head_is_not_asked_of_features_of_another_width(measure, tiny):
    with pytest.raises(PhregError, match=r"a head of 32 channels.*whose patches have 48"):
        measure(tiny(embed_dim=48, num_heads=3))


def test_an_evaluation_sets_a_repaired_model_beside_the_original(tiny, halves, tmp_path):
    repaired = phreg.add_registers(copy.deepcopy(tiny()), 2)
    results = phreg.evaluate(
        repaired, baseline=tiny(), task="head-transfer", data=halves, output=tmp_path / "out",
        device="cpu", **SMALL | {"reading": {"size": 32}, "steps": 5},
    )  # fmt: skip
    heading, rows = results.rows()
    assert heading[1:] == ["mIoU, head of the original", "mIoU of the original", "mIoU, head trained on"]
    assert len(rows) == 2


def test_what_each_picture_adds_makes_up_the_figures(measure, tiny, whole_sample):
    whole_sample(measure(turned(tiny())), "miou", "miou_original", "miou_again")
