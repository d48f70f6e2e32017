import copy
import itertools
import logging
import math

import families_open_clip
import families_transformers
import pytest
import torch

from phreg.backbones.readout import set_readout
from phreg.backbones.resolve import adapt
from phreg.config import LoraConfig, LossConfig, OptimConfig, TargetConfig, UnlockConfig, ViewsConfig
from phreg.errors import ConfigError, TrainingError
from phreg.registers import add_registers
from phreg.teacher import Teacher
from phreg.training import trainable as unlock
from phreg.training.losses import distillation_terms
from phreg.training.task import RetrofitTask

NO_LORA = LoraConfig(rank=0)


def patched(model, count=2):
    backbone = adapt(model)
    add_registers(backbone, count)
    return backbone


def freeze(backbone, trained, target, loss):
    teacher = Teacher(backbone, ViewsConfig(), target)
    task = RetrofitTask(backbone, teacher, distillation_terms(loss), target)
    return unlock.freeze_unused(task, trained, backbone.spec.input_size)


def test_only_registers_and_the_named_roles_train(tiny):
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("pos_embed", "block.-1"), lora=NO_LORA))
    expected = {"model.reg_token", "model.pos_embed"}
    expected |= {f"model.blocks.2.{name}" for name, _ in backbone.model.blocks[2].named_parameters()}
    assert set(trained) == expected
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == expected


def test_an_unknown_role_lists_the_models_own(tiny):
    with pytest.raises(ConfigError, match=r"no role 'block.7'.*block.0 to block.2"):
        unlock.unlock(patched(tiny()), UnlockConfig(roles=("block.7",), lora=NO_LORA))


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (("block.0", "block.2"), ["block.0", "block.2"]),
        (("block.-1", "block.-3"), ["block.2", "block.0"]),
        (("blocks",), ["block.0", "block.1", "block.2"]),
        (("block.1", "blocks", "block.-2"), ["block.1", "block.0", "block.2"]),
        (("pos_embed", "pos_embed"), ["pos_embed"]),
    ],
)
def test_roles_count_blocks_from_both_ends_and_each_once(tiny, roles, expected):
    assert unlock.expand_roles(adapt(tiny()), roles) == expected
    assert unlock.expand_roles(patched(tiny()), roles) == ["registers", *expected]


@pytest.mark.parametrize(
    "role", ["block.3", "block.-4", "block.", "block.x", "block.--1", "block.²", "block", "nose"]
)
def test_a_role_that_the_model_lacks_is_named_with_those_it_has(tiny, role):
    with pytest.raises(ConfigError) as caught:
        unlock.expand_roles(patched(tiny()), ("pos_embed", role))
    (problem,) = caught.value.problems
    assert problem.startswith("unlock.roles: ")
    _, have = problem.split(f"has no role {role!r}; it has ")
    expected = {
        "pos_embed",
        "patch_embed",
        "registers",
        "block.0 to block.2",
        "block.-3 to block.-1",
        "blocks",
    }
    assert expected <= set(have.split(", "))
    assert "block.1" not in have, "blocks are told as a range"


def test_without_registers_and_roles_nothing_would_train_and_that_is_an_error(tiny):
    with pytest.raises(ConfigError, match="nothing would train"):
        unlock.unlock(adapt(tiny()), UnlockConfig(roles=(), lora=NO_LORA))


def test_what_a_value_only_read_out_does_not_reach_stays_frozen():
    clip = next(name for name in families_transformers.FAMILIES if name.startswith("clip"))
    backbone = patched(families_transformers.FAMILIES[clip]())
    set_readout(backbone, "value-only")
    trained = unlock.unlock(backbone, UnlockConfig(roles=("block.-1",), lora=NO_LORA))
    used = freeze(backbone, trained, TargetConfig(), LossConfig(pooled=0))
    frozen = set(trained) - set(used)
    assert any("q_proj" in name for name in frozen)
    assert any("k_proj" in name for name in frozen)
    assert any("mlp" in name for name in frozen)
    assert any("v_proj" in name for name in used)
    assert any("registers" in name for name in used)
    assert not any(backbone.get_parameter(name).requires_grad for name in frozen)


def test_blocks_after_an_inner_target_stay_frozen(tiny, caplog):
    caplog.set_level(logging.INFO)
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("blocks",), lora=NO_LORA))
    used = freeze(backbone, trained, TargetConfig(layer=1), LossConfig(pooled=0))
    assert any("blocks.1." in name for name in used)
    assert not any("blocks.2." in name for name in used)
    assert "model.blocks.2.mlp.fc1.weight" in caplog.text, "it is said"


def test_finding_out_what_is_used_leaves_no_gradients_and_no_word_where_all_is_used(tiny, caplog):
    caplog.set_level(logging.INFO)
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("blocks",), lora=NO_LORA))
    used = freeze(backbone, trained, TargetConfig(), LossConfig())
    assert used.keys() == trained.keys()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert caplog.text == ""


def test_what_is_used_is_found_in_a_half_precision_model_too(tiny):
    backbone = patched(tiny()).to(torch.bfloat16)
    trained = unlock.unlock(backbone, UnlockConfig(roles=("blocks",), lora=NO_LORA))
    used = freeze(backbone, trained, TargetConfig(layer=0), LossConfig(pooled=0))
    assert {name.split(".")[2] for name in used if "blocks" in name} == {"0"}


def test_the_pooled_term_alone_reaches_the_weights(tiny):
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("blocks",), lora=NO_LORA))
    pooled = LossConfig(cosine=0, mse=0, pooled=1)
    used = freeze(backbone, trained, TargetConfig(), pooled)
    assert used.keys() == trained.keys()


def test_a_loss_without_terms_is_an_error_that_names_its_weights(tiny):
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=("blocks",), lora=NO_LORA))
    nothing = LossConfig(cosine=0, mse=0, pooled=0)
    with pytest.raises(ConfigError, match=r"set loss\.cosine, loss\.mse or loss\.pooled"):
        freeze(backbone, trained, TargetConfig(), nothing)


@pytest.mark.parametrize(("rank", "alpha"), [(2, 6.0), (3, 1.5)])
def test_merged_lora_adds_alpha_over_rank_times_the_product(tiny, rank, alpha):
    backbone = patched(tiny())
    original = copy.deepcopy(backbone)
    before = original.model.blocks[2].mlp.fc1.weight.detach()
    lora = LoraConfig(rank=rank, alpha=alpha, blocks=1)
    trained = unlock.unlock(backbone, UnlockConfig(roles=(), lora=lora))
    (down,) = (p for name, p in trained.items() if "blocks.2.mlp.fc1" in name and "lora_A" in name)
    (up,) = (p for name, p in trained.items() if "blocks.2.mlp.fc1" in name and "lora_B" in name)
    assert down.shape == (rank, 32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (down, up):
            part.copy_(torch.randn(part.shape, generator=generator))
        expected = before + alpha / rank * up @ down
        unlock.merge_lora(backbone, original)
    torch.testing.assert_close(backbone.model.blocks[2].mlp.fc1.weight.detach(), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_lora_goes_onto_every_linear_layer_of_so_many_last_blocks(tiny, count):
    backbone = patched(tiny())
    trained = unlock.unlock(backbone, UnlockConfig(roles=(), lora=LoraConfig(rank=2, blocks=count)))
    layers = {name.split(".lora_")[0] for name in trained if "lora_" in name}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert layers == {f"model.blocks.{block}.{part}" for block in range(3 - count, 3) for part in parts}


@pytest.mark.parametrize("build", ["timm", "open_clip"])
def test_broken_lora_is_never_merged(tiny, build):
    model = tiny() if build == "timm" else families_open_clip.FAMILIES["clip"]()
    backbone = patched(model)
    original = copy.deepcopy(backbone)
    trained = unlock.unlock(backbone, UnlockConfig(roles=(), lora=LoraConfig(rank=2, blocks=1)))
    with torch.no_grad():
        next(parameter for name, parameter in trained.items() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(TrainingError, match="NaN"):
        unlock.merge_lora(backbone, original)


@pytest.mark.parametrize("build", ["timm", "open_clip", "transformers"])
def test_lora_changes_nothing_at_first_trains_and_is_merged_into_plain_weights(tiny, build):
    if build == "timm":
        model = tiny()
    else:
        table = {"open_clip": families_open_clip, "transformers": families_transformers}[build].FAMILIES
        model = table[next(name for name in table if name.startswith(("dinov2", "native", "clip")))]()
    backbone = patched(model).eval()
    images = torch.randn(2, 3, *backbone.spec.input_size, generator=torch.Generator().manual_seed(1))
    original, keys = copy.deepcopy(backbone), set(backbone.disk_state())
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
    unlock.merge_lora(backbone, original)
    # Merging adds the low-rank product to the weight first: another order of the same sums.
    torch.testing.assert_close(backbone(images).patches.detach(), during, atol=1e-4, rtol=1e-4)
    assert set(backbone.disk_state()) == keys


def test_the_papers_schedule_steps_by_epoch_one_step_late():
    paper = OptimConfig(warmup_steps=0, lr=1e-4, final_lr=5e-6, schedule="exponential", schedule_unit="epoch")
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


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # A quarter, half and all of the way; 0.5 + sqrt(0.5) / 2 and 0.5 of the cosine's way are left.
        ("cosine", [9.0, 1 + 8 * (0.5 + math.sqrt(0.5) / 2), 5.0, 1.0]),
        ("exponential", [9.0, 9.0 * 9**-0.25, 3.0, 1.0]),
        ("constant", [9.0] * 4),
    ],
)
def test_schedules_have_the_rates_computed_by_hand(schedule, expected):
    config = OptimConfig(warmup_steps=0, lr=9.0, final_lr=1.0, schedule=schedule, schedule_unit="step")
    rates = [unlock.learning_rate(config, step, steps=5, steps_per_epoch=7) for step in (0, 1, 2, 4)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["exponential", "cosine"])
def test_of_two_steps_the_second_is_the_last(schedule):
    config = OptimConfig(warmup_steps=0, lr=1e-3, final_lr=1e-5, schedule=schedule, schedule_unit="step")
    rates = [unlock.learning_rate(config, step, steps=2, steps_per_epoch=1) for step in (0, 1)]
    assert rates == pytest.approx([1e-3, 1e-5])


def test_an_epoch_that_is_cut_short_counts_as_one():
    config = OptimConfig(warmup_steps=0, lr=8.0, final_lr=1.0, schedule="exponential", schedule_unit="epoch")
    rates = [unlock.learning_rate(config, step, steps=7, steps_per_epoch=3) for step in range(7)]
    assert rates == pytest.approx([8, 4, 4, 4, 2, 2, 2]), "a third of the way after each of three epochs"


def test_a_constant_schedule_is_constant_and_one_step_is_enough():
    assert (
        unlock.learning_rate(OptimConfig(warmup_steps=0, schedule="constant"), 3, 10, 5) == OptimConfig().lr
    )
    assert math.isfinite(unlock.learning_rate(OptimConfig(warmup_steps=0), 0, 1, 1))


def test_the_moving_average_has_the_values_computed_by_hand_and_can_take_the_weights_place():
    weights = {"w": torch.nn.Parameter(torch.zeros(3))}
    average = unlock.MovingAverage(weights, decay=0.75)
    for value, expected in ((4.0, 1.0), (9.0, 3.0), (-1.0, 2.0)):
        with torch.no_grad():
            weights["w"].fill_(value)
        average.update()
        assert average.average["w"].tolist() == [expected] * 3
    assert weights["w"].tolist() == [-1.0] * 3, "the weights train on as they are"
    average.apply()
    assert weights["w"].tolist() == [2.0] * 3
    assert not average.average["w"].requires_grad


def test_the_average_takes_the_weights_place_for_a_while_only():
    weights = {"w": torch.nn.Parameter(torch.zeros(1))}
    average = unlock.MovingAverage(weights, decay=0.75)
    with torch.no_grad():
        weights["w"].fill_(4.0)
    average.update()
    with average.applied():
        assert weights["w"].item() == 1.0
    assert weights["w"].item() == 4.0


def test_vectors_are_norms_and_biases_of_the_blocks(tiny):
    trained = unlock.unlock(patched(tiny()), UnlockConfig(roles=("vectors",), lora=NO_LORA))
    block = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.qkv.bias", "attn.proj.bias"}
    block |= {"mlp.fc1.bias", "mlp.fc2.bias"}
    expected = {f"model.blocks.{index}.{name}" for index in range(3) for name in block}
    assert set(trained) == expected | {"model.reg_token"}


def test_the_automatic_rank_is_the_largest_within_the_share_of_the_weights(tiny):
    """Width 32, three blocks: qkv 32x96, proj 32x32, fc1 32x128, fc2 128x32: 512 a rank."""
    backbone = patched(tiny())
    total = sum(parameter.numel() for parameter in backbone.model.parameters())
    assert unlock.automatic_rank(backbone, list(backbone.blocks)) == int(0.08 * total / (3 * 512))
    trained = unlock.unlock(backbone, UnlockConfig(roles=(), lora=LoraConfig(rank="auto", blocks="all")))
    lora = sum(parameter.numel() for name, parameter in trained.items() if "lora_" in name)
    assert 0.08 * total - 3 * 512 < lora <= 0.08 * total


def test_parameters_have_the_role_of_what_they_are_in_adapters_that_of_their_block(tiny):
    backbone = patched(tiny())
    trained = unlock.unlock(
        backbone, UnlockConfig(roles=("pos_embed", "vectors", "norm"), lora=LoraConfig(rank=2, blocks="all"))
    )
    roles = unlock.parameter_roles(backbone, trained)
    assert roles.keys() == trained.keys()
    assert roles["model.pos_embed"] == "pos_embed"
    assert roles["model.reg_token"] == "registers"
    assert roles["model.norm.weight"] == "norm"
    inside = {name: role for name, role in roles.items() if ".blocks." in name}
    assert all(role == f"block.{name.split('.')[2]}" for name, role in inside.items())
    assert any("lora_" in name for name in inside)


def test_each_parameter_moves_at_its_share_of_the_rate():
    weights = {name: torch.nn.Parameter(torch.tensor([1.0])) for name in "abc"}
    config = OptimConfig(name="sgd", lr=0.5, momentum=0, weight_decay=0)
    optim = unlock.optimizer(weights, config, {"a": 0.5, "c": 0.1})
    unlock.set_learning_rate(optim, 0.2)
    for weight in weights.values():
        weight.grad = torch.ones(1)
    optim.step()
    moved = [1 - weight.item() for weight in weights.values()]
    assert moved == pytest.approx([0.1, 0.2, 0.02], rel=1e-5)


GRADIENTS = (3.0, -1.0, 0.5)


def stepped(**settings):
    """A weight of 2 after each of three steps with given gradients."""
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optim = unlock.optimizer({"w": weight}, OptimConfig(**settings))
    values = []
    for gradient in GRADIENTS:
        weight.grad = torch.full_like(weight, gradient)
        optim.step()
        values.append(weight.item())
    return values


def test_one_step_of_sgd_with_decay_and_momentum_is_that_computed_by_hand():
    values = stepped(name="sgd", lr=0.1, momentum=0.5, weight_decay=0.25)
    # 3 + 0.25 * 2 = 3.5; then half of that, with -1 + 0.25 * 1.65 = -0.5875.
    assert values[:2] == pytest.approx([2 - 0.1 * 3.5, 1.65 - 0.1 * (0.5 * 3.5 - 0.5875)])
    assert stepped(name="sgd", lr=0.1, momentum=0, weight_decay=0) == pytest.approx([1.7, 1.8, 1.75])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_of_adam_are_those_of_the_papers_written_out(name):
    """Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2."""
    lr, decay, (beta1, beta2) = 0.1, 0.25, (0.5, 0.75)
    weight, first, second, expected = 2.0, 0.0, 0.0, []
    for step, gradient in enumerate(GRADIENTS, start=1):
        if name == "adam":
            gradient += decay * weight
        else:
            weight -= lr * decay * weight
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        weight -= lr * (first / (1 - beta1**step)) / (math.sqrt(second / (1 - beta2**step)) + 1e-8)
        expected.append(weight)
    assert stepped(name=name, lr=lr, weight_decay=decay, betas=(beta1, beta2)) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_weight_decay_shrinks_weights_that_have_no_gradient(name):
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optim = unlock.optimizer({"w": weight}, OptimConfig(name=name, lr=0.1, weight_decay=0.5))
    weight.grad = torch.zeros(1)
    optim.step()
    # Adam's decay is part of the gradient, and its first step is of size lr.
    assert weight.item() == pytest.approx(2 - 0.1 if name == "adam" else 2 - 0.1 * 0.5 * 2)
