import numpy as np
import torch
from matplotlib import colormaps

from phreg.report.maps import (
    GREY,
    agreement_map,
    attention_maps,
    component_maps,
    cosine_map,
    norm_map,
    pca_maps,
    share_map,
    text_map,
)


def grid(seed: int = 0, dim: int = 12) -> torch.Tensor:
    return torch.randn(6, 8, dim, generator=torch.Generator().manual_seed(seed))


def light(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(int).sum(-1)


def test_a_map_is_as_large_as_asked_and_shows_each_patch_as_one_flat_square():
    drawn = norm_map(torch.rand(6, 8) + 1, low=1.0, high=2.0, side=100)
    # The least whole multiple of 8 patches that reaches 100 pixels.
    assert drawn.shape == (78, 104, 3)
    assert (drawn.reshape(6, 13, 8, 13, 3) == drawn[::13, ::13].reshape(6, 1, 8, 1, 3)).all()


def test_longer_tokens_are_brighter_and_those_beyond_the_limits_are_like_the_limits():
    drawn = light(norm_map(torch.tensor([[0.0, 1.0, 10.0, 100.0, 1000.0]]), low=1.0, high=100.0, side=5)[0])
    assert drawn[0] == drawn[1] < drawn[2] < drawn[3] == drawn[4]


def test_norms_are_drawn_by_their_logarithm():
    drawn = norm_map(torch.tensor([[1.0, 10.0, 100.0]]), low=1.0, high=100.0, side=3)
    np.testing.assert_array_equal(drawn, share_map(torch.tensor([[0.0, 0.5, 1.0]]), high=1.0, side=3))


def test_equal_norms_can_be_drawn():
    assert norm_map(torch.full((2, 2), 3.0), low=3.0, high=3.0).shape == (224, 224, 3)


# -- components


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


def test_several_images_share_one_basis_and_come_back_as_several_maps():
    images = torch.stack([grid(0), grid(1)])
    (together,) = pca_maps(images, side=8)
    assert together.shape == (2, 6, 8, 3)
    np.testing.assert_array_equal(pca_maps(grid(0), grid(1), side=8), together)


def test_models_of_different_widths_can_be_drawn_together():
    wide = torch.cat([-grid(0), torch.zeros(6, 8, 4)], dim=-1)
    left, right = pca_maps(grid(0), wide, side=8)
    # The signs of the first model; one level of 255 for rounding.
    np.testing.assert_allclose(right.astype(int), left.astype(int), atol=1)


def test_features_that_are_all_alike_can_be_drawn():
    (drawn,) = pca_maps(torch.ones(4, 4, 8))
    assert (drawn == drawn[0, 0]).all()


def test_the_first_component_is_white_in_the_middle_and_cut_at_three_deviations():
    features = torch.zeros(10, 10, 4)
    features[..., 1] = torch.linspace(-1e-3, 1e-3, 100).view(10, 10)
    features[0, 0, 1], features[9, 9, 1] = -1.0, 1.0  # 7 standard deviations out
    (drawn,) = component_maps(features, side=10)
    blue, red = drawn[0, 0].astype(int), drawn[9, 9].astype(int)
    assert blue[2] > blue[0] + 50
    assert red[0] > red[2] + 50
    assert drawn[4:6].min() > 240


# -- attention, cosines, texts


def test_attention_has_a_map_a_query_first_the_mean_then_each_head():
    attention = torch.zeros(2, 3, 4, 4)
    attention[0, 1, 2, 3] = 0.3
    drawn = light(attention_maps(attention, high=0.3, side=4))
    assert drawn.shape == (2, 4, 4, 4)
    dark = drawn[1, 0, 0, 0]
    assert drawn[0, 2, 2, 3] > drawn[0, 0, 2, 3] > dark, "a third in the mean, all of it in the second head"
    assert (drawn == dark).sum() == drawn.size - 2


def test_the_chosen_patch_is_framed_and_no_other():
    cosines = torch.full((4, 4), 0.3)
    cosines[1, 2] = 1.0
    drawn = cosine_map(cosines, 1, 2, side=64)
    square = drawn[16:32, 32:48]
    black, white, inside = square[0, 0], square[2, 2], square[8, 8]
    assert black.max() == 0
    assert white.min() == 255
    assert light(inside) > light(drawn[0, 0])
    drawn[16:32, 32:48] = drawn[0, 0]
    assert (drawn == drawn[0, 0]).all()


def test_small_cosine_maps_can_be_drawn():
    assert cosine_map(torch.ones(4, 4), 3, 3, side=1).shape == (4, 4, 3)


def test_cosines_below_zero_are_as_dark_as_zero():
    drawn = cosine_map(torch.tensor([[1.0, 0.0, -0.5, 0.5]]), 0, 0, side=4)[0]
    assert (drawn[1] == drawn[2]).all()
    assert light(drawn[3]) > light(drawn[1])


def test_a_text_lights_up_the_photo_where_it_matches():
    pixels = np.full((32, 48, 3), 120, dtype=np.uint8)
    cosines = torch.tensor([[0.1, 0.2, 0.3], [0.0, 0.0, 0.5]])
    drawn = text_map(pixels, cosines, low=0.1, high=0.3)
    assert drawn.shape == pixels.shape
    squares = light(drawn[8::16, 8::16])
    assert squares[1, 0] == squares[0, 0] < squares[0, 1] < squares[0, 2] == squares[1, 2]
    assert (drawn[:16, 16:32] == drawn[0, 16]).all()


def test_the_photo_shows_through_a_text_map_without_its_colours():
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:, 4:, 1] = 255
    drawn = text_map(pixels, torch.zeros(1, 1), low=0.0, high=1.0).astype(int)
    assert light(drawn[0, 7]) > light(drawn[0, 0])
    assert np.ptp(drawn[0, 7]) <= 5  # the darkest colour of the palette is not quite black


def test_agreement_is_brightest_at_one_darkest_at_the_limit_and_grey_where_unknown():
    drawn = agreement_map(torch.tensor([[1.0, 0.5], [0.2, torch.nan]]), low=0.5, side=2)
    bright, dark = (np.round(255 * np.array(colormaps["viridis"](end)[:3])) for end in (1.0, 0.0))
    np.testing.assert_array_equal(drawn[0, 0], bright)
    np.testing.assert_array_equal(drawn[0, 1], dark)
    np.testing.assert_array_equal(drawn[1, 0], dark)
    np.testing.assert_array_equal(drawn[1, 1], [GREY] * 3)
