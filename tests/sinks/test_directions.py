"""What sinks hold and others do not is read off the stream, and taken away again."""

import pytest
import torch
from families import FAMILIES
from planted import CORNERS, Planted, pictures

from phreg.backbones.resolve import adapt
from phreg.sinks.directions import SinkDirection, sink_directions, without_sinks

SINKS = (3, 40)


@pytest.fixture
def images():
    return pictures(24)


def masks_of(batches, at, patches=64):
    """Marks the same patches in every image, batch by batch."""
    mask = torch.zeros(patches, dtype=torch.bool)
    mask[list(at)] = True
    return [mask.expand(len(batch), -1) for batch in batches]


def measured(backbone, images, at=SINKS, blocks=range(4)):
    batches = images.split(10)
    masks = masks_of(batches, at)
    return sink_directions(backbone, batches, [masks], masks, blocks)


def test_direction_level_and_baseline_are_those_of_the_means(images):
    backbone = Planted({1: (SINKS, 50.0)})
    found = {direction.block: direction for direction in measured(backbone, images)}
    assert found.keys() == {1, 2, 3}, "before block 1 they hold what others hold"
    tokens = backbone.block_tokens(images, [2])[2][:, 1:].double()
    others = [patch for patch in range(64) if patch not in SINKS]
    gap = tokens[:, SINKS].mean((0, 1)) - tokens[:, others].mean((0, 1))
    unit = gap / gap.norm()
    torch.testing.assert_close(found[2].vector.double(), unit, atol=1e-6, rtol=0)
    assert found[2].sink_level == pytest.approx(gap.norm().item(), rel=1e-6)
    assert found[2].baseline == pytest.approx(
        (tokens[:, others].mean((0, 1)) @ unit).item(), rel=1e-5, abs=1e-6
    )
    shares = (tokens[:, others] @ unit - found[2].baseline) / found[2].sink_level
    assert found[2].ordinary == pytest.approx(shares.flatten().quantile(0.999).item(), abs=1e-6)
    excess = tokens[:, SINKS] - tokens[:, others].mean((0, 1))
    alike = (gap.norm() ** 2 / excess.square().sum(-1).mean()).item()
    assert found[2].alike == pytest.approx(alike, rel=1e-5)
    assert 0.5 < alike < 1


def test_a_share_is_0_at_the_mean_of_other_patches_and_1_at_that_of_sinks(images):
    backbone = Planted({1: (SINKS, 50.0)})
    (direction,) = measured(backbone, images, blocks=[1])
    tokens = backbone.block_tokens(images, [1])[1][:, 1:]
    others = [patch for patch in range(64) if patch not in SINKS]
    assert direction.share(tokens[:, SINKS]).mean().item() == pytest.approx(1, abs=1e-5)
    assert direction.share(tokens[:, others]).mean().item() == pytest.approx(0, abs=1e-5)
    assert direction.share(tokens.bfloat16()).dtype == torch.float32


def test_each_cluster_has_its_own_direction_and_no_cluster_counts_as_other_patches(images):
    backbone = Planted({1: ((3,), 50.0), 2: ((40,), -80.0)})
    batches = images.split(24)
    clusters = [masks_of(batches, (3,)), masks_of(batches, (40,))]
    found = sink_directions(backbone, batches, clusters, masks_of(batches, (3, 40)), [2], first_cluster=4)
    assert [each.cluster for each in found] == [4, 5]
    assert found[0].vector[0] > 0.9
    assert found[1].vector[0] < -0.9
    tokens = backbone.block_tokens(images, [2])[2][:, 1:].double()
    others = tokens[:, [patch for patch in range(64) if patch not in (3, 40)]].mean((0, 1))
    assert found[0].sink_level == pytest.approx((tokens[:, 3].mean(0) - others).norm().item(), rel=1e-6)


def test_sinks_that_have_nothing_in_common_have_no_direction(images):
    assert measured(Planted(), images) == (), "they are any patches"


@pytest.mark.parametrize("family", ["timm/vit", "transformers/dinov2", "open_clip/clip"])
def test_sinks_are_taken_away_while_the_context_lasts_and_what_follows_is_computed_without(family):
    backbone = adapt(FAMILIES[family]())
    images = torch.randn(4, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    width, last = backbone.spec.width, len(backbone.blocks) - 1
    tokens = backbone.requires_grad_(False).block_tokens(images, [0, last])
    vector = torch.nn.functional.normalize(
        torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0
    )
    patches = backbone.layout(images).patches
    held = patches(tokens[0]) @ vector
    level = float(held.max() - held.mean()) * 0.9
    direction = SinkDirection(0, 0, vector, float(held.mean()), level, 0.5, 1.0)
    loud = direction.share(patches(tokens[0])) > 0.55
    assert 0 < loud.sum() < loud.numel() / 4
    with without_sinks(backbone, [direction]):
        cleaned = backbone.block_tokens(images, [0, last])
    prefix = backbone.spec.num_prefix
    torch.testing.assert_close(cleaned[0][:, :prefix], tokens[0][:, :prefix])
    torch.testing.assert_close(patches(cleaned[0])[~loud], patches(tokens[0])[~loud])
    left = direction.share(patches(cleaned[0])[loud])
    torch.testing.assert_close(left, torch.zeros_like(left), atol=1e-4, rtol=0)
    across = patches(cleaned[0]) - (patches(cleaned[0]) @ vector)[..., None] * vector
    before = patches(tokens[0]) - held[..., None] * vector
    torch.testing.assert_close(across, before, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(cleaned[last], tokens[last], atol=1e-4)
    torch.testing.assert_close(backbone.block_tokens(images, [last])[last], tokens[last])
    assert not any("forward" in vars(block) for block in backbone.blocks)


def test_a_forward_that_was_replaced_before_is_back_afterwards(tiny):
    backbone = adapt(tiny())
    block = backbone.blocks[0]
    own = block.forward
    block.forward = own
    with without_sinks(backbone, [SinkDirection(0, 0, torch.eye(32)[0], 0.0, 1.0, 0.0, 1.0)]):
        assert vars(block)["forward"] is not own
    assert vars(block)["forward"] is own


def test_corners_pushed_apart_vanish_from_the_norms_without_them():
    backbone, images = Planted({1: (CORNERS, 100.0)}), pictures(24)
    found = measured(backbone, images, at=CORNERS, blocks=[1, 2, 3])
    with without_sinks(backbone, found):
        norms = backbone.block_tokens(images, [3])[3][:, 1:].norm(dim=-1)
    assert norms.max() < 20


def test_registers_keep_what_they_hold():
    backbone = Planted({1: (CORNERS, 100.0)}, registers=2)
    images = pictures(24)
    found = measured(backbone, images, at=CORNERS, blocks=[1])
    assert found, "the corners hold it"
    whole = backbone.block_tokens(images, [1])[1]
    with without_sinks(backbone, found):
        tokens = backbone.block_tokens(images, [1])[1]
    torch.testing.assert_close(tokens[:, :3], whole[:, :3])
    assert tokens[:, 3:].norm(dim=-1).max() < 20
