import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phreg.backbones.base import Spec
from phreg.config import ViewsConfig
from phreg.data.crops import center_crop
from phreg.errors import PhregError
from phreg.seeding import keyed_generator as generator
from phreg.view_sampling import context_margin, count_different, sample_offsets, sample_views
from phreg.views import AffineViews, Views

SPEC = Spec("timm", "test", (4, 4), 8, 1, 1, (24, 24), True, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
WHITE = [(1 - mean) / std for mean, std in zip(SPEC.mean, SPEC.std, strict=True)]

configs = st.builds(
    ViewsConfig,
    count=st.integers(1, 6),
    max_shift=st.floats(0.2, 0.5),
    sampler=st.sampled_from(["farthest-point", "uniform"]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    fill=st.sampled_from(["context", "white", "black", "mean", "reflect", "replicate", "valid-crop"]),
)
sizes = st.tuples(st.integers(5, 8), st.integers(5, 8)).map(lambda grid: (grid[0] * 4, grid[1] * 4))


def numbered(size, margin=(0, 0)):
    """An image, with its context, whose cells all differ, and the numbers of its own cells as a grid."""
    rows, cols = ((side + 2 * far) // 4 for side, far in zip(size, margin, strict=True))
    grid = torch.arange(float(rows * cols)).view(1, rows, cols)
    image = grid.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).repeat(2, 3, 1, 1)
    image[1] += 1000
    own = grid[0, margin[0] // 4 : rows - margin[0] // 4, margin[1] // 4 : cols - margin[1] // 4]
    return image, torch.stack([own, own + 1000])


def cells(views):
    """The token grid of a model that copies a cell's upper left pixel."""
    return views[:, :, :1, ::4, ::4].permute(0, 1, 3, 4, 2)


@settings(max_examples=60)
@given(configs, sizes, st.integers(0, 2**32))
def test_undo_inverts_apply_exactly_wherever_the_view_saw_the_image(config, size, seed):
    image, grid = numbered(size, context_margin(config, SPEC, size))
    for group in sample_views(config, SPEC, size, 2, generator(seed)):
        aligned, seen = group.undo(cells(group.apply(image)))
        truth = grid.unsqueeze(1).expand_as(seen)
        assert torch.equal(aligned.squeeze(-1)[seen], truth[seen])


@settings(max_examples=30)
@given(configs, sizes, st.integers(0, 2**32))
def test_every_position_is_seen_by_the_first_view_at_least_and_that_view_is_the_image_itself(
    config, size, seed
):
    margin = context_margin(config, SPEC, size)
    image, _ = numbered(size, margin)
    groups = sample_views(config, SPEC, size, 2, generator(seed))
    first = groups[0].part(slice(None), slice(0, 1))
    assert torch.equal(first.apply(image)[:, 0], center_crop(image, margin))
    assert first.undo(cells(first.apply(image)))[1].all()
    assert sum(group.count for group in groups) == config.count


@pytest.mark.parametrize(("dy", "dx", "flip"), [(1, -2, False), (-2, 2, True), (0, 1, True), (2, 0, False)])
def test_apply_is_a_slow_shift_then_mirror_with_white_outside(dy, dx, flip):
    # The published semantics, written out pixel by pixel: out[y, x] = in[y + dy, x + dx], then mirrored.
    config = ViewsConfig(count=1, max_shift=0.5)
    (group,) = sample_views(config, SPEC, (24, 24), 2, generator(0))
    group = type(group)(
        torch.tensor([[[dy, dx]]]).repeat(2, 1, 1),
        torch.tensor([[flip]]).repeat(2, 1),
        group.grid,
        group.window,
        group.margin,
        group.fill,
    )
    image = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(image)
    for y in range(24):
        for x in range(24):
            from_y, from_x = y + dy * 4, x + dx * 4
            inside = 0 <= from_y < 24 and 0 <= from_x < 24
            expected[:, :, y, x] = image[:, :, from_y, from_x] if inside else torch.tensor(WHITE)
    if flip:
        expected = expected.flip(-1)
    assert torch.equal(group.apply(image)[:, 0], expected)


def test_shifts_are_rounded_to_the_papers_patch_counts():
    # PH-Reg code: 4 of 28 patches (CLIP at 448), 6 of 37 (DINOv2 at 518).
    for patch, side, reach in ((16, 448, 4), (14, 518, 6)):
        spec = Spec("timm", "x", (patch, patch), 8, 1, 1, (side, side), True, SPEC.mean, SPEC.std)
        (group,) = sample_views(ViewsConfig(count=10), spec, (side, side), 64, generator(1))
        assert group.offsets.abs().max() == reach


def test_farthest_points_lie_further_out_than_uniform_ones():
    # PH-Reg code on a 28 grid: 66 % of the offsets on the border of the range, against 40 % for uniform ones.
    def on_border(sampler):
        config = ViewsConfig(count=10, sampler=sampler)
        offsets = sample_offsets(config, (-4, -4), (4, 4), 2000, generator(0))
        return (offsets.abs().amax(-1) == 4).float().mean().item()

    # The standard deviation of a mean over 20 000 offsets is well below 0.01.
    assert on_border("farthest-point") == pytest.approx(0.66, abs=0.03)
    assert on_border("uniform") == pytest.approx(1 - 49 / 81, abs=0.02)


def test_uniform_shifts_are_independent_of_each_other():
    config = ViewsConfig(count=9, sampler="uniform")
    offsets = sample_offsets(config, (-1, -1), (1, 1), 5000, generator(0))
    numbers = (3 * offsets[..., 0] + offsets[..., 1] + 4).sort().values  # which of the nine shifts
    different = 1 + (numbers.diff() > 0).sum(1).float().mean().item()
    # Of nine shifts, nine draws leave each out with probability (8/9)**9; the mean's spread is 0.015.
    assert different == pytest.approx(9 * (1 - (8 / 9) ** 9), abs=0.06)
    # Any two draws of an image agree once in nine times: 5000 of them have a spread of 0.0044.
    for first, second in ((0, 1), (1, 8), (7, 8)):
        same = (offsets[:, first] == offsets[:, second]).all(-1).float().mean().item()
        assert same == pytest.approx(1 / 9, abs=0.018)


def test_coverage_is_the_papers():
    # PH-Reg on a 28 grid: 8.4 of 10 views see a patch on average, 10 the centre, about 3.9 a corner.
    spec = Spec("timm", "x", (16, 16), 8, 1, 1, (448, 448), True, SPEC.mean, SPEC.std)
    (group,) = sample_views(ViewsConfig(), spec, (448, 448), 200, generator(0))
    _, seen = group.undo(torch.zeros(200, 10, 28, 28, 1))
    count = seen.sum(1).float().mean(0)
    assert count.mean().item() == pytest.approx(8.4, abs=0.15)
    assert count[14, 14] == 10
    assert count[0, 0].item() == pytest.approx(3.9, abs=0.4)


def test_the_same_key_draws_the_same_views_and_another_key_others():
    def offsets(*key):
        return sample_views(ViewsConfig(max_shift=0.5), SPEC, (24, 24), 4, generator(*key))[0].offsets

    assert torch.equal(offsets(0, 5, 1), offsets(0, 5, 1))
    assert not torch.equal(offsets(0, 5, 1), offsets(0, 5, 2))
    assert not torch.equal(offsets(0, 5, 1), offsets(1, 5, 1))


def test_more_views_than_offsets_is_an_error_that_names_the_keys():
    with pytest.raises(PhregError, match=r"views.count asks for 10 .* only 2 .* views.max_shift"):
        sample_views(ViewsConfig(max_shift=0.0), SPEC, (24, 24), 1, generator(0))


def test_valid_crops_hold_nothing_but_image():
    config = ViewsConfig(count=5, max_shift=0.34, fill="valid-crop")
    image, _ = numbered((24, 24))
    _, crops = sample_views(config, SPEC, (24, 24), 2, generator(3))
    views = crops.apply(image)
    assert views.shape == (2, 4, 3, 16, 16)
    assert torch.isin(views[0], image[0]).all()
    _, seen = crops.undo(cells(views))
    assert (seen.sum((-1, -2)) == 16).all(), "each crop sees just its own cells"


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1]))
def test_resampled_views_come_back_to_within_rounding_on_a_linear_image(seed, scale):
    # Bilinear resampling is exact on a linear image, so only float rounding is left (1e-4 of a range of 2).
    ramp = torch.linspace(-1, 1, 32)
    image = (ramp[:, None] + 0.5 * ramp[None]).expand(2, 3, 32, 32).contiguous()
    config = ViewsConfig(count=4, max_shift=0.25, subpatch=True, scale=scale)
    _, group = sample_views(config, SPEC, (32, 32), 2, generator(seed))
    mean = lambda pixels: pixels.unfold(-2, 4, 4).unfold(-2, 4, 4).mean((-1, -2))  # noqa: E731
    aligned, seen = group.undo(mean(group.apply(image)).permute(0, 1, 3, 4, 2))
    truth = mean(image).permute(0, 2, 3, 1).unsqueeze(1)
    error = (aligned - truth).abs().amax(-1)
    assert seen.any()
    assert error[seen].max() < 1e-4


def test_a_shift_by_a_fraction_of_a_patch_is_one():
    config = ViewsConfig(count=8, max_shift=0.25, subpatch=True)
    _, group = sample_views(config, SPEC, (32, 32), 4, generator(0))
    fractions = group.offsets.frac().abs()
    assert (fractions > 0.05).any()
    assert (group.scales == 1).all()


@pytest.mark.parametrize("fill", ["white", "valid-crop"])
def test_the_number_of_different_views_is_that_of_those_there_are(fill):
    config = ViewsConfig(max_shift=0.34, flip=0.5, fill=fill)
    drawn = sample_offsets(config, (0, 0), (2, 2), 500, generator(0)).flatten(0, 1)
    per_flip = len(drawn.unique(dim=0)) if fill == "valid-crop" else 25
    assert count_different(config, (6, 6)) == 2 * per_flip
    assert count_different(config.model_copy(update={"scale": 0.1}), (6, 6)) is None


# -- images, patches and ranges that are not square ----------------------------------------------------------

WIDE = Spec("timm", "test", (4, 6), 8, 1, 1, (20, 48), True, SPEC.mean, SPEC.std)  # 5 x 8 patches
FILLS = ["context", "white", "black", "mean", "reflect", "replicate", "valid-crop"]


def wide_image(margin=(0, 0)):
    """Two images whose patches of 4x6 pixels all differ, and the numbers of their own patches."""
    rows, cols = 5 + 2 * margin[0] // 4, 8 + 2 * margin[1] // 6
    grid = torch.arange(float(rows * cols)).view(1, rows, cols)
    image = grid.repeat_interleave(4, 1).repeat_interleave(6, 2).unsqueeze(1).repeat(2, 3, 1, 1)
    image[1] += 1000
    own = grid[0, margin[0] // 4 : rows - margin[0] // 4, margin[1] // 6 : cols - margin[1] // 6]
    return image, torch.stack([own, own + 1000])


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("seed", range(4))
def test_undo_inverts_apply_on_images_and_patches_that_are_not_square(fill, seed):
    config = ViewsConfig(count=6, max_shift=0.3, fill=fill)
    image, grid = wide_image(context_margin(config, WIDE, (20, 48)))
    for group in sample_views(config, WIDE, (20, 48), 2, generator(seed)):
        views = group.apply(image)
        aligned, seen = group.undo(views[:, :, :1, ::4, ::6].permute(0, 1, 3, 4, 2))
        truth = grid.unsqueeze(1).expand_as(seen)
        assert seen.any()
        assert torch.equal(aligned.squeeze(-1)[seen], truth[seen])


@pytest.mark.parametrize(
    ("fill", "low", "high"), [("white", (-1, -2), (1, 2)), ("valid-crop", (0, 0), (1, 2))]
)
def test_each_axis_is_shifted_by_its_own_share_up_to_both_ends(fill, low, high):
    config = ViewsConfig(count=6, max_shift=0.25, fill=fill)  # 1.25 of 5 rows, 2 of 8 columns
    groups = sample_views(config, WIDE, (20, 48), 100, generator(0))
    offsets = torch.cat([group.offsets for group in groups], 1).flatten(0, 1)
    assert tuple(offsets.amin(0).tolist()) == low
    assert tuple(offsets.amax(0).tolist()) == high
    if fill == "valid-crop":
        crops = groups[1].apply(torch.zeros(100, 3, 20, 48))
        assert crops.shape[-2:] == (16, 36), "the image less the range"


def test_the_number_of_different_views_is_the_product_over_axes_and_mirrorings():
    config = ViewsConfig(max_shift=0.25, flip=0.0)
    assert count_different(config, (5, 8)) == 3 * 5
    assert count_different(config.model_copy(update={"fill": "valid-crop"}), (5, 8)) == 2 * 3
    assert count_different(config.model_copy(update={"flip": 1.0}), (5, 8)) == 3 * 5, "all are mirrored"
    assert count_different(config.model_copy(update={"flip": 0.5}), (5, 8)) == 3 * 5 * 2
    assert count_different(config.model_copy(update={"subpatch": True}), (5, 8)) is None


def test_as_many_views_as_there_are_different_ones_can_be_had_and_no_more():
    config = ViewsConfig(count=15, max_shift=0.25, flip=0.0)
    assert sample_views(config, WIDE, (20, 48), 1, generator(0))[0].count == 15
    with pytest.raises(PhregError, match=r"asks for 16 views.* only 15 different"):
        sample_views(config.model_copy(update={"count": 16}), WIDE, (20, 48), 1, generator(0))


def test_context_reaches_as_far_as_the_views_do_on_each_axis():
    config = ViewsConfig(max_shift=0.25, fill="context")
    assert context_margin(config, WIDE, (20, 48)) == (1 * 4, 2 * 6)
    assert context_margin(config.model_copy(update={"fill": "white"}), WIDE, (20, 48)) == (0, 0)
    subpatch = config.model_copy(update={"subpatch": True})
    assert context_margin(subpatch, WIDE, (20, 48)) == (2 * 4, 3 * 6), "one patch further"
    scaled = config.model_copy(update={"scale": 0.2})
    assert context_margin(scaled, WIDE, (20, 48)) == (3 * 4, 5 * 6), "and a fifth of the side"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("fill", "pixel"), [("white", (1, 1, 1)), ("black", (0, 0, 0)), ("mean", SPEC.mean)])
def test_what_lies_outside_is_the_colour_asked_for_normalised_in_the_images_precision(fill, pixel, dtype):
    (group,) = sample_views(ViewsConfig(count=1, max_shift=0.25, fill=fill), WIDE, (20, 48), 2, generator(0))
    shifted = type(group)(
        torch.tensor([[[1, -2]]] * 2), group.flips, group.grid, group.window, group.margin, group.fill
    )
    view = shifted.apply(torch.full((2, 3, 20, 48), 7.0, dtype=dtype))[:, 0]
    assert view.dtype == dtype
    assert (view[:, :, :16, 12:] == 7).all(), "moved up by one patch and right by two"
    colour = [(p - m) / s for p, m, s in zip(pixel, SPEC.mean, SPEC.std, strict=True)]
    for outside in (view[:, :, 16:], view[:, :, :, :12]):
        expected = torch.tensor(colour, dtype=torch.float32).view(3, 1, 1).expand_as(outside)
        torch.testing.assert_close(outside.float(), expected)


@pytest.mark.parametrize(("rows", "cols"), [(0, 2), (2, 0), (0, 0)])
def test_a_range_of_one_axis_alone_moves_along_that_axis(rows, cols):
    spec = Spec("timm", "x", (4, 4), 8, 1, 1, (8, 8), True, SPEC.mean, SPEC.std)
    size = (32 if rows else 8, 32 if cols else 8)  # a fifth of 8 patches is 2, of 2 patches none
    config = ViewsConfig(count=2 if rows or cols else 1, max_shift=0.2, flip=0.0, fill="replicate")
    (group,) = sample_views(config, spec, size, 50, generator(0))
    assert group.margin == (rows, cols)
    assert tuple(group.offsets.abs().amax((0, 1)).tolist()) == (rows, cols)
    assert group.apply(torch.zeros(50, 3, *size)).shape[-2:] == size


def test_farthest_points_are_all_different_while_there_are_different_ones():
    offsets = sample_offsets(ViewsConfig(count=9, max_shift=0.5), (0, 0), (2, 2), 20, generator(0))
    # Of 90 draws all nine places are among the pool but for one time in 4000.
    assert all(len(own.unique(dim=0)) == 9 for own in offsets)


def test_the_second_of_the_farthest_points_lies_in_a_corner_opposite_the_first():
    offsets = sample_offsets(ViewsConfig(count=10), (-4, -4), (4, 4), 200, generator(0))
    first, second = offsets[:, 0], offsets[:, 1]
    # Of 100 draws hardly any nearer one is farther: the most there can be is the distance to a corner.
    most = (first.abs() + 4).square().sum(1)
    assert ((second - first).square().sum(1) / most).mean() > 0.85


# -- views that are resampled --------------------------------------------------------------------------------


def affine(offsets, scale, flip=False, grid=(5, 8), margin=(4, 6), fill="replicate"):
    """One resampled view of each of two images."""
    return AffineViews(
        torch.tensor([[offsets]] * 2, dtype=torch.float32),
        torch.full((2, 1), scale),
        torch.full((2, 1), flip),
        grid,
        margin,
        fill,
    )


def ramp(rows, cols):
    """y + 10 x, on which bilinear resampling is exact."""
    return torch.arange(float(rows))[:, None] + 10 * torch.arange(float(cols))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("offsets", [(0.0, 0.0), (0.5, -1.25), (-1.0, 0.75)])
def test_a_resampled_view_shows_the_point_that_its_definition_says(offsets, scale, flip):
    image = ramp(20, 48).expand(2, 3, 20, 48).contiguous()
    view = affine(offsets, scale, flip).apply(image)[:, 0]
    assert view.shape == (2, 3, 20, 48)
    if flip:
        view = view.flip(-1)
    # Shown at distance scale * d - shift from the centre is what lies at distance d. Patches are 4x6 pixels.
    y = (torch.arange(20.0) - 9.5 + 4 * offsets[0]) / scale + 9.5
    x = (torch.arange(48.0) - 23.5 + 6 * offsets[1]) / scale + 23.5
    inside = ((y >= 0) & (y <= 19))[:, None] & ((x >= 0) & (x <= 47))
    assert inside.any()
    expected = y[:, None] + 10 * x
    # Values up to 500 in fp32, positions to a few units in the last place.
    torch.testing.assert_close(view[..., inside], expected[inside].expand(2, 3, -1), atol=5e-3, rtol=1e-4)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale", [0.8, 1.0, 1.25])
@pytest.mark.parametrize("offsets", [(0.0, 0.0), (0.5, -1.25), (-1.0, 0.75)])
def test_undo_reads_a_resampled_view_where_the_cell_is_shown(offsets, scale, flip):
    tokens = torch.stack([ramp(5, 8), -ramp(5, 8)], -1).expand(2, 1, 5, 8, 2)
    aligned, seen = affine(offsets, scale, flip).undo(tokens.flip(3) if flip else tokens)
    row = (torch.arange(5.0) - 2) * scale + 2 - offsets[0]
    col = (torch.arange(8.0) - 3.5) * scale + 3.5 - offsets[1]
    expected = row[:, None] + 10 * col
    assert seen.any()
    torch.testing.assert_close(
        aligned[seen],
        torch.stack([expected, -expected], -1).expand(2, 1, 5, 8, 2)[seen],
        atol=1e-3,
        rtol=1e-4,
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("offsets", [(0, 0), (1, -2), (-1, 0), (0, 2)])
def test_resampled_views_of_whole_shifts_are_the_exact_ones(offsets, flip):
    image = torch.randn(2, 3, 20, 48, generator=torch.Generator().manual_seed(0))
    exact = Views(
        torch.tensor([[offsets]] * 2), torch.full((2, 1), flip), (5, 8), (5, 8), (4, 6), (1.0, 2.0, 3.0)
    )
    resampled = affine(offsets, 1.0, flip, fill=(1.0, 2.0, 3.0))
    torch.testing.assert_close(resampled.apply(image), exact.apply(image), atol=1e-4, rtol=1e-4)
    tokens = torch.randn(2, 1, 5, 8, 3, generator=torch.Generator().manual_seed(1))
    (one, seen), (other, seen_exactly) = resampled.undo(tokens), exact.undo(tokens)
    assert torch.equal(seen, seen_exactly)
    torch.testing.assert_close(one[seen], other[seen], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("offset", "scale", "rows"),
    [
        (
            0.5,
            1.0,
            [1, 2],
        ),  # row 0 lies half above the view, and the view's last row shows half a row of fill
        (-0.25, 1.0, [1, 2]),  # the view's first row shows some fill, and row 3 is half below the view
        (0.0, 2.0, [1, 2]),  # of an enlarged view rows 0 and 3 lie outside
        (0.0, 0.5, [1, 2]),  # the outer cells of a reduced view show fill, and rows 0 and 3 blend them in
        (0.0, 1.0, [0, 1, 2, 3]),
    ],
)
def test_rows_and_columns_that_blend_in_fill_or_lie_outside_are_unseen(offset, scale, rows):
    tokens = torch.zeros(2, 1, 4, 4, 1)
    wanted = torch.zeros(4, dtype=torch.bool)
    wanted[rows] = True
    both = torch.ones(4, dtype=torch.bool)
    across = wanted if scale != 1 else both
    _, seen = affine((offset, 0.0), scale, grid=(4, 4), margin=(2, 2)).undo(tokens)
    assert torch.equal(seen[0, 0], wanted[:, None] & across)
    _, seen = affine((0.0, offset), scale, grid=(4, 4), margin=(2, 2)).undo(tokens)
    assert torch.equal(seen[0, 0], across[:, None] & wanted)


def test_resampled_shifts_and_scales_fill_their_range():
    config = ViewsConfig(count=6, max_shift=0.25, subpatch=True, scale=0.2)
    unmoved, group = sample_views(config, WIDE, (20, 48), 500, generator(0))
    assert unmoved.count == 1
    assert group.count == 5
    low, high = group.offsets.amin((0, 1)), group.offsets.amax((0, 1))
    # 2500 draws come within a hundredth of both ends.
    torch.testing.assert_close(low, torch.tensor([-1.5, -2.5]), atol=0.02, rtol=0)
    torch.testing.assert_close(high, torch.tensor([1.5, 2.5]), atol=0.02, rtol=0)
    assert group.scales.min().item() == pytest.approx(0.8, abs=0.005)
    assert group.scales.max().item() == pytest.approx(1.2, abs=0.005)
    assert group.scales.mean().item() == pytest.approx(1.0, abs=0.01)


def test_a_share_of_images_and_views_is_that_share():
    config = ViewsConfig(count=6, max_shift=0.25, subpatch=True, scale=0.2)
    _, group = sample_views(config, WIDE, (20, 48), 3, generator(0))
    part = group.part(slice(1, 3), slice(2, 4))
    assert part.count == 2
    image = torch.randn(3, 3, 20, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(part.apply(image[1:]), group.apply(image)[1:, 2:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("changes", [{"fill": "valid-crop"}, {"subpatch": True}, {"scale": 0.2}], ids=str)
def test_as_many_views_are_made_as_are_asked_for_whatever_their_kind(count, changes):
    config = ViewsConfig(count=count, max_shift=0.25, **changes)
    groups = sample_views(config, WIDE, (20, 48), 2, generator(0))
    assert [group.count for group in groups] == ([1, count - 1] if count > 1 else [1])
    image = torch.zeros(2, 3, 20, 48)
    assert [group.apply(image).shape[1] for group in groups] == [group.count for group in groups]
