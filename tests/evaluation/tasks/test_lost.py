import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phreg.errors import PhregError
from phreg.evaluation.tasks.lost import box_around, component_at, lost
from phreg.evaluation.tasks.tokencut import tokencut

# Products of the patches below: bb = oo = mm = 5, bo = 0, bm = 3, om = 4.
b, o, m = (1.0, 2.0), (-2.0, 1.0), (-1.0, 2.0)
PICTURE = torch.tensor([[b, b, m, o], [b, o, b, b]])


def test_lost_by_hand():
    # Similar are products over 0. Each b resembles the 5 b and m: 6. Each o resembles the 2 o and m: 3. m
    # resembles all 8. The o have the lowest degree; alike in all, the first of them is the seed: (0, 3).
    # Among the 3 lowest (both o, one b), those like the seed are the o. Summed products with both: b 0,
    # o 10, m 8. So m and the o are foreground; the seed hangs together with m at its left, and m with the
    # other o by a corner only. Hence the box is the last two columns of the first row.
    found = lost(PICTURE, expansion=3)
    assert found.maps["degree"].tolist() == [[6, 6, 8, 3], [6, 3, 6, 6]]
    assert found.seed == (0, 3)
    assert found.maps["expansion"].tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]
    assert found.maps["similarity"].tolist() == [[0, 0, 8, 10], [0, 10, 0, 0]]
    assert found.component.tolist() == [[False, False, True, True], [False] * 4]
    assert found.box == (2, 0, 4, 1)


def test_a_wider_expansion_takes_in_what_only_resembles_the_seeds_like():
    # Among all 8, m is like the seed too; with m's products every b has 0 + 0 + 3: all is foreground.
    assert lost(PICTURE, expansion=8).box == (0, 0, 4, 2)


def test_a_bias_lowers_similarities_before_anything_is_compared():
    # With -4: bb = oo = mm = 1, bo = -4, bm = -1, om = 0. Degrees: b 5, o 2, m 1. The seed is m, alone like
    # itself, and nothing else has a sum over 0.
    found = lost(PICTURE, bias=-4.0)
    assert found.maps["degree"].tolist() == [[5, 5, 1, 2], [5, 2, 5, 5]]
    assert (found.seed, found.box) == ((0, 2), (2, 0, 3, 1))


def test_a_bias_under_which_nothing_is_similar_leaves_the_seed_alone():
    found = lost(PICTURE, bias=-9.0)
    assert (found.maps["degree"] == 1).all()
    assert int(found.component.sum()) == 1


def test_of_patches_of_one_degree_the_one_that_resembles_less_is_the_seed():
    # All resemble each other; the last has the smallest products.
    assert lost(torch.tensor([[[3.0], [2.0], [1.0]]])).seed == (0, 2)


def test_tokencut_by_hand():
    # Two a are joined with each other, four b with each other, a and b by e = 1e-5 alone. The second
    # eigenvector has one value u on a and one v on b, orthogonal to constants under the degrees:
    # 2 (2 + 4e) u + 4 (4 + 2e) v = 0, so u = -4 v but for terms of e. |u| is larger: the seed is an a, u is
    # taken positive, the mean (2 u + 4 v) / 6 = u / 6 lies between, so that a is the object.
    a, b = (1.0, 0.0), (0.0, 7.0)
    found = tokencut(torch.tensor([[a, b, b], [a, b, b]]))
    vector = found.maps["eigenvector"]
    torch.testing.assert_close(vector[:, :1] / vector[:, 1:], torch.full((2, 2), -4.0), rtol=1e-4, atol=0)
    assert found.maps["partition"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert found.seed in {(0, 0), (1, 0)}  # alike but for rounding
    assert found.box == (0, 0, 1, 2)


def test_one_patch_cannot_be_cut():
    with pytest.raises(PhregError, match="grid of 1x1"):
        tokencut(torch.ones(1, 1, 3))


def test_tau_says_from_which_cosine_patches_are_joined():
    # c lies at a cosine of 0.8 to b and of 0.6 to a. Above 0.6 it belongs to the b, and a alone is cut off.
    # Below, a walk on the graph has eigenvalue m where (3 x + y) / 4 = m x of b, (y + z) / 2 = m z of a, and
    # 12 x + 5 y + 2 z = 0; so 40 m^2 - 18 m - 3 = 0, m = 0.579, and x, y, z of b, c, a are as -1, 0.68, 4.30.
    # The seed is a; c at 0.68 lies above the mean of 0.40, with a.
    a, b, c = (1.0, 0.0), (0.0, 1.0), (0.6, 0.8)
    grid = torch.tensor([[b, b, b, c, a]])
    assert tokencut(grid, tau=0.7).box == (4, 0, 5, 1)
    found = tokencut(grid, tau=0.5)
    vector = found.maps["eigenvector"][0]
    torch.testing.assert_close(
        vector / -vector[0], torch.tensor([-1, -1, -1, 0.682, 4.297]), rtol=1e-3, atol=0
    )
    assert (found.seed, found.box) == ((0, 4), (3, 0, 5, 1))


@st.composite
def planted(draw):
    """A grid with a rectangle of other features in it, smaller than what is around, and its box."""
    rows, cols = draw(st.integers(4, 8)), draw(st.integers(4, 8))
    height, width = draw(st.integers(1, rows // 2)), draw(st.integers(1, cols // 2))
    top, left = draw(st.integers(0, rows - height)), draw(st.integers(0, cols - width))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    grid = torch.tensor([1.0, 0.0, 0.0]).repeat(rows, cols, 1)
    grid[top : top + height, left : left + width] = torch.tensor([-0.5, 1.0, 0.0])
    # Far less than the cosine of -0.45 and the thresholds lie apart.
    return grid + 0.02 * torch.randn(grid.shape, generator=generator), (left, top, left + width, top + height)


@pytest.mark.parametrize("find", [lost, tokencut])
@given(case=planted())
def test_a_planted_object_is_found_wherever_it_is(find, case):
    grid, box = case
    assert find(grid).box == box


@given(seed=st.integers(0, 1000), rows=st.integers(2, 6), cols=st.integers(2, 6), bias=st.floats(-0.5, 0))
def test_lost_finds_the_mirrored_box_in_a_mirrored_grid(seed, rows, cols, bias):
    grid = torch.randn(rows, cols, 5, generator=torch.Generator().manual_seed(seed))
    left, top, right, bottom = lost(grid, bias=bias, expansion=6).box
    assert lost(grid.flip(1), bias=bias, expansion=6).box == (cols - right, top, cols - left, bottom)
    assert lost(grid.flip(0), bias=bias, expansion=6).box == (left, rows - bottom, right, rows - top)
    assert lost(grid.transpose(0, 1), bias=bias, expansion=6).box == (top, left, bottom, right)


@pytest.mark.parametrize("find", [lost, tokencut])
def test_the_box_is_around_the_component_that_holds_the_seed(find):
    grid = torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(1))
    found = find(grid)
    assert found.component[found.seed]
    assert found.box == box_around(found.component)
    assert all(step.shape == (5, 7) for step in found.maps.values())


def test_corners_do_not_hang_together():
    mask = torch.tensor([[True, False, True], [True, False, True], [False, True, False]])
    assert component_at(mask, (1, 0)).tolist() == [[True, False, False], [True, False, False], [False] * 3]
