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
from phreg.sinks.units import UnitActivations
from phreg.training.trainable import merge_lora, unlock


@pytest.fixture
def patched():
    return add_registers(adapt(FAMILIES["timm/vit"]()), 2)  # sequence: CLS, 2 registers, 16 patches


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def reading(on_registers, on_patches, num_units=1):
    """Hidden units of one block as listening collects them, and pre-activations alike."""
    hidden = torch.randn(3, 19, num_units, generator=torch.Generator().manual_seed(0))
    hidden[:, 1:3], hidden[:, 3:] = on_registers, on_patches
    return UnitActivations(hidden, hidden.unsqueeze(-1))


@pytest.mark.parametrize("level", [150.0, -8.0])
def test_nothing_is_lost_where_registers_hold_the_level_and_patches_are_silent(patched, level):
    relocation = Relocation(patched, sinks((1, 5, level)))
    held = reading(level, 0.0)
    assert relocation.loss({1: held}, IMAGES) == 0
    beyond = reading(level, -level)  # on the other side patches may be what they like
    assert relocation.loss({1: beyond}, IMAGES) == 0


@pytest.mark.parametrize("level", [150.0, -8.0])
def test_the_loss_counts_silent_registers_and_loud_patches_relative_to_the_level(patched, level):
    relocation = Relocation(patched, sinks((1, 5, level)))
    assert relocation.loss({1: reading(0.0, 0.0)}, IMAGES).item() == pytest.approx(1)
    loud = reading(level, 0.0)
    loud.hidden[:, [3, 9]] = level / 2  # two patches of each image at half the level
    # `sinks` says that an image had two of this cluster.
    assert relocation.loss({1: loud}, IMAGES).item() == pytest.approx(2 * 0.5 / 2)
    by_number = Relocation(patched, sinks((1, 5, level)), "number")
    assert by_number.loss({1: loud}, IMAGES).item() == pytest.approx(2 * 0.5)


def test_sinks_left_on_patches_count_by_their_share_of_those_of_their_own_cluster(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0, 0), (1, 6, -4.0, 1)))
    held = reading(torch.tensor([10.0, -4.0]), torch.tensor([10.0, -4.0]), num_units=2)
    # All 16 patches at the level, where an image had 2 of the first cluster and 3 of the second.
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx((16 / 2 + 16 / 3) / 2)


def test_several_units_and_blocks_count_alike(patched):
    relocation = Relocation(patched, sinks((0, 3, 10.0), (0, 4, -20.0), (2, 7, 5.0)))
    level = torch.tensor([10.0, -20.0])
    silent = reading(level, 0.0, num_units=2), reading(0.0, 0.0)
    loss = relocation.loss({0: silent[0], 2: silent[1]}, IMAGES)
    assert loss.item() == pytest.approx(1 / 3), "two of three units are where they should be"


def test_a_register_is_asked_for_the_units_of_its_own_cluster_and_patches_for_none_of_any(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0, 0), (1, 6, -4.0, 1)))
    held = reading(0.0, 0.0, num_units=2)
    held.hidden[:, 1, 0], held.hidden[:, 2, 1] = 10.0, -4.0
    assert relocation.loss({1: held}, IMAGES) == 0
    held.hidden[:, 1, 1], held.hidden[:, 2, 0] = (
        -9.0,
        3.0,
    )  # of each other's cluster they may do what they like
    assert relocation.loss({1: held}, IMAGES) == 0
    held.hidden[:, 2, 1] = 0.0
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx(1 / 2), "one unit of two is nowhere"
    held.hidden[:, 7, 0] = 5.0
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx(1 / 2 + 0.5 / 2 / 2)


def test_one_cluster_with_several_registers_asks_each_of_them_alike(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0), (1, 6, -4.0)))
    held = reading(torch.tensor([10.0, -4.0]), 0.0, num_units=2)
    held.hidden[:, 2, 0] = 0.0
    assert relocation.loss({1: held}, IMAGES).item() == pytest.approx(1 / 4), "one unit, one register of two"


def test_a_register_without_a_cluster_is_asked_for_nothing(patched):
    one = sinks((1, 5, 10.0))
    relocation = Relocation(patched, replace(one, triggers=(one.triggers[0][:1],)))
    held = reading(0.0, 0.0)
    held.hidden[:, 1] = 10.0
    assert relocation.loss({1: held}, IMAGES) == 0
    held.hidden[:, 2] = 7.0
    assert relocation.loss({1: held}, IMAGES) == 0


def test_units_that_no_register_asked_for_them_holds_are_named(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0, 0), (1, 6, -4.0, 1)))
    held = reading(0.0, 0.0, num_units=2)
    held.hidden[:, 1, 0], held.hidden[:, 1, 1] = (
        6.0,
        -4.0,
    )  # the first register, which is of the first cluster
    assert relocation.silenced({1: held}) == ["1:6"]
    held.hidden[:, 2, 1] = -3.0
    assert relocation.silenced({1: held}) == []


def test_a_unit_counts_as_held_from_half_its_level_by_any_one_register(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0), (1, 6, 8.0), (1, 7, -4.0)))
    held = reading(0.0, 0.0, num_units=3)
    held.hidden[:, 1] = torch.tensor([5.0, 0.0, 0.0])
    held.hidden[:, 2] = torch.tensor([0.0, 3.9, -2.0])
    assert relocation.silenced({1: held}) == ["1:6"]


def test_gradients_reach_the_registers_and_the_units_rows_and_no_other_rows(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    with relocation.capture() as hidden:
        patched.run(IMAGES)
        relocation.loss(hidden, IMAGES).backward()
    assert patched.registers.grad.abs().sum(-1).all()
    rows = patched.model.blocks[1].mlp.fc1.weight.grad.abs().sum(-1).nonzero().flatten()
    assert rows.tolist() == [5]
    assert patched.model.blocks[2].mlp.fc1.weight.grad is None


def test_the_gradient_has_the_values_computed_by_hand(patched):
    known = sinks((1, 5, 10.0))
    known = replace(known, units=(replace(known.units[0], pre_activation=(2.0, -4.0)),))
    hidden = torch.zeros(2, 19, 1)
    # One register at half the level, one beyond it by a fifth; one patch of two images at the level.
    hidden[:, 1], hidden[:, 2], hidden[0, 3] = 5.0, 12.0, 10.0
    hidden.requires_grad_()
    pre_activation = torch.ones(2, 19, 1, 2, requires_grad=True)
    loss = Relocation(patched, known).loss({1: UnitActivations(hidden, pre_activation)}, IMAGES[:2])
    assert loss.item() == pytest.approx((0.5**2 + 0.2**2) / 2 + 1 / 2 / 2), "one of two sinks in one of two"
    by_hidden, by_pre_activation = torch.autograd.grad(loss, (hidden, pre_activation))
    # d/dh of max(h, 0) / A / S, a mean over two images; the registers' h is taken through what feeds it.
    assert by_hidden[0, 3].item() == pytest.approx(1 / 10 / 2 / 2)
    assert not by_hidden[:, :3].any()
    # 2 (h / A - 1), a mean over two registers and two images, over the pre-activation at the sink level.
    for register, error in ((1, -0.5), (2, 0.2)):
        expected = [pytest.approx([2 * error / 4 / 2.0, 2 * error / 4 / -4.0])] * 2
        assert by_pre_activation[:, register, 0].tolist() == expected
    assert not by_pre_activation[:, [0, *range(3, 19)]].any()


@pytest.mark.parametrize("name", ["timm/vit", "timm/dinov2-swiglu", "transformers/dinov2-swiglu"])
def test_a_register_that_is_off_is_led_back_on(name):
    backbone = add_registers(adapt(FAMILIES[name]()), 1, "randn", 0)
    mlp = backbone.mlp(1)
    halves = sum(layer.out_features for layer in mlp.up) // mlp.num_units
    with torch.no_grad():
        for parameter, rows in mlp.rows(torch.tensor([5])):
            # Far on the other side: what the activation itself passes is below 1e-20.
            parameter[rows] = -60.0 if parameter.dim() == 1 else torch.randn(len(rows), parameter.shape[1])
    images = torch.randn(3, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(0))
    known = sinks((1, 5, 10.0))
    known = replace(known, units=(replace(known.units[0], pre_activation=(10.0 ** (1 / halves),) * halves),))
    relocation = Relocation(backbone, known)
    with relocation.capture() as hidden:
        backbone.run(images)
    pre_activation = hidden[1].pre_activation[:, backbone.spec.num_prefix]
    assert pre_activation.max() < -20
    (direction,) = torch.autograd.grad(relocation.loss(hidden, images), backbone.registers)
    assert direction.norm() > 1e-3
    with torch.no_grad():
        backbone.registers.sub_(0.01 * direction / direction.norm())
        with relocation.capture() as hidden:
            backbone.run(images)
    assert (hidden[1].pre_activation[:, backbone.spec.num_prefix].mean(0) > pre_activation.mean(0)).all()


def test_layers_that_lora_wraps_later_are_listened_to_with_it(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    original = copy.deepcopy(patched)
    unlock(patched, UnlockConfig(lora=LoraConfig(rank=2, blocks=3)))
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    with relocation.capture() as hidden:
        patched.run(IMAGES)
    merge_lora(patched, original)
    with relocation.capture() as merged:
        patched.run(IMAGES)
    # Merging adds the low-rank product to the weight first: another order of the same sums.
    torch.testing.assert_close(merged[1].hidden, hidden[1].hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(merged[1].pre_activation, hidden[1].pre_activation, atol=1e-4, rtol=1e-4)


def test_nothing_listens_when_it_is_over(patched):
    with Relocation(patched, sinks((1, 5, 10.0))).capture() as hidden:
        pass
    patched.run(IMAGES)
    assert hidden == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", [0, 1], ids=["hidden", "fed"])
def test_the_loss_is_in_fp32_whatever_the_model_runs_in(patched, dtype, part):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    parts = list(reading(7.5, 2.5))
    parts[part] = parts[part].to(dtype)
    loss = relocation.loss({1: UnitActivations(*parts)}, IMAGES)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.25**2 + 16 * 0.25 / 2)


def test_training_moves_the_demonstrations_sinks_into_registers_and_keeps_them_there():
    backbone, images = adapt(demo.demo_model()), photographs(every=12)
    found = find_sinks(backbone, images.split(8))
    backbone.insert_registers(starting_tokens(backbone, found, [], 2, "triggers", seed=0))
    relocation = Relocation(backbone, found)
    rows = backbone.model.blocks[demo.SINK_BLOCK].mlp.fc1
    optimizer = torch.optim.Adam(
        [backbone.registers, rows.weight, rows.bias, backbone.model.pos_embed], lr=5e-3
    )
    losses = []
    for _ in range(30):
        with relocation.capture() as hidden:
            backbone.run(images)
            loss = relocation.loss(hidden, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    layout = backbone.layout(images)
    level = torch.tensor([unit.sink_level for unit in found.units])
    with relocation.capture() as hidden, torch.no_grad():
        tokens = backbone.block_tokens(images, [demo.DEPTH - 1])[demo.DEPTH - 1]
    relative = hidden[demo.SINK_BLOCK].hidden / level
    # A unit that no register holds would cost 1, and one of two that only half of the registers hold 1/4.
    assert losses[-1] < 0.02
    # One register a cluster.
    assert layout.registers(relative).mean(0).diagonal().min() > 0.7
    assert relocation.silenced(hidden) == []
    assert layout.patches(relative).amax() < 0.5
    norms = tokens.norm(dim=-1, keepdim=True)
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
        with relocation.capture() as hidden:
            backbone.run(images)
            relocation.loss(hidden, images).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert relocation.silenced(hidden) == []
