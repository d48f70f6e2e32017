import copy
import itertools
import math

import families_open_clip
import families_transformers
import pytest
import torch

from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import adapt
from phreg.config import LoraConfig, LossConfig, OptimConfig, TargetConfig, UnlockConfig
from phreg.errors import ConfigError
from phreg.registers import add_registers
from phreg.training import trainable as unlock


def patched(model, count=2):
    backbone = adapt(model)
    add_registers(backbone, count)
    return backbone


def test_only_registers_and_the_named_roles_train(tiny):
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("pos_embed", "block.-1")))
    expected = {"model.reg_token", "model.pos_embed"}
    expected |= {f"model.blocks.2.{name}" for name, _ in backbone.model.blocks[2].named_parameters()}
    assert set(trained) == expected
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == expected


def test_an_unknown_role_lists_the_models_own(tiny):
    with pytest.raises(ConfigError, match=r"no role 'block.7'.*block.0 to block.2"):
        unlock.unlock(patched(tiny()), UnlockConfig(roles=("block.7",)))


def test_without_registers_and_roles_nothing_would_train_and_that_is_an_error(tiny):
    with pytest.raises(ConfigError, match="nothing would train"):
        unlock.unlock(adapt(tiny()), UnlockConfig(roles=()))


def test_what_a_value_only_read_out_does_not_reach_stays_frozen():
    clip = next(name for name in families_transformers.FAMILIES if name.startswith("clip"))
    backbone = patched(families_transformers.FAMILIES[clip]())
    set_readout(backbone, "value-only")
    trained = unlock.unlock(backbone, UnlockConfig(roles=("block.-1",)))
    used = unlock.freeze_unused(
        backbone, trained, TargetConfig(), LossConfig(pooled=0), backbone.spec.input_size
    )
    frozen = set(trained) - set(used)
    assert any("q_proj" in name for name in frozen)
    assert any("k_proj" in name for name in frozen)
    assert any("mlp" in name for name in frozen)
    assert any("v_proj" in name for name in used)
    assert any("registers" in name for name in used)
    assert not any(backbone.get_parameter(name).requires_grad for name in frozen)


def test_blocks_after_an_inner_target_stay_frozen(tiny):
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("blocks",)))
    used = unlock.freeze_unused(backbone, trained, TargetConfig(layer=1), LossConfig(pooled=0), (32, 32))
    assert any("blocks.1." in name for name in used)
    assert not any("blocks.2." in name for name in used)


@pytest.mark.parametrize("build", ["timm", "open_clip", "transformers"])
def test_lora_changes_nothing_at_first_trains_and_is_merged_into_plain_weights(tiny, build):
    if build == "timm":
        model = tiny()
    else:
        table = {"open_clip": families_open_clip, "transformers": families_transformers}[build].FAMILIES
        model = table[next(name for name in table if name.startswith(("dinov2", "native", "clip")))]()
    backbone = patched(model).eval()
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(1))
    keys = set(backbone.disk_state())
    before = backbone(images).patches.detach()
    trained = unlock.unlock(backbone, UnlockConfig(roles=(), lora=LoraConfig(rank=2, blocks=1)))
    assert any("lora_" in name for name in trained), "adapters train"
    assert any("reg" in name for name in trained), "and so do registers (PEFT would freeze them)"
    torch.testing.assert_close(backbone(images).patches, before, atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        for name, parameter in trained.items():
            if "lora_" in name:
                parameter.add_(0.1)
    during = backbone(images).patches.detach()
    assert (during - before).abs().max() > 1e-3
    unlock.merge_lora(backbone)
    # Merging adds the low-rank product to the weight first: another order of the same sums.
    torch.testing.assert_close(backbone(images).patches.detach(), during, atol=1e-4, rtol=1e-4)
    assert set(backbone.disk_state()) == keys


def test_lora_in_a_block_that_a_read_out_takes_apart_is_refused():
    backbone = patched(families_open_clip.FAMILIES[next(iter(families_open_clip.FAMILIES))]())
    set_readout(backbone, "value-only")
    with pytest.raises(ConfigError, match="value-only"):
        unlock.unlock(backbone, UnlockConfig(lora=LoraConfig(rank=2)))


def test_the_papers_schedule_steps_by_epoch_one_step_late():
    paper = OptimConfig(lr=1e-4, final_lr=5e-6, schedule="exponential", schedule_unit="epoch")
    rates = [unlock.learning_rate(paper, step, steps=30, steps_per_epoch=10) for step in range(30)]
    third = [1e-4 * (5e-6 / 1e-4) ** (part / 3) for part in (1, 2, 3)]
    assert rates[0] == 1e-4, "the rate is set after each step, so the first still has the initial one"
    assert rates[1:11] == pytest.approx([third[0]] * 10)
    assert rates[11:21] == pytest.approx([third[1]] * 10)
    assert rates[29] == pytest.approx(5e-6)


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_a_schedule_by_step_goes_from_lr_to_final_lr(schedule):
    config = OptimConfig(lr=1e-3, final_lr=1e-5, schedule=schedule, schedule_unit="step", warmup_steps=5)
    rates = [unlock.learning_rate(config, step, steps=50, steps_per_epoch=7) for step in range(50)]
    assert rates[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    assert rates[5] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[5:]))


def test_a_constant_schedule_is_constant_and_one_step_is_enough():
    assert unlock.learning_rate(OptimConfig(schedule="constant"), 3, 10, 5) == OptimConfig().lr
    assert math.isfinite(unlock.learning_rate(OptimConfig(), 0, 1, 1))


def test_the_moving_average_is_the_recursion_and_can_take_the_weights_place():
    weights = {"w": torch.nn.Parameter(torch.zeros(3))}
    average = unlock.MovingAverage(weights, decay=0.9)
    expected = torch.zeros(3)
    for value in (1.0, 2.0, 5.0):
        with torch.no_grad():
            weights["w"].fill_(value)
        average.update()
        expected = 0.9 * expected + 0.1 * value
    average.apply()
    torch.testing.assert_close(weights["w"].detach(), expected)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_optimizer_moves_the_weights(name):
    weight = torch.nn.Parameter(torch.ones(2))
    before = copy.deepcopy(weight)
    optim = unlock.optimizer({"w": weight}, OptimConfig(name=name))
    (weight**2).sum().backward()
    optim.step()
    assert not torch.equal(weight, before)
