import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phreg.backbones.base import Spec
from phreg.config import ViewsConfig
from phreg.data.crops import middle
from phreg.errors import PhregError
from phreg.seeding import keyed_generator as generator
from phreg.views import count_different, sample_offsets, sample_views, surroundings

SPEC = Spec("timm", "test", (4, 4), 8, 1, 1, (24, 24), True, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
WHITE = [(1 - mean) / std for mean, std in zip(SPEC.mean, SPEC.std, strict=True)]

configs = st.builds(
    ViewsConfig,
    count=st.integers(1, 6),
    max_shift=st.floats(0.2, 0.5),
    sampler=st.sampled_from(["farthest-point", "uniform"]),
    flip=st.sampled_from([0.0, 0.5, 1.0]),
    fill=st.sampled_from(["surroundings", "white", "black", "mean", "reflect", "replicate", "valid-crop"]),
)
sizes = st.tuples(st.integers(5, 8), st.integers(5, 8)).map(lambda grid: (grid[0] * 4, grid[1] * 4))


def numbered(size, around=(0, 0)):
    """An image, with surroundings, whose cells all differ, and the numbers of its own cells as a grid."""
    rows, cols = ((side + 2 * far) // 4 for side, far in zip(size, around, strict=True))
    grid = torch.arange(float(rows * cols)).view(1, rows, cols)
    image = grid.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).repeat(2, 3, 1, 1)
    image[1] += 1000
    own = grid[0, around[0] // 4 : rows - around[0] // 4, around[1] // 4 : cols - around[1] // 4]
    return image, torch.stack([own, own + 1000])


def cells(views):
    """The token grid of a model that copies a cell's upper left pixel."""
    return views[:, :, :1, ::4, ::4].permute(0, 1, 3, 4, 2)


@settings(max_examples=60)
@given(configs, sizes, st.integers(0, 2**32))
def test_undo_inverts_apply_exactly_wherever_the_view_saw_the_image(config, size, seed):
    image, grid = numbered(size, surroundings(config, SPEC, size))
    for group in sample_views(config, SPEC, size, 2, generator(seed)):
        aligned, seen = group.undo(cells(group.apply(image)))
        truth = grid.unsqueeze(1).expand_as(seen)
        assert torch.equal(aligned.squeeze(-1)[seen], truth[seen])


@settings(max_examples=30)
@given(configs, sizes, st.integers(0, 2**32))
def test_every_position_is_seen_by_the_first_view_at_least_and_that_view_is_the_image_itself(
    config, size, seed
):
    around = surroundings(config, SPEC, size)
    image, _ = numbered(size, around)
    groups = sample_views(config, SPEC, size, 2, generator(seed))
    first = groups[0].part(slice(None), slice(0, 1))
    assert torch.equal(first.apply(image)[:, 0], middle(image, around))
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

    # The spread of a mean over 20 000 offsets is well below 0.01.
    assert on_border("farthest-point") == pytest.approx(0.66, abs=0.03)
    assert on_border("uniform") == pytest.approx(1 - 49 / 81, abs=0.02)


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
