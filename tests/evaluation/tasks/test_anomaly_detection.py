"""Anomaly detection: the whole against slow loops in numpy, and each setting against what it says."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter, label

import phreg
from phreg.backbones.resolve import adapt
from phreg.data.sources import open_images
from phreg.errors import DataError
from phreg.evaluation.datasets.anomalies import open_anomalies
from phreg.evaluation.dense import Placement
from phreg.evaluation.feature_cache import FeatureCache
from phreg.evaluation.features import FeatureConfig, FeatureReader
from phreg.evaluation.tasks.anomaly_detection import (
    Settings,
    distances,
    fill_bank,
    greedy_coreset,
    image_score,
    is_stochastic,
    pixel_map,
    run,
)
from phreg.evaluation.tasks.table import resolve_settings

READING = FeatureConfig(size=32)
MASK = "ground_truth/stain/001_mask.png"


def texture(generator, defect=None):
    """A picture of coarse noise, with a coloured square where a defect is."""
    picture = 90 + generator.integers(0, 40, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    if defect is not None:
        top, left, side = defect
        picture[top : top + side, left : left + side] = (250, 40, 40)
    return Image.fromarray(picture.astype(np.uint8))


def plant(root, seed=0, masks=True):
    generator = np.random.default_rng(seed)
    for part in ("train/good", "test/good", "test/stain", "ground_truth/stain"):
        (root / part).mkdir(parents=True)
    for number in range(4):
        texture(generator).save(root / "train" / "good" / f"{number:03}.png")
    for number in range(3):
        texture(generator).save(root / "test" / "good" / f"{number:03}.png")
        defect = (4 * number, 10, 6 + 4 * number)
        texture(generator, defect).save(root / "test" / "stain" / f"{number:03}.png")
        mask = np.zeros((32, 32), dtype=np.uint8)
        mask[defect[0] : defect[0] + defect[2], defect[1] : defect[1] + defect[2]] = 255
        mask[30:, 1] = 255  # a second region of each
        Image.fromarray(mask).save(root / "ground_truth" / "stain" / f"{number:03}_mask.png")
    if not masks:
        for path in (root / "ground_truth" / "stain").iterdir():
            path.unlink()
    return root


@pytest.fixture
def carpet(tmp_path):
    return plant(tmp_path / "parts" / "carpet")


@pytest.fixture
def reader(tiny, tmp_path):
    return FeatureReader(adapt(tiny()), "tiny", FeatureCache(tmp_path / "cache"), batch_size=2)


def slow_auroc(scores, positive):
    """How often a positive score is the higher one, a tie counting half."""
    wins = [float(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    return np.mean(wins)


def slow_overlap(maps, masks, limit):
    """Thresholds one by one, regions one by one."""
    regions = [
        (labels == number, picture)
        for picture, mask in enumerate(masks)
        for labels, count in [label(mask, np.ones((3, 3)))]
        for number in range(1, count + 1)
    ]
    curve = [(0.0, 0.0)]
    for threshold in sorted({value for scores in maps for value in scores.ravel()}, reverse=True):
        false = sum((scores[~mask] >= threshold).sum() for scores, mask in zip(maps, masks, strict=True))
        found = [(maps[picture][region] >= threshold).mean() for region, picture in regions]
        curve.append((false / sum((~mask).sum() for mask in masks), np.mean(found)))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def slowly(reader, carpet, neighbours, share):
    """The task, in loops over patches."""

    def grids(folder):
        return [dense.grid.numpy() for dense in reader.stream(open_images(folder), READING)]

    bank = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids(carpet / "train" / "good")])
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    scores, maps, masks = [], [], []
    for kind in ("good", "stain"):
        for number, grid in enumerate(grids(carpet / "test" / kind)):
            apart = np.zeros(grid.shape[:2], dtype=np.float32)
            for row, col in np.ndindex(*apart.shape):
                patch = grid[row, col] / np.linalg.norm(grid[row, col])
                apart[row, col] = np.sort(1 - bank @ patch)[:neighbours].mean()
            scores.append(np.sort(apart.ravel())[::-1][: max(1, int(share * apart.size))].mean())
            wide = torch.nn.functional.interpolate(torch.tensor(apart)[None, None], (32, 32), mode="bilinear")
            maps.append(gaussian_filter(wide[0, 0].numpy(), 4))
            path = carpet / "ground_truth" / kind / f"{number:03}_mask.png"
            masks.append(np.array(Image.open(path)) > 0 if kind == "stain" else np.zeros((32, 32), bool))
    return np.array(scores), maps, masks


@pytest.mark.parametrize(("neighbours", "share"), [(1, 0.01), (3, 0.25)])
def test_the_task_equals_loops_over_patches_pixels_and_thresholds(reader, carpet, neighbours, share):
    settings = Settings(reading=READING, neighbours=neighbours, highest=share)
    found = run(reader, str(carpet), settings, seed=0)
    scores, maps, masks = slowly(reader, carpet, neighbours, share)
    positive = np.arange(6) > 2
    assert found.figures["image_auroc"] == pytest.approx(slow_auroc(scores, positive), abs=1e-9)
    pixels, defects = np.concatenate(maps).ravel(), np.concatenate(masks).ravel()
    # A rounding of fp32 may swap two of some thousand pixels.
    assert found.figures["pixel_auroc"] == pytest.approx(slow_auroc(pixels, defects), abs=1e-5)
    assert found.figures["pro"] == pytest.approx(slow_overlap(maps, masks, 0.3), abs=1e-4)
    assert found.detail["pro"] == {"carpet": found.figures["pro"]}
    assert found.counts == {
        "image_auroc": {"images": 6, "categories": 1},
        "pixel_auroc": {"pixels": 6 * 32 * 32, "images": 6, "categories": 1},
        "pro": {"regions": 6, "images": 6, "categories": 1},
    }
    assert found.notes["bank"] == {"carpet": 4 * 16}


def test_figures_are_means_over_categories_and_some_can_be_chosen(reader, carpet):
    plant(carpet.parent / "tile", seed=1)
    (carpet.parent / "notes").mkdir()
    both = run(reader, str(carpet.parent), Settings(reading=READING), seed=0)
    alone = run(reader, str(carpet.parent), Settings(reading=READING, categories=("tile",)), seed=0)
    assert list(both.detail["pro"]) == ["carpet", "tile"]
    assert both.figures["pro"] == pytest.approx(np.mean(list(both.detail["pro"].values())))
    assert both.counts["image_auroc"] == {"images": 12, "categories": 2}
    assert alone.figures["pro"] == both.detail["pro"]["tile"]


def test_without_masks_pictures_alone_are_measured_and_the_result_says_so(reader, tmp_path):
    bare = plant(tmp_path / "bare", masks=False)
    found = run(reader, str(bare), Settings(reading=READING), seed=0)
    assert list(found.figures) == ["image_auroc"]
    assert list(found.notes["left_out"]) == ["pixel_auroc", "pro"]


def test_a_bank_of_few_shots_holds_the_pictures_of_its_seed(reader, carpet):
    (parts,) = open_anomalies(carpet)
    whole = fill_bank(reader, parts, Settings(reading=READING), seed=0)
    second = fill_bank(reader, parts, Settings(reading=READING, shots=2), seed=1)
    torch.testing.assert_close(second, whole[32:])
    with pytest.raises(DataError, match=r"shots=2 asked for of carpet with seed 2, .* found 4 in train/good"):
        fill_bank(reader, parts, Settings(reading=READING, shots=2), seed=2)


def test_a_seed_matters_where_something_is_drawn(carpet):
    assert not is_stochastic("", Settings())
    assert is_stochastic("", Settings(shots=1))
    assert is_stochastic("", Settings(coreset=0.5))


def test_a_coreset_takes_the_farthest_patch_each_time():
    # Three far clusters on a line: whatever the start, the first three chosen are one of each.
    features = torch.cat([centre + torch.rand(20, 2) for centre in (0.0, 100.0, 250.0)])
    chosen = greedy_coreset(features, 6, seed=0)
    assert {int(number) // 20 for number in chosen[:3]} == {0, 1, 2}
    left = features[chosen[:3]]
    for number in chosen[3:]:  # slowly: the one whose nearest chosen patch is farthest away
        apart = torch.cdist(features, left).amin(1)
        assert int(number) == int(apart.argmax())
        left = torch.cat([left, features[number][None]])


def test_a_coreset_keeps_the_share_asked_for_and_covers_what_chance_would_not(reader, carpet):
    (parts,) = open_anomalies(carpet)
    whole = fill_bank(reader, parts, Settings(reading=READING), seed=0)
    kept = fill_bank(reader, parts, Settings(reading=READING, coreset=0.25), seed=0)
    assert len(kept) == len(whole) // 4
    drawn = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[: len(kept)]]
    assert torch.cdist(whole, kept).amin(1).max() < torch.cdist(whole, drawn).amin(1).max()


def test_squared_distances_are_those_of_unscaled_features():
    bank, queries = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[3.0, 0.0], [3.0, 4.0]])
    found = distances(bank, queries, Settings(distance="squared"))
    torch.testing.assert_close(found, torch.tensor([9.0, 0.0]))
    both = distances(bank, queries, Settings(distance="squared", neighbours=2))
    torch.testing.assert_close(both, torch.tensor([12.5, 12.5]))


def test_features_are_averaged_over_their_neighbourhood_with_zeros_outside(reader, carpet):
    (parts,) = open_anomalies(carpet)
    dense = next(iter(reader.stream(parts.train, READING)))
    bank = fill_bank(reader, parts, Settings(reading=READING, neighbourhood=1), seed=0)
    torch.testing.assert_close(bank[0], dense.grid[:2, :2].sum((0, 1)) / 9)
    torch.testing.assert_close(bank[5], dense.grid[:3, :3].mean((0, 1)))


def test_the_score_of_a_picture_is_the_mean_of_the_share_that_is_highest():
    apart = torch.arange(200.0)
    assert image_score(apart, 0.01) == 198.5
    assert image_score(apart, 0.0) == 199
    assert image_score(apart[:50], 0.01) == 49, "one patch at least"


def test_a_map_covers_the_part_of_the_picture_that_was_shown():
    cropped = Placement((20, 30), (16, 16), (0, 0, 16, 16), (0, 5, 20, 20))
    assert pixel_map(torch.rand(2, 2), cropped, 4.0).shape == (20, 20)
    padded = Placement((20, 30), (32, 32), (0, 0, 20, 30), (0, 0, 20, 30))
    grid = torch.zeros(4, 4)
    grid[3] = 1.0  # rows 24 to 32 of the canvas, which is padding
    assert pixel_map(grid, padded, 0.0).max() == 0


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / MASK).unlink(), r"3 test .* 1 of which have no mask"),
        (lambda root: Image.new("L", (9, 9)).save(root / MASK), "measures 9x9"),
        (lambda root: Image.new("L", (32, 32)).save(root / MASK), "marks no pixel"),
        (lambda root: [path.unlink() for path in (root / "train/good").iterdir()], "has 0 normal pictures"),
        (lambda root: (root / "train/good").rename(root / "train/fine"), "found none; expected CATEGORY"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_by_name(reader, carpet, spoil, message):
    spoil(carpet)
    with pytest.raises(DataError, match=message):
        run(reader, str(carpet), Settings(reading=READING), seed=0)


def test_an_unknown_category_is_refused_with_those_there_are(carpet):
    with pytest.raises(DataError, match=r"tile asked for in .*, found carpet"):
        open_anomalies(carpet.parent, ["tile"])


def test_masks_may_be_called_as_their_pictures_as_in_visa(reader, carpet):
    before = run(reader, str(carpet), Settings(reading=READING), seed=0)
    for path in list((carpet / "ground_truth" / "stain").iterdir()):
        path.rename(path.with_name(path.name.replace("_mask", "")))
    assert run(reader, str(carpet), Settings(reading=READING), seed=0) == before


def test_patchcore_is_measured_within_the_middle_that_it_reads(saved, carpet, tmp_path):
    results = phreg.evaluate(
        saved, task="anomaly-detection", data=carpet, output=tmp_path / "out", protocol="patchcore",
        device="cpu", reading={"size": 16, "resize": 32},
    )  # fmt: skip
    assert results.records[0].counts[0]["pixel_auroc"]["pixels"] == 6 * 16 * 16
    assert "Protocol patchcore. Not as published: " in results.to_markdown()
    assert resolve_settings("anomaly-detection", {}, "patchcore").coreset == 0.1
