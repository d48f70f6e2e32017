"""The tasks on masks, on pictures whose classes are colours, so that any model's patches can tell them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import cross_entropy, normalize

from phreg.backbones.resolve import adapt
from phreg.errors import DataError
from phreg.evaluation.datasets.augmentation import CropConfig, PairedCrops
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.metrics.scores import IGNORE
from phreg.evaluation.tasks import dense_nn, linear_segmentation, segmentation
from phreg.evaluation.tasks.linear_segmentation import PROTOCOLS, head_loss
from phreg.evaluation.tasks.table import resolve_settings

COLOURS = np.array([(200, 30, 30), (30, 30, 200)], dtype=np.uint8)


@pytest.fixture
def stripes(tmp_path):
    """Pictures of two colours, the border at a multiple of 8 pixels, a corner not counted."""
    root = tmp_path / "stripes"
    for split, borders in (("train", (8, 16, 24, 16)), ("val", (8, 24))):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number, border in enumerate(borders):
            mask = np.zeros((32, 48 if number else 32), dtype=np.uint8)
            mask[:, border:] = 1
            Image.fromarray(COLOURS[mask]).save(root / "images" / split / f"{number}.png")
            mask[:4, :4] = IGNORE
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("red\nblue\n")
    return str(root)


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=4)


SMALL = {"reading": FeatureConfig(size=32), "steps": 60, "lr": 0.03, "train_batch_size": 2}


@pytest.mark.parametrize("augment", [False, True])
def test_a_linear_head_learns_to_tell_colours(reader, stripes, augment):
    crop = CropConfig(size=32, colour=0, scale=(1, 1.5), max_class_share=1)
    settings = linear_segmentation.Settings(**SMALL, augment=augment, crop=crop)
    found = linear_segmentation.run(reader, stripes, settings, seed=0)
    assert next(iter(found.figures)) == "miou"
    assert found.figures["miou"] > 0.8  # not 1: scores are resampled over the border
    assert set(found.detail["iou"]) == {"red", "blue"}


def test_the_same_seed_gives_the_same_head_and_another_seed_another(reader, stripes):
    settings = linear_segmentation.Settings(**SMALL | {"steps": 1, "lr": 1e-6})  # as it starts
    figures = [linear_segmentation.run(reader, stripes, settings, seed).figures for seed in (0, 0, 1)]
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]


def test_neighbours_tell_colours_without_training(reader, stripes):
    settings = dense_nn.Settings(reading=FeatureConfig(size=32), bank_size=60, neighbours=3)
    found = dense_nn.run(reader, stripes, settings, seed=0)
    assert found.figures["miou"] > 0.8
    assert found.notes["bank"] == 4 * 15


@pytest.mark.parametrize("task", [linear_segmentation, dense_nn])
def test_binary_masks_are_refused_instead_of_scoring_a_perfect_miou(reader, stripes, task):
    settings = {"reading": FeatureConfig(size=32)} | ({"steps": 1} if task is linear_segmentation else {})
    for path in Path(stripes, "masks").rglob("*.png"):
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(DataError, match=r"never show blue.*255"):
        task.run(reader, stripes, task.Settings(**settings), seed=0)
    stated = task.run(reader, stripes, task.Settings(**settings, ignore_index=255), seed=0)
    assert stated.counts["miou"]["pixels"] == 32 * (8 + 24), "what is left, as was asked for"


def test_figures_tell_over_what_they_were_computed(reader, stripes):
    settings = dense_nn.Settings(reading=FeatureConfig(size=32), bank_size=60, neighbours=3)
    found = dense_nn.run(reader, stripes, settings, seed=0)
    over = {"pixels": 32 * (32 + 48) - 2 * 16, "images": 2}  # less a corner of each
    assert found.counts == {
        "miou": over | {"classes": 2},
        "mean_accuracy": over | {"classes": 2},
        "pixel_accuracy": over,
    }
    assert found.notes["true_pixels"] == {"red": 32 * (8 + 24) - 2 * 16, "blue": 32 * (24 + 24)}


def test_artifacts_where_nothing_counts_have_no_figure_and_that_is_said(reader, stripes, monkeypatch):
    places = [torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)]
    monkeypatch.setattr("phreg.evaluation.tasks.segmentation.artifact_places", lambda *_: places)
    settings = dense_nn.Settings(reading=FeatureConfig(size=32), bank_size=60, neighbours=3)
    found = dense_nn.run(reader, stripes, settings, seed=0)
    assert "artifact_accuracy" not in found.figures
    assert "no pixel that counts" in found.notes["left_out"]["artifact_accuracy"]


def test_a_bank_of_no_patch_is_refused(reader, stripes):
    # Lines one pixel wide, between the pixels that are looked at when masks are halved to 16 pixels.
    for path in Path(stripes, "masks", "train").rglob("*.png"):
        mask = np.full(np.array(Image.open(path)).shape, IGNORE, dtype=np.uint8)
        mask[0] = 0
        mask[2] = 1
        Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match="none of the patches of the 4 training images"):
        dense_nn.run(reader, stripes, dense_nn.Settings(reading=FeatureConfig(size=16)), seed=0)
    few = linear_segmentation.Settings(reading=FeatureConfig(size=16), steps=3)
    with pytest.raises(DataError, match="none of the pixels that were seen in 3 steps"):
        linear_segmentation.run(reader, stripes, few, seed=0)


def test_pixels_at_the_baselines_artifacts_are_counted_on_their_own(reader, stripes, tiny, monkeypatch):
    places = [torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 6, dtype=torch.bool)]
    places[1][3, 0] = True  # an 8x8 patch of the second picture
    monkeypatch.setattr("phreg.evaluation.tasks.segmentation.artifact_places", lambda *_: places)
    settings = dense_nn.Settings(reading=FeatureConfig(size=32), bank_size=60, neighbours=3)
    found = dense_nn.run(reader, stripes, settings, seed=0)
    assert found.figures["artifact_accuracy"] == 1
    assert found.notes["pixels_at_artifacts"] == pytest.approx(64 / (32 * 80 - 2 * 16))
    assert found.counts["artifact_accuracy"] == {"pixels": 64, "images": 1}


@given(seed=st.integers(0, 1000))
def test_votes_are_a_softmax_over_the_nearest(seed):
    generator = torch.Generator().manual_seed(seed)
    bank = normalize(torch.randn(20, 4, generator=generator), dim=1)
    shares = torch.rand(20, 3, generator=generator)
    query = torch.randn(1, 4, generator=generator)
    cosines = (normalize(query, dim=1) @ bank.T)[0]
    order = cosines.argsort(descending=True)[:5]
    expected = ((cosines[order] / 0.1).softmax(0)[:, None] * shares[order]).sum(0)
    torch.testing.assert_close(dense_nn.look_up(bank, shares, query, 5, 0.1)[0], expected)


@given(seed=st.integers(0, 1000))
def test_shares_of_single_classes_give_the_cross_entropy_of_pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 4, 5, generator=generator)
    truth = torch.randint(0, 3, (2, 4, 5), generator=generator)
    truth[:, 0] = IGNORE
    shares = torch.stack([truth == index for index in range(3)], dim=1).float()
    expected = cross_entropy(scores, truth, ignore_index=IGNORE)
    torch.testing.assert_close(head_loss(scores, truth), expected)
    torch.testing.assert_close(head_loss(scores, shares), expected)


def test_a_batch_in_which_nothing_counts_has_no_loss():
    nothing = torch.full((1, 8, 8), IGNORE)
    assert head_loss(torch.randn(1, 3, 4, 4), nothing) == 0


def test_picture_and_truth_are_cropped_and_mirrored_together():
    # A picture whose red channel is its truth: they must still agree after any crop.
    truth = torch.arange(40 * 50.0).view(1, 40, 50) % 7
    picture = (truth / 10).expand(3, -1, -1).contiguous()
    crops = PairedCrops(CropConfig(size=24, scale=(1, 1), colour=0), (40, 40), (0.5, 0.5, 0.5))
    flipped = set()
    for key in range(6):
        images, cropped = crops([picture], [truth], key)
        assert images.shape[-2:] == cropped.shape[-2:] == (40, 40)
        # The scale is 1, so nothing is resampled but for rounding.
        torch.testing.assert_close(images[:, :1] * 10, cropped, atol=1e-4, rtol=0)
        flipped.add(bool(cropped[0, 0, 0, 1] < cropped[0, 0, 0, 0]))
    assert flipped == {True, False}


def test_picture_and_truth_are_turned_together():
    truth = torch.zeros(1, 40, 50)
    truth[:, 10:30, 15:35] = 5
    picture = (truth / 10).expand(3, -1, -1).contiguous()
    config = CropConfig(scale=(1, 1), flip=0, colour=0, rotation=45)
    crops, upright = PairedCrops(config, (40, 50), (0.9, 0.9, 0.9)), 0
    for key in range(8):
        images, turned = (side[0] for side in crops([picture], [truth], key))
        if torch.equal(turned, truth):
            upright += 1
            continue
        assert set(turned.unique().tolist()) == {0, 5, IGNORE}
        expected = torch.where(turned == IGNORE, 9, turned)
        # Bilinear and nearest differ along edges only.
        assert ((images * 10 - expected).abs() < 0.1).float().mean() > 0.9
    assert 0 < upright < 8


@pytest.mark.parametrize(("size", "expected"), [(30, (32, 28)), ((31, 50), (32, 49))])
def test_crops_are_of_whole_patches(size, expected):
    assert CropConfig(size=size).whole_patches((16, 7)) == expected


def test_small_pictures_are_padded_with_what_does_not_count():
    crops = PairedCrops(CropConfig(scale=(0.5, 0.5), flip=0, colour=0), (32, 32), (0.1, 0.2, 0.3))
    images, truth = crops([torch.zeros(3, 32, 32)], [torch.zeros(1, 32, 32)], 0)
    assert (truth[0, 0, 16:] == IGNORE).all()
    assert (truth[0, 0, :16, :16] == 0).all()
    torch.testing.assert_close(images[0, :, 20, 20], torch.tensor([0.1, 0.2, 0.3]))


def test_crops_depend_on_their_key_alone():
    crops = PairedCrops(CropConfig(), (16, 16), (0.5, 0.5, 0.5))
    picture, truth = torch.rand(3, 30, 40), torch.zeros(1, 30, 40)
    state = torch.random.get_rng_state()
    first, again, other = (crops([picture], [truth], key)[0] for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state), "the global state is left alone"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_protocols_are_whole_settings(protocol):
    settings = resolve_settings("linear-segmentation", {"steps": 7}, protocol)
    assert settings.augment
    assert settings.steps == 7
    assert settings.reading.stride == 341
    assert math.isclose(settings.lr, 1e-3)


def test_the_bank_of_hummingbird_has_patches_of_every_epoch_and_void_as_the_first_class(reader, stripes):
    settings = dense_nn.Settings(
        reading=FeatureConfig(size=32, fit="square"), bank_size=4 * 2 * 5, neighbours=3,
        epochs=2, augment=True, rare_first=True, void="first-class",
    )  # fmt: skip
    found = dense_nn.run(reader, stripes, settings, seed=0)
    assert found.notes["bank"] == 4 * 2 * 5, "5 patches of each of 4 images, twice"
    assert found.figures["miou"] > 0.7
    again = dense_nn.run(reader, stripes, settings, seed=0)
    assert again.figures == found.figures
    # All of an image is red, and so is what does not count, once it is taken for the first class.
    for path in Path(stripes, "masks", "train").rglob("*.png"):
        Image.fromarray(np.full(np.array(Image.open(path)).shape, IGNORE, dtype=np.uint8)).save(path)
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:4] = 1
    Image.fromarray(mask).save(Path(stripes, "masks", "train", "0.png"))
    left_out = settings.model_copy(update={"void": "left-out", "augment": False, "epochs": 1})
    assert dense_nn.run(reader, stripes, left_out, seed=0).notes["bank"] == 10, "of the first image alone"
    assert dense_nn.run(reader, stripes, settings, seed=0).notes["bank"] == 4 * 2 * 5


def test_patches_of_rare_classes_are_drawn_first():
    shown = torch.zeros(20, 2)
    shown[:, 0] = 1
    shown[:2] = torch.tensor([0.0, 1.0])  # 2 patches of the other class
    first = [
        dense_nn._order(shown, torch.Generator().manual_seed(seed), rare_first=True)[:2].tolist()
        for seed in range(20)
    ]
    of_the_rare = sum(place < 2 for pair in first for place in pair) / 40
    assert of_the_rare > 0.5, "by chance it were 2 of 20"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_protocol_learns_on_sizes_that_are_no_whole_patches(reader, stripes, protocol):
    # The same sides as published, 16 times smaller: a window is padded, and three cover a picture.
    small = {"reading.size": 30, "reading.window": 30, "reading.stride": 20, "crop.size": 30}
    few = {"steps": 40, "warmup": 2, "lr": 0.03, "train_batch_size": 2, "crop.colour": 0}
    settings = resolve_settings("linear-segmentation", small | few, protocol)
    found = linear_segmentation.run(reader, stripes, settings, seed=0)
    assert found.figures["miou"] > 0.7
    assert found.counts["miou"]["pixels"] == 32 * (32 + 48) - 2 * 16, "of whole pictures"
    crops = linear_segmentation._crops(reader, settings.open(stripes, "train"), settings, seed=0)
    features, truth = next(crops)
    assert truth.shape == (2, 30, 30), "to the pixel"
    assert features.shape[-2:] == (4, 4), "of the padded crop"


def test_channels_are_dropped_whole_and_the_rest_made_up_for():
    features = torch.rand(3, 400, 2, 2, generator=torch.Generator().manual_seed(0)) + 1
    dropped = linear_segmentation._drop(features, 0.1, 0, 5)
    kept = dropped[:, :, 0, 0] != 0
    torch.testing.assert_close(dropped, features * kept[..., None, None] / 0.9)
    assert 0.85 < kept.float().mean() < 0.95
    assert not torch.equal(kept[0], kept[1]), "of each picture anew"
    assert torch.equal(linear_segmentation._drop(features, 0.1, 0, 5), dropped)
    assert not torch.equal(linear_segmentation._drop(features, 0.1, 0, 6), dropped)
    assert torch.equal(linear_segmentation._drop(features, 0.0, 0, 5), features)


def test_what_each_picture_adds_makes_up_the_figures(reader, stripes, whole_sample, monkeypatch):
    places = torch.zeros(4, 4, dtype=torch.bool)
    places[:, :2] = True
    monkeypatch.setattr(segmentation, "artifact_places", lambda *_: [places, places])
    found = dense_nn.run(reader, stripes, dense_nn.Settings(reading=SMALL["reading"], bank_size=40), seed=0)
    whole_sample(found, "miou", "mean_accuracy", "pixel_accuracy", "artifact_accuracy")
