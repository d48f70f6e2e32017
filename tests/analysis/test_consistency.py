"""Agreement with moved views, by models whose right figures are known."""

import json

import pytest
import torch
from torch import nn

from phreg.analysis.consistency import consistency, worst_mean
from phreg.backbones.resolve import adapt
from phreg.config import ViewsConfig
from phreg.errors import PhregError
from phreg.seeding import keyed_generator
from phreg.view_sampling import context_margin, distinct_views

VIEWS = ViewsConfig(max_shift=0.25, fill="white")


def images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def local(tiny):
    """A model that reads each patch alone: no attention, no position."""
    backbone = adapt(tiny())
    for block in backbone.model.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    nn.init.zeros_(backbone.model.pos_embed)
    return backbone


def measure(backbone, **changes):
    unmirrored = VIEWS.model_copy(update={"flip": 0.0} | changes)  # a mirrored patch is another patch
    return consistency(backbone, images().split(2), unmirrored, (32, 32), count=8)


def test_a_model_that_reads_each_patch_alone_agrees_wholly_and_has_nothing_to_gain(local):
    report = measure(local)
    assert report.mean == pytest.approx(1, abs=1e-6)
    assert report.worst_mean == pytest.approx(1, abs=1e-5)
    assert report.headroom == pytest.approx(0, abs=1e-6)
    assert not report.worthwhile


@pytest.mark.parametrize(
    "changes",
    [{"fill": fill} for fill in ("black", "mean", "reflect", "replicate", "context", "valid-crop")]
    + [{"fill": "context", "subpatch": True}, {"fill": "context", "scale": 0.5}],
    ids=str,
)
def test_such_a_model_agrees_wholly_whatever_views_show_outside_the_image(local, changes):
    config = VIEWS.model_copy(update={"flip": 0.0} | changes)
    margin = context_margin(config, local.spec, (32, 32))
    whole = torch.randn(2, 3, 32 + 2 * margin[0], 32 + 2 * margin[1])
    report = consistency(local, [whole], config, (32, 32), count=8)
    assert report.mean == pytest.approx(1, abs=1e-6)
    assert report.worst_mean == pytest.approx(1, abs=1e-5)


def test_a_pattern_that_keeps_to_the_frame_is_found_where_it_is_and_is_fixed_to_it(local):
    with torch.no_grad():
        local.model.pos_embed[0, 1 + 5] += 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    report = measure(local)
    assert report.by_position.argmin() == 5
    assert report.frame_fixed > 0.6, "most of the disagreement is the same in all images"
    assert report.frame_fixed_by_chance == pytest.approx(1 / 3)


def test_what_is_fixed_to_the_frame_is_told_position_by_position(local):
    with torch.no_grad():
        local.model.pos_embed[0, 1 + 5] += 30 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    report = measure(local)
    shares = report.frame_fixed_by_position
    # What is written at row 1, column 1 is far longer than what patches show. Shifts of one patch carry it to
    # the patches around, and no further: beyond, only rounding disagrees.
    assert (shares[:3, :3] > 0.6).all()
    assert (torch.cat([shares[3], shares[:, 3]]) < 0.05).all()
    assert report.frame_fixed == pytest.approx(shares[:3, :3].mean().item(), abs=0.2)


@torch.no_grad()
def test_averaged_features_are_the_mean_of_all_views_that_saw_a_patch_and_of_the_unmoved_image(tiny):
    backbone, whole = adapt(tiny()), images()
    found = consistency(backbone, whole.split(2), VIEWS, (32, 32), count=8, show=1).denoised
    group = distinct_views(VIEWS, backbone.spec, (32, 32), 2, 8, keyed_generator("consistency", 0, 0))
    totals, seen = backbone(whole[:1]).patches[0].clone(), torch.ones(4, 4, 1)
    moved = backbone(group.apply(whole[:2])[0]).patches
    for features, (down, right), flip in zip(moved, group.offsets[0], group.flips[0], strict=True):
        grid = features.flip(1) if flip else features
        for row in range(4):
            for col in range(4):
                if 0 <= row - down < 4 and 0 <= col - right < 4:
                    totals[row, col] += grid[row - down, col - right]
                    seen[row, col] += 1
    assert found.shape == (1, 4, 4, 32)
    torch.testing.assert_close(found[0], totals / seen)


def test_as_many_averaged_features_are_returned_as_are_to_be_shown(tiny):
    backbone = adapt(tiny())
    for show, count in ((0, 0), (1, 1), (3, 3), (9, 3)):
        found = consistency(backbone, images().split(2), VIEWS, (32, 32), count=2, show=show)
        assert len(found.denoised) == count


def test_a_position_that_half_of_the_views_never_saw_is_none_in_json(tiny):
    # Two views, each a half: where one of them shows the fill, nothing is known.
    report = consistency(adapt(tiny()), [images(1)], VIEWS, (32, 32), count=2)
    assert report.by_position.isnan().any()
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    unknown = [[value is None for value in row] for row in written["by_position"]]
    assert unknown == report.by_position.isnan().tolist()


def test_headroom_is_the_floor_less_the_agreement_image_by_image(tiny):
    report = measure(adapt(tiny()))
    assert report.headroom == pytest.approx(report.floor - report.mean, abs=1e-6)
    assert report.maps.shape == (3, 4, 4)
    assert report.mean == pytest.approx(report.maps.mean().item(), abs=1e-6)
    assert torch.allclose(report.by_position, report.maps.mean(0))


def test_the_same_seed_gives_the_same_figures_and_another_seed_others(tiny):
    backbone = adapt(tiny())
    first, again = measure(backbone), measure(backbone)
    assert torch.equal(first.maps, again.maps)
    other = consistency(backbone, images().split(2), VIEWS, (32, 32), count=8, seed=1)
    assert not torch.equal(first.maps, other.maps)


def test_no_images_and_views_that_cannot_be_halved_are_errors_that_say_what_to_do(tiny):
    backbone = adapt(tiny())
    with pytest.raises(PhregError, match="give at least one"):
        consistency(backbone, [], VIEWS, (32, 32))
    with pytest.raises(PhregError, match=r"raise views.max_shift|raise it"):
        consistency(backbone, [images()], VIEWS.model_copy(update={"max_shift": 0.0}), (32, 32))


def test_the_worst_per_cent_is_the_mean_of_the_lowest_of_a_hundred():
    values = torch.arange(300, dtype=torch.float32)
    assert worst_mean(values[torch.randperm(300)]) == 1.0
    assert worst_mean(torch.tensor([3.0, 2.0])) == 2.0


def test_distinct_views_never_repeat_and_never_leave_the_image_as_it_is(tiny):
    backbone = adapt(tiny())
    group = distinct_views(VIEWS, backbone.spec, (32, 32), 5, 100, keyed_generator("test", 0))
    assert group.count == 2 * 9 - 1, "shifts of -1, 0, 1 each way, mirrored or not, but for the unmoved"
    for offsets, flips in zip(group.offsets.tolist(), group.flips.tolist(), strict=True):
        drawn = {(*offset, flip) for offset, flip in zip(offsets, flips, strict=True)}
        assert len(drawn) == group.count
        assert (0, 0, False) not in drawn
    fewer = distinct_views(VIEWS, backbone.spec, (32, 32), 5, 4, keyed_generator("test", 0))
    assert fewer.count == 4
