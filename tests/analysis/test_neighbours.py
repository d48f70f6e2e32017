"""What kind of patch becomes an outlier: measured on images whose answer is known."""

import json
import math

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from planted import Planted, pictures

from phreg.analysis.neighbours import contrast, neighbour_cosines, neighbour_report, patch_embeddings
from phreg.backbones.resolve import adapt
from phreg.errors import PhregError
from phreg.registers import add_registers

EMBEDDINGS = [
    "transformers/vit",
    "transformers/dinov3",
    "transformers/clip",
    "transformers/siglip2",  # a linear layer over patches laid out already
    "transformers/aimv2-vision",  # a norm after the convolution
    "transformers/vit-mae",
    "timm/vit",
    "timm/eva02",
    "timm/naflexvit-reg",
    "open_clip/clip",
    "open_clip/siglip",
]


@given(rows=st.integers(1, 4), cols=st.integers(1, 4), seed=st.integers(0, 100))
def test_each_patch_is_compared_with_the_neighbours_it_has(rows: int, cols: int, seed: int):
    grid = torch.randn(2, rows, cols, 5, generator=torch.Generator().manual_seed(seed))
    found = neighbour_cosines(grid)
    for row in range(rows):
        for col in range(cols):
            around = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
            inside = [(i, j) for i, j in around if 0 <= i < rows and 0 <= j < cols]
            cosines = [torch.cosine_similarity(grid[:, row, col], grid[:, i, j], dim=-1) for i, j in inside]
            expected = torch.stack(cosines).mean(0) if cosines else torch.zeros(2)
            # fp32 sums of a few terms, in another order.
            torch.testing.assert_close(found[:, row, col], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_patch_embeddings_lie_as_the_image_does_and_know_no_position(family: str):
    backbone = add_registers(adapt(FAMILIES[family]()), 2)
    (height, width), patch = backbone.spec.input_size, backbone.spec.patch_size
    rows, cols = height // patch[0], width // patch[1]
    images = torch.randn(2, 3, *patch, generator=torch.Generator().manual_seed(0)).repeat(1, 1, rows, cols)
    images[:, :, patch[0] : 2 * patch[0], 2 * patch[1] : 3 * patch[1]] += 1  # row 1, column 2
    with torch.no_grad(), patch_embeddings(backbone, backbone.layout(images)) as found:
        backbone.run(images)
    grid = found[-1]
    assert grid.shape == (2, rows, cols, backbone.spec.width)
    apart = (grid - grid[:, :1, :1]).norm(dim=-1) / grid.norm(dim=-1)
    odd = torch.zeros(2, rows, cols, dtype=torch.bool)
    odd[:, 1, 2] = True
    # Equal patches have equal embeddings, but for fp32 rounding; a position would move them by far more.
    assert apart[~odd].max() < 1e-5
    assert apart[odd].min() > 1e-2


def test_patch_embeddings_that_the_adapter_does_not_name_are_asked_for():
    backbone = Planted()
    backbone.roles = lambda: {"patch_embed": []}
    with (
        pytest.raises(PhregError, match=r"gave nothing, expected a grid of 8x8; correct roles\(\)"),
        patch_embeddings(backbone, backbone.layout(pictures())),
    ):
        backbone.run(pictures())


def test_listening_to_patch_embeddings_ends():
    backbone = Planted()
    with patch_embeddings(backbone, backbone.layout(pictures())) as found:
        backbone.run(pictures())
    backbone.run(pictures())
    assert len(found) == 1


def test_contrast_is_the_deviation_of_the_original_pixels_and_zero_for_any_one_colour():
    backbone = Planted()  # patches of 4 pixels
    pixels = torch.zeros(1, 3, 4, 12)
    pixels[0, 0, :, :4] = 1.0  # red
    pixels[0, :, :, 4:6] = 1.0  # half white, half black
    pixels[0, 2, :2, 8:] = 1.0  # half blue, half black
    found = contrast(backbone, (pixels - 0.5) / 0.5)
    # Half ones and half zeros deviate by 1/2, in three channels or in one. fp32.
    torch.testing.assert_close(found, torch.tensor([[[0, 0.5, 0.5 / math.sqrt(3)]]]))


def test_contrast_does_not_depend_on_how_a_model_normalises():
    pixels = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    found = []
    for family in ("timm/dinov2", "timm/eva02"):
        backbone = adapt(FAMILIES[family]())
        mean, std = (torch.tensor(part)[:, None, None] for part in (backbone.spec.mean, backbone.spec.std))
        found.append(contrast(backbone, (pixels - mean) / std))
    torch.testing.assert_close(*found)


def test_outliers_on_flat_patches_that_resemble_their_neighbours_are_reported_as_such():
    contrasts = torch.linspace(0.01, 1, 200).reshape(2, 10, 10)
    cosines = torch.full((2, 10, 10), 0.25)
    outliers = torch.zeros(2, 10, 10, dtype=torch.bool)
    outliers[0, 0, :3] = True  # among the 20 flattest of 200
    outliers[1, 9, 9] = True
    cosines[outliers] = torch.tensor([0.9, 0.9, 0.9, 0.5])

    report = neighbour_report(cosines, contrasts, outliers)

    assert report.outliers is not None
    assert report.outliers.mean == pytest.approx(0.8)
    assert report.others.mean == pytest.approx(0.25)
    assert (report.outliers.quantiles[0], report.outliers.quantiles[-1]) == pytest.approx((0.5, 0.9))
    assert sum(report.outliers.histogram.counts) == 4
    assert sum(report.others.histogram.counts) == 196
    assert (report.others.histogram.low, report.others.histogram.high) == (-1, 1)
    assert report.low_information == pytest.approx(0.1)
    assert report.outliers_low_information == 0.75


def test_where_more_than_a_tenth_are_equally_flat_all_of_them_count():
    contrasts = torch.rand(1, 10, 10, generator=torch.Generator().manual_seed(0)) + 0.1
    contrasts[0, :4] = 0  # a white background
    outliers = torch.zeros(1, 10, 10, dtype=torch.bool)
    outliers[0, 2:6, 0] = True
    report = neighbour_report(torch.zeros(1, 10, 10), contrasts, outliers)
    assert report.contrast == 0
    assert report.low_information == pytest.approx(0.4)
    assert report.outliers_low_information == 0.5


def test_without_outliers_nothing_is_said_of_them_and_the_report_is_plain_json():
    none = torch.zeros(1, 4, 4, dtype=torch.bool)
    report = neighbour_report(torch.zeros(1, 4, 4), torch.rand(1, 4, 4), none)
    read = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert read["outliers"] is None
    assert read["outliers_low_information"] is None
    assert read["others"]["mean"] == 0
    assert len(read["others"]["quantiles"]) == len(read["quantiles"])
