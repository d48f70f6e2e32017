import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from planted import CORNERS, Planted, pictures
from torch.nn import functional

from phreg.analysis.interpolation import MIN_STRENGTH, interpolation_effect, resampling, stripes
from phreg.analysis.norms import outliers
from phreg.backbones.resolve import adapt
from phreg.errors import DataError, PhregError


def lines(rows, cols, every, share=0.4):
    """A map with outliers on every so-manieth row, and a few anywhere."""
    found = 0.05 * torch.rand(rows, cols, generator=torch.Generator().manual_seed(0))
    found[torch.arange(0, rows, every).round().long()] += share
    return found


@pytest.mark.parametrize("every", [2, 2.3125, 3.2, 4])
def test_stripes_along_rows_are_found_whatever_their_period(every):
    # 2.3125 is the ratio of the grids of DINOv2's own 518 pixels and of 224.
    found = stripes(lines(37, 16, every))
    assert found.rows.striped
    assert found.found
    assert not found.cols.striped


def test_stripes_turn_with_the_map():
    upright, turned = stripes(lines(32, 20, 3)), stripes(lines(32, 20, 3).T)
    assert turned.cols == upright.rows
    assert turned.rows == upright.cols


@pytest.mark.parametrize("every", [2, 3, 4, 5])
def test_the_period_is_the_shortest(every):
    assert stripes(lines(32, 32, every)).rows.period == every


def test_strength_is_what_its_description_says():
    even = torch.zeros(24, 24)
    even[::2] = 1
    assert stripes(even).rows.strength == pytest.approx(1)
    single = torch.zeros(24, 24)
    single[::4] = 1
    # Ends of the series hold a line more or less, so that the mean is not quite a quarter.
    assert stripes(single).rows.strength == pytest.approx(4 / (2 * 3), abs=0.05)


@pytest.mark.parametrize("side", [14, 16, 37])
def test_corners_borders_slopes_humps_and_single_patches_are_no_stripes(side):
    maps = {name: torch.zeros(side, side) for name in ("nothing", "corners", "border", "patch")}
    maps["corners"][[0, 0, -1, -1], [0, -1, 0, -1]] = 1
    maps["border"] += 1
    maps["border"][1:-1, 1:-1] = 0
    maps["patch"][3, 5] = 1
    axis = torch.linspace(-2, 2, side)
    maps["slope"] = (axis + 2)[:, None].expand(side, side).clone()
    maps["hump"] = torch.exp(-(axis**2) - axis[:, None] ** 2)
    for name, found in ((name, stripes(histogram)) for name, histogram in maps.items()):
        assert not found.found, name
        assert max(found.rows.strength, found.cols.strength) < 0.2, name


def test_noise_is_seldom_taken_for_stripes():
    generator = np.random.default_rng(0)
    maps = [torch.from_numpy(generator.poisson(1.0, (16, 16)) / 50).float() for _ in range(40)]
    # By construction one in a hundred for each side: 0.8 of 40 maps; five would be a 1-in-1000 event.
    assert sum(stripes(histogram).found for histogram in maps) < 5


@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 100))
def test_strength_stays_within_its_range(rows, cols, seed):
    found = stripes(torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)))
    for side in (found.rows, found.cols):
        assert 0 <= side.strength <= 1
        assert MIN_STRENGTH <= side.threshold <= 1
        assert (side.period is None) == (side.strength == 0)


def test_the_histogram_of_a_norm_report_is_what_it_takes():
    report = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])
    assert json.loads(json.dumps(stripes(report.position_histogram).to_json()))["found"] is False


# -- the effect

RESAMPLING = {
    "timm/vit": True,
    "timm/eva02": True,
    "timm/siglip": True,
    "timm/naflexvit-reg": True,
    "transformers/dinov2": False,
    "transformers/dinov2-registers": True,
    "transformers/clip-vision": False,
    "transformers/siglip2-vision": True,
    "open_clip/clip": True,
    "open_clip/siglip": True,
}
"""Families that resample their positions, and whether they antialias."""


def smaller(backbone, count=3):
    """Images of three quarters of the model's own size."""
    height, width = (3 * side // 4 for side in backbone.spec.input_size)
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", RESAMPLING)
def test_what_a_library_does_by_itself_is_one_of_the_two(family):
    backbone = adapt(FAMILIES[family]())
    images = smaller(backbone)
    with torch.no_grad():
        own = backbone(images).patches
        ways = []
        for antialias in (True, False):
            with resampling(antialias=antialias) as asked:
                ways.append(backbone(images).patches)
            assert set(asked) == {RESAMPLING[family]}
    assert torch.equal(own, ways[0 if RESAMPLING[family] else 1])
    assert not torch.equal(ways[0], ways[1])

    effect = interpolation_effect(backbone, [images])
    assert effect.library_antialiases is RESAMPLING[family]
    assert effect.cosine < 1 - 1e-6
    assert effect.worst_cosine <= effect.cosine
    assert effect.norm_change > 0


def test_antialiasing_takes_out_what_the_smaller_grid_cannot_show(tiny):
    model = tiny(img_size=128, depth=1)  # a grid of 16x16
    with torch.no_grad():
        table = torch.zeros(16, 16, 32)
        table[::2] = 5.0 * torch.randn(32, generator=torch.Generator().manual_seed(0))
        model.pos_embed[:, 1:] = (table - table.mean((0, 1))).flatten(0, 1)
    effect = interpolation_effect(adapt(model), [torch.zeros(2, 3, 48, 48)])
    assert effect.own_grid == (16, 16)
    assert effect.grid == (6, 6)
    assert effect.images == 2
    assert effect.antialiased.norm < 0.5 * effect.plain.norm
    assert effect.cosine < 0.9


def test_where_nothing_aliases_little_changes(tiny):
    down, up = (interpolation_effect(adapt(tiny()), [torch.randn(2, 3, side, side)]) for side in (16, 64))
    assert up.cosine > down.cosine


def test_the_effect_is_plain_json_and_does_not_depend_on_batches(tiny):
    images = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    whole, parts = (interpolation_effect(adapt(tiny()), batches) for batches in ([images], images.split(1)))
    read = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert read["plain"]["antialias"] is False
    assert len(read["antialiased"]["positions"]) == 3
    # One image and four round differently.
    assert whole.cosine == pytest.approx(parts.cosine, abs=1e-6)


def test_models_without_a_table_to_resample_are_refused():
    for family in ("timm/dinov3", "transformers/dinov3"):
        backbone = adapt(FAMILIES[family]())
        with pytest.raises(PhregError, match="rotary or computed"):
            interpolation_effect(backbone, [smaller(backbone)])


def test_models_of_one_size_are_refused():
    backbone = adapt(FAMILIES["transformers/aimv2-vision"]())
    with pytest.raises(PhregError, match="takes only its own size"):
        interpolation_effect(backbone, [smaller(backbone)])


def test_images_of_the_models_own_size_are_refused(tiny):
    with pytest.raises(PhregError, match="its own size"):
        interpolation_effect(adapt(tiny()), [torch.zeros(1, 3, 32, 32)])


def test_no_images_and_two_sizes_are_refused(tiny):
    with pytest.raises(DataError, match="found no images"):
        interpolation_effect(adapt(tiny()), [])
    with pytest.raises(DataError, match="one size"):
        interpolation_effect(adapt(tiny()), [torch.zeros(1, 3, side, side) for side in (24, 48)])


def test_torch_is_as_before_even_after_an_error():
    before = functional.interpolate
    with pytest.raises(ZeroDivisionError), resampling(antialias=True):
        raise ZeroDivisionError
    assert functional.interpolate is before


def test_resampling_that_knows_no_antialiasing_is_left_alone():
    images = torch.rand(1, 3, 8, 8)
    with resampling(antialias=True) as asked:
        nearest = functional.interpolate(images, (4, 4), mode="nearest")
        positional = functional.interpolate(images, (4, 4), None, "bilinear")
    assert torch.equal(nearest, functional.interpolate(images, (4, 4)))
    assert torch.equal(positional, functional.interpolate(images, (4, 4), mode="bilinear", antialias=True))
    assert asked == [False]
