"""The relocation loss is zero where registers hold the sinks, and its gradient leads there."""

import copy
from dataclasses import replace

import pytest
import torch
from families import FAMILIES
from known_sinks import sinks
from sinking import photographs

from phreg import demo
from phreg.backbones.resolve import adapt
from phreg.config import LoraConfig, UnlockConfig
from phreg.registers import add_registers
from phreg.sinks.locate import find_sinks
from phreg.sinks.relocation import Relocation
from phreg.sinks.starting import starting_tokens
from phreg.training.trainable import merge_lora, unlock


@pytest.fixture
def patched():
    return add_registers(adapt(FAMILIES["timm/vit"]()), 2)  # sequence: CLS, 2 registers, 16 patches


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
REGISTERS, PATCHES = slice(1, 3), slice(3, None)


def stream(on_registers, on_patches, channels=(5,)):
    """What a block puts out: all at random, but for some channels of registers and patches."""
    tokens = torch.randn(3, 19, 32, generator=torch.Generator().manual_seed(0))
    tokens[:, REGISTERS, list(channels)] = torch.as_tensor(on_registers)
    tokens[:, PATCHES, list(channels)] = torch.as_tensor(on_patches)
    return tokens


def ordinary(found, share):
    """The same sinks, where other patches hold up to a share of the level."""
    return replace(found, directions=tuple(replace(one, ordinary=share) for one in found.directions))


def test_nothing_is_lost_where_registers_hold_the_level_and_patches_none_of_it(patched):
    relocation = Relocation(patched, sinks((1, 5, 150.0)))
    assert relocation.loss({1: stream(150.0, 0.0)}, IMAGES) == 0
    beyond = stream(150.0, -150.0)  # on the other side patches may be what they like
    assert relocation.loss({1: beyond}, IMAGES) == 0


def test_the_loss_counts_registers_without_it_and_patches_with_it_relative_to_the_level(patched):
    relocation = Relocation(patched, sinks((1, 5, 150.0)))
    assert relocation.loss({1: stream(0.0, 0.0)}, IMAGES).item() == pytest.approx(1)
    loud = stream(150.0, 0.0)
    loud[:, [3, 9], 5] = 75.0  # two patches of each image at half the level
    # `sinks` says that an image had two of this cluster.
    assert relocation.loss({1: loud}, IMAGES).item() == pytest.approx(2 * 0.5 / 2)
    by_number = Relocation(patched, sinks((1, 5, 150.0)), "number")
    assert by_number.loss({1: loud}, IMAGES).item() == pytest.approx(2 * 0.5)


def test_what_is_ordinary_costs_patches_nothing_and_the_whole_level_costs_one(patched):
    relocation = Relocation(patched, ordinary(sinks((1, 5, 10.0)), 0.2))
    assert relocation.loss({1: stream(10.0, 2.0)}, IMAGES).item() == pytest.approx(0, abs=1e-6)
    loud = stream(10.0, 2.0)
    loud[:, 3, 5], loud[:, 9, 5] = 10.0, 6.0  # one sink, and one patch halfway there from what is ordinary
    assert relocation.loss({1: loud}, IMAGES).item() == pytest.approx((1 + 0.5) / 2)


def test_the_level_counts_from_the_baseline_along_the_direction(patched):
    found = sinks((1, 5, 10.0))
    vector = torch.zeros(32)
    vector[[5, 6]] = torch.tensor([0.6, -0.8])
    found = replace(found, directions=(replace(found.directions[0], vector=vector, baseline=3.0),))
    held = stream([0.6 * 13, -0.8 * 13], [0.6 * 3, -0.8 * 3], channels=(5, 6))
    assert Relocation(patched, found).loss({1: held}, IMAGES).item() == pytest.approx(0, abs=1e-6)
    halfway = stream([0.6 * 8, -0.8 * 8], [0.6 * 3, -0.8 * 3], channels=(5, 6))
    assert Relocation(patched, found).loss({1: halfway}, IMAGES).item() == pytest.approx(0.25)


def test_sinks_left_on_patches_count_by_their_share_of_those_of_their_own_cluster(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0, 0), (1, 6, 4.0, 1)))
    held = stream([10.0, 4.0], [10.0, 4.0], channels=(5, 6))
    # All 16 patches at the level, where an image had 2 of the first cluster and 3 of the second.
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx((16 / 2 + 16 / 3) / 2)


def test_directions_after_several_blocks_count_alike(patched):
    relocation = Relocation(patched, sinks((0, 3, 10.0), (1, 4, 20.0), (2, 7, 5.0)))
    held = {0: stream(10.0, 0.0, (3,)), 1: stream(20.0, 0.0, (4,)), 2: stream(0.0, 0.0, (7,))}
    assert relocation.loss(held, IMAGES).item() == pytest.approx(1 / 3), (
        "two of three are where they should be"
    )


def test_a_register_is_asked_for_its_own_cluster_and_patches_for_none_of_any(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0, 0), (1, 6, 4.0, 1)))
    held = stream(0.0, 0.0, channels=(5, 6))
    held[:, 1, 5], held[:, 2, 6] = 10.0, 4.0
    assert relocation.loss({1: held}, IMAGES) == 0
    held[:, 1, 6], held[:, 2, 5] = 9.0, 3.0  # of each other's cluster they may hold what they like
    assert relocation.loss({1: held}, IMAGES) == 0
    held[:, 2, 6] = 0.0
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx(1 / 2), "one cluster of two is nowhere"
    held[:, 7, 5] = 5.0
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx(1 / 2 + 0.5 / 2 / 2)


def test_several_registers_of_one_cluster_are_asked_alike(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    held = stream(10.0, 0.0)
    held[:, 2, 5] = 4.0
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx(0.6**2 / 2)


def test_a_register_without_a_cluster_is_asked_for_nothing(patched):
    one = sinks((1, 5, 10.0))
    relocation = Relocation(patched, replace(one, triggers=(one.triggers[0][:1],)))
    held = stream(0.0, 0.0)
    held[:, 1, 5] = 10.0
    assert relocation.loss({1: held}, IMAGES) == 0
    held[:, 2, 5] = 7.0
    assert relocation.loss({1: held}, IMAGES) == 0


def test_clusters_that_no_register_asked_for_them_holds_are_named(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0, 0), (1, 6, 4.0, 1)))
    held = stream(0.0, 0.0, channels=(5, 6))
    held[:, 1, 5], held[:, 1, 6] = 6.0, 4.0  # the first register, which is of the first cluster
    assert relocation.lost({1: held}) == [1]
    held[:, 2, 6] = 3.0
    assert relocation.lost({1: held}) == []


def test_a_cluster_counts_as_held_from_half_its_level_by_any_one_register_after_every_block(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0), (2, 5, 10.0)))
    half, less = stream(0.0, 0.0), stream(0.0, 0.0)
    half[:, 2, 5], less[:, 2, 5] = 5.0, 4.9
    assert relocation.lost({1: half, 2: half}) == []
    assert relocation.lost({1: half, 2: less}) == [0]


def test_gradients_reach_the_registers_and_the_blocks_so_far_and_no_later_ones(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    with relocation.capture() as captured:
        patched.run(IMAGES)
        relocation.loss(captured, IMAGES).backward()
    assert patched.registers.grad.abs().sum(-1).all()
    # The last block's own write: of the direction alone.
    rows = patched.model.blocks[1].mlp.fc2.weight.grad.abs().sum(-1).nonzero().flatten()
    assert rows.tolist() == [5]
    assert patched.model.blocks[0].attn.qkv.weight.grad.abs().any()
    assert patched.model.blocks[2].mlp.fc1.weight.grad is None


def test_the_gradient_has_the_values_computed_by_hand(patched):
    tokens = torch.zeros(2, 19, 32)
    # One register at half the level, one beyond it by a fifth; one patch of two images at the level.
    tokens[:, 1, 5], tokens[:, 2, 5], tokens[0, 3, 5] = 5.0, 12.0, 10.0
    tokens.requires_grad_()
    loss = Relocation(patched, ordinary(sinks((1, 5, 10.0)), 0.2)).loss({1: tokens}, IMAGES[:2])
    assert loss.item() == pytest.approx((0.5**2 + 0.2**2) / 2 + 1 / 2 / 2), "one of two sinks in one of two"
    (gradient,) = torch.autograd.grad(loss, tokens)
    expected = torch.zeros(2, 19, 32)
    # 2 (s - 1) / A, a mean over two registers and two images; 1 / A / (1 - o) / S, a mean over two images.
    expected[:, 1, 5], expected[:, 2, 5] = 2 * -0.5 / 10 / 4, 2 * 0.2 / 10 / 4
    expected[0, 3, 5] = 1 / 10 / 0.8 / 2 / 2
    torch.testing.assert_close(gradient, expected)


def test_blocks_whose_layers_lora_wraps_later_are_read_with_it(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    original = copy.deepcopy(patched)
    unlock(patched, UnlockConfig(lora=LoraConfig(rank=2, blocks=3)))
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    with relocation.capture() as captured:
        patched.run(IMAGES)
    merge_lora(patched, original)
    with relocation.capture() as merged:
        patched.run(IMAGES)
    # Merging adds the low-rank product to the weight first: another order of the same sums.
    torch.testing.assert_close(merged[1], captured[1], atol=1e-4, rtol=1e-4)


def test_nothing_listens_when_it_is_over(patched):
    with Relocation(patched, sinks((1, 5, 10.0))).capture() as captured:
        pass
    patched.run(IMAGES)
    assert captured == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_in_fp32_whatever_the_model_runs_in(patched, dtype):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    loss = relocation.loss({1: stream(7.5, 2.5).to(dtype)}, IMAGES)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25**2 + 16 * 0.25 / 2)


def test_training_moves_the_demonstrations_sinks_into_registers_and_keeps_them_there():
    backbone, images = adapt(demo.demo_model()), photographs(every=12)
    found = find_sinks(backbone, images.split(8))
    backbone.insert_registers(starting_tokens(backbone, found, [], 2, "triggers", seed=0))
    relocation = Relocation(backbone, found)
    mlp = backbone.model.blocks[demo.SINK_BLOCK].mlp.fc1
    optimizer = torch.optim.Adam(
        [backbone.registers, mlp.weight, mlp.bias, backbone.model.pos_embed], lr=5e-3
    )
    losses = []
    for _ in range(30):
        with relocation.capture() as captured:
            backbone.run(images)
            loss = relocation.loss(captured, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    layout = backbone.layout(images)
    with relocation.capture() as captured, torch.no_grad():
        backbone.run(images)
    # A cluster that no register holds would cost 1 of 2.
    assert losses[-1] < 0.05
    assert relocation.lost(captured) == []
    for direction in found.directions:
        share = direction.share(captured[direction.block])
        assert layout.registers(share).mean(0)[direction.cluster] > 0.7, "one register a cluster"
        assert layout.patches(share).amax() < 0.5
    norms = captured[found.norms.blocks[found.norms.focus].block].norm(dim=-1, keepdim=True)
    assert layout.registers(norms).mean() > 3 * layout.patches(norms).median()


@pytest.mark.real
@pytest.mark.parametrize("registers", [1, 16])
def test_a_real_sink_moves_into_a_register_however_many_there_are(real_model, real_data, registers):
    from phreg import api
    from phreg.data.crops import centre_crops
    from phreg.data.sources import Subset, open_images

    backbone, _ = api.open_model(str(real_model))
    source = open_images(real_data / "imagenet_samples")
    (images,) = centre_crops(backbone, Subset(source, range(8)), 224)
    found = find_sinks(backbone, [images])
    backbone.insert_registers(starting_tokens(backbone, found, [], registers, "triggers", seed=0))
    relocation = Relocation(backbone, found)
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=1e-4)
    for _ in range(10):
        with relocation.capture() as captured:
            backbone.run(images)
            relocation.loss(captured, images).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relocation.lost(captured) == []
