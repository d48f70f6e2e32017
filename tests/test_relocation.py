"""The relocation loss is zero where registers hold the sinks, and its gradient leads there."""

import pytest
import torch
from families import FAMILIES
from planted import Planted, pictures
from sinking import photographs

from phreg import demo
from phreg.analysis.norms import outliers
from phreg.backbones.resolve import adapt
from phreg.registers import add_registers
from phreg.relocation import Relocation
from phreg.sinks import Sinks, Unit, locate


def sinks(*units):
    """Sinks of some causes (block, unit, level); relocation asks for nothing else."""
    causes = tuple(Unit(block, index, level, 0.0, 1.0) for block, index, level in units)
    norms = outliers(Planted(), [pictures()])
    return Sinks(norms, 0, causes, 1.0, (), None, torch.zeros(1, 32))


@pytest.fixture
def patched():
    return add_registers(adapt(FAMILIES["timm/vit"]()), 2)  # sequence: CLS, 2 registers, 16 patches


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def hidden_units(patched, units, on_registers, on_patches):
    """Hidden units as listening collects them, in one block."""
    hidden = torch.randn(3, 19, 128, generator=torch.Generator().manual_seed(0))
    hidden[:, 1:3, units], hidden[:, 3:, units] = on_registers, on_patches
    return hidden


@pytest.mark.parametrize("level", [150.0, -8.0])
def test_nothing_is_lost_where_registers_hold_the_level_and_patches_are_silent(patched, level):
    relocation = Relocation(patched, sinks((1, 5, level)))
    held = hidden_units(patched, [5], level, 0.0)
    assert relocation.loss({1: held}, IMAGES) == 0
    beyond = hidden_units(patched, [5], level, -level)  # on the other side patches may be what they like
    assert relocation.loss({1: beyond}, IMAGES) == 0


@pytest.mark.parametrize("level", [150.0, -8.0])
def test_the_loss_counts_silent_registers_and_loud_patches_relative_to_the_level(patched, level):
    relocation = Relocation(patched, sinks((1, 5, level)))
    assert relocation.loss({1: hidden_units(patched, [5], 0.0, 0.0)}, IMAGES).item() == pytest.approx(1)
    loud = hidden_units(patched, [5], level, 0.0)
    loud[:, [3, 9], 5] = level / 2  # two patches of each image at half the level
    assert relocation.loss({1: loud}, IMAGES).item() == pytest.approx(2 * 0.25)


def test_several_units_and_blocks_count_alike(patched):
    relocation = Relocation(patched, sinks((0, 3, 10.0), (0, 4, -20.0), (2, 7, 5.0)))
    level = torch.tensor([10.0, -20.0])
    silent = hidden_units(patched, [3, 4], level, 0.0), hidden_units(patched, [7], 0.0, 0.0)
    loss = relocation.loss({0: silent[0], 2: silent[1]}, IMAGES)
    assert loss.item() == pytest.approx(1 / 3), "two of three units are where they should be"


def test_gradients_reach_the_registers_and_the_units_rows_and_no_other_rows(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    with relocation.listening() as hidden:
        patched.run(IMAGES)
        relocation.loss(hidden, IMAGES).backward()
    assert patched.registers.grad.abs().sum(-1).all()
    rows = patched.model.blocks[1].mlp.fc1.weight.grad.abs().sum(-1).nonzero().flatten()
    assert rows.tolist() == [5]
    assert patched.model.blocks[2].mlp.fc1.weight.grad is None


def test_nothing_listens_when_it_is_over(patched):
    with Relocation(patched, sinks((1, 5, 10.0))).listening() as hidden:
        pass
    patched.run(IMAGES)
    assert hidden == {}


def test_the_loss_is_in_full_precision_whatever_the_model_runs_in(patched):
    relocation = Relocation(patched, sinks((1, 5, 10.0)))
    half = hidden_units(patched, [5], 10.0, 0.0).bfloat16()
    assert relocation.loss({1: half}, IMAGES).dtype == torch.float32


def test_training_moves_the_demonstrations_sinks_into_registers_and_keeps_them_there():
    backbone, images = adapt(demo.demo_model()), photographs(every=12)
    found = locate(backbone, images.split(8))
    backbone.insert_registers(found.triggers[[0, 4]])
    relocation = Relocation(backbone, found)
    rows = backbone.model.blocks[demo.SINK_BLOCK].mlp.fc1
    optimizer = torch.optim.Adam(
        [backbone.registers, rows.weight, rows.bias, backbone.model.pos_embed], lr=2e-2
    )
    losses = []
    for _ in range(30):
        with relocation.listening() as hidden:
            backbone.run(images)
            loss = relocation.loss(hidden, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    layout = backbone.layout(images)
    units = [unit.index for unit in found.units]
    level = torch.tensor([unit.level for unit in found.units])
    with relocation.listening() as hidden, torch.no_grad():
        tokens = backbone.block_tokens(images, [demo.DEPTH - 1])[demo.DEPTH - 1]
    relative = hidden[demo.SINK_BLOCK][..., units] / level
    assert losses[-1] < 0.2 * losses[0]
    # A register that starts where a unit is off cannot turn it on: the gradient of GELU is zero there.
    assert layout.registers(relative).amax(1).mean() > 0.7
    assert layout.patches(relative).amax() < 0.5
    norms = tokens.norm(dim=-1, keepdim=True)
    assert layout.registers(norms).mean() > 3 * layout.patches(norms).median()
