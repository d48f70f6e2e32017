import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from planted import CORNERS, Planted, pictures

from phreg.analysis.norms import NormReport, outliers
from phreg.report.figures import norm_map, norm_quantiles, pca_maps, photo, png, position_map, save_png


@pytest.fixture(scope="module")
def report() -> NormReport:
    return outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])


def grid(seed: int = 0, dim: int = 12) -> torch.Tensor:
    return torch.randn(6, 8, dim, generator=torch.Generator().manual_seed(seed))


def test_drawing_leaves_pyplot_and_its_global_state_alone():
    code = "import sys, phreg.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode
        == 0
    )


def test_a_photo_looks_as_it_did_before_normalisation():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalised = (
        torch.from_numpy(pixels / 255).permute(2, 0, 1).float() - torch.tensor(mean)[:, None, None]
    ) / (torch.tensor(std)[:, None, None])
    np.testing.assert_array_equal(photo(normalised, mean, std), pixels)


def test_a_map_is_as_large_as_asked_and_shows_each_patch_as_one_flat_square():
    drawn = norm_map(torch.rand(6, 8) + 1, low=1.0, high=2.0, side=100)
    # The least whole multiple of 8 patches that reaches 100 pixels.
    assert drawn.shape == (78, 104, 3)
    assert (drawn.reshape(6, 13, 8, 13, 3) == drawn[::13, ::13].reshape(6, 1, 8, 1, 3)).all()


def test_longer_tokens_are_brighter_and_those_beyond_the_limits_are_like_the_limits():
    drawn = norm_map(torch.tensor([[0.0, 1.0, 10.0, 100.0, 1000.0]]), low=1.0, high=100.0, side=5)[0]
    light = drawn.astype(int).sum(-1)
    assert light[0] == light[1] < light[2] < light[3] == light[4]


def test_equal_norms_can_be_drawn():
    assert norm_map(torch.full((2, 2), 3.0), low=3.0, high=3.0).shape == (224, 224, 3)


def test_maps_of_equal_features_are_equal_whatever_is_drawn_beside_them():
    before, after, other = pca_maps(grid(0), grid(0), grid(1))
    np.testing.assert_array_equal(before, after)
    assert (other != before).any()


def test_a_token_has_the_same_colour_in_every_map_drawn_together():
    first, second = grid(0), grid(1)
    second[5, 7] = first[0, 0]
    left, right = pca_maps(first, second, side=8)
    np.testing.assert_array_equal(left[0, 0], right[5, 7])


def test_the_colours_do_not_depend_on_the_order_of_the_maps():
    left, right = pca_maps(grid(0), grid(1))
    np.testing.assert_array_equal(pca_maps(grid(1), grid(0)), [right, left])


def test_the_strongest_component_is_red():
    features = 0.01 * grid()
    features[:, :4, 5] += 1
    (drawn,) = pca_maps(features, side=8)
    assert abs(int(drawn[:, :4, 0].mean()) - int(drawn[:, 4:, 0].mean())) > 200


def test_one_wild_token_does_not_drown_the_others():
    features = torch.rand(20, 20, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [3.0, 2.0, 1.0]
    )
    features[0, 0, 0] = 1000.0
    (drawn,) = pca_maps(features, side=20)
    # Scaled from the least to the largest value, the rest would differ by less than one level of 255.
    assert drawn[1:].std(axis=(0, 1)).min() > 30


def test_features_that_are_all_alike_can_be_drawn():
    (drawn,) = pca_maps(torch.ones(4, 4, 8))
    assert (drawn == drawn[0, 0]).all()


def test_charts_of_two_models_are_twice_as_wide(report: NormReport):
    for chart, given in ((position_map, report.position_histogram), (norm_quantiles, report)):
        one, two = (Image.open(io.BytesIO(png(chart(*[given] * count)))) for count in (1, 2))
        assert two.size == (2 * one.width, one.height)
        assert one.mode == "RGBA"
        assert one.getpixel((0, 0))[3] == 0, "charts have no background"


def test_position_maps_of_two_models_share_one_scale(report: NormReport):
    figure = position_map(report.position_histogram, report.position_histogram / 4)
    drawn = [axes.images[0] for axes in figure.axes if axes.images]
    assert [image.get_clim() for image in drawn] == [(0, 100), (0, 100)]
    assert drawn[1].get_array().max() == 25


def test_the_fan_marks_the_threshold_in_blocks_with_outliers_alone(report: NormReport):
    def crosses(figure: Figure) -> list[list[float]]:
        lines = figure.axes[0].lines
        return [line.get_xydata().tolist() for line in lines if line.get_marker() == "x"]

    expected = [[block.block, block.gap.threshold] for block in report.blocks if block.gap]
    assert [point[0] for point in expected] == [2, 3]
    assert crosses(norm_quantiles(report)) == [expected]
    assert crosses(norm_quantiles(outliers(Planted(), [pictures()]))) == []


def test_pictures_are_saved_as_png(tmp_path: Path, report: NormReport):
    drawn = norm_map(report.maps[0, -1], 1.0, 100.0)
    save_png(tmp_path / "map.png", drawn)
    save_png(tmp_path / "chart.png", norm_quantiles(report))
    with Image.open(tmp_path / "map.png") as read, Image.open(tmp_path / "chart.png") as chart:
        np.testing.assert_array_equal(np.asarray(read), drawn)
        assert chart.format == "PNG"
