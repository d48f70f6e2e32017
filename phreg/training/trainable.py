"""Which weights train, by role, and how they move: unlocking, LoRA, the optimizer and its schedule.

An adapter says which parameters are the position embedding or block 3 (`Backbone.roles`). Nothing here
matches parameter names. PEFT injects LoRA into the model in place. LoRA is merged into the weights before
anything is saved.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.config import DistillConfig, LoraConfig, OptimConfig, UnlockConfig
from phreg.data.crops import Order
from phreg.errors import ConfigError, TrainingError
from phreg.low_rank import Factors, changed
from phreg.training.task import RetrofitTask

logger = logging.getLogger(__name__)

VECTORS = "vectors"
"""The role of all norms, layer scales and biases of the blocks: what has one dimension."""

LORA_SHARE = 0.08
"""Share of the model's weights that adapters of automatic rank may have at most."""


def unlock(backbone: Backbone, config: UnlockConfig) -> dict[str, nn.Parameter]:
    """Freezes a model except its registers and the configured roles, and injects LoRA if configured.

    Parameters that train get memory of their own; the others may share theirs with the model's twin.

    Returns:
        The parameters that train, by name in `backbone`.

    Raises:
        ConfigError: A role does not exist for this model, or nothing is left to train.
    """
    roles = backbone.roles()
    names = {name for role in expand_roles(backbone, config.roles) for name in roles.get(role, ())}
    chosen = {id(backbone.model.get_parameter(name)) for name in names}
    if VECTORS in config.roles:
        inside = (parameter for block in backbone.blocks for parameter in block.parameters())
        chosen |= {id(parameter) for parameter in inside if parameter.ndim == 1}
    if config.lora.rank:
        _inject_lora(backbone, config.lora)
    trained = {}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen or "lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
            trained[name] = parameter
    if not trained:
        raise ConfigError(
            "settings", ["unlock.roles: no registers and no roles, so nothing would train; name some roles"]
        )
    return trained


def check_trainable(student: Backbone, num_images: int, config: DistillConfig, processes: int) -> None:
    """Checks what training needs, before anything is written and before the search for sinks.

    Raises:
        PhregError: The images do not fill a batch, or a role does not exist for the model.
    """
    Order(num_images, config.batch_size, world_size=processes, num_sizes=1 + len(config.mixed_sizes))
    expand_roles(student, config.unlock.roles)


def expand_roles(backbone: Backbone, roles: tuple[str, ...]) -> list[str]:
    """Turns configured roles into the model's own: `block.-1` into the last block, `blocks` into all.

    Registers are always among them.

    Raises:
        ConfigError: A role does not exist for this model.
    """
    known, depth = backbone.roles(), len(backbone.blocks)
    expanded = ["registers"] if backbone.num_registers else []
    problems = []
    for role in roles:
        kind, _, number = role.partition(".")
        if role == "blocks":
            expanded += [f"block.{index}" for index in range(depth)]
        elif kind == "block" and number.removeprefix("-").isdecimal() and -depth <= int(number) < depth:
            expanded.append(f"block.{int(number) % depth}")
        elif role in known or role == VECTORS:
            expanded.append(role)
        else:
            blocks = f"block.0 to block.{depth - 1}, block.-{depth} to block.-1, blocks, {VECTORS}"
            others = ", ".join(name for name in known if not name.startswith("block."))
            problems.append(
                f"unlock.roles: {backbone.describe()} has no role {role!r}; it has {others}, {blocks}"
            )
    if problems:
        raise ConfigError("settings", problems)
    return list(dict.fromkeys(expanded))


def freeze_unused(
    task: RetrofitTask, trained: dict[str, nn.Parameter], size: tuple[int, int]
) -> dict[str, nn.Parameter]:
    """Freezes weights that the loss does not reach, as one backward pass on a blank image shows.

    A value-only read-out does not use the last block's queries, keys and MLP. A loss on an inner block does
    not use later blocks. Weight decay would shrink them, and distributed training would wait for their
    gradients.

    Args:
        task: What is trained, running.
        trained: The unlocked parameters, by name.
        size: Height and width of the images.

    Raises:
        ConfigError: The loss has no terms.
    """
    total = task.probe(size)
    if not total.requires_grad:
        raise ConfigError(
            "settings",
            [
                "loss: every weight that applies is 0, so nothing would train; set loss.cosine, loss.mse or "
                "loss.pooled (loss.relocation applies where units that cause sinks are known, and registers)"
            ],
        )
    total.backward()
    unused = [name for name, parameter in trained.items() if parameter.grad is None]
    for name in unused:
        trained[name].requires_grad_(False)
    task.student.zero_grad()
    if unused:
        logger.info(
            "the loss does not reach %d unlocked tensors, which stay frozen: %s",
            len(unused),
            ", ".join(unused),
        )
    return {name: parameter for name, parameter in trained.items() if parameter.requires_grad}


@torch.no_grad()
def merge_lora(backbone: Backbone, original: Backbone) -> dict[str, Factors]:
    """Merges LoRA into the weights and removes it. Models without LoRA stay unchanged.

    Args:
        backbone: The model.
        original: The model as it was. Its frozen weights are what is added to: PEFT rounds those of fused
            attention anew at every forward.

    Returns:
        What was added to each weight, by its name in the model, to the bit.

    Raises:
        TrainingError: An adapter holds NaN or infinite values.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def outermost() -> tuple[str, Any] | None:
        named = backbone.model.named_modules()
        return next(((name, module) for name, module in named if isinstance(module, BaseTunerLayer)), None)

    merged: dict[str, Factors] = {}
    while (found := outermost()) is not None:
        name, layer = found
        plain = layer.get_base_layer()
        adapted = {"weight": layer}
        # Fused attention is unwrapped by PEFT itself: its output projection is wrapped a second time inside.
        if isinstance(plain, nn.MultiheadAttention):
            adapted = {"in_proj_weight": layer, "out_proj.weight": plain.out_proj}
            plain = layer.unload_and_optionally_merge_module(
                merge=False, safe_merge=False, adapter_names=None
            )
        for weight, lora in adapted.items():
            down, up, scale = (_only(part) for part in (lora.lora_A, lora.lora_B, lora.scaling))
            factors = Factors(down.weight, scale * up.weight)
            if not all(factor.isfinite().all() for factor in factors):
                raise TrainingError(
                    f"the low-rank change of {name}.{weight} holds NaN or infinite values, and is not "
                    "merged; lower optim.lr, or set optim.clip_norm"
                )
            factors = merged[f"{name}.{weight}"] = factors.rounded()
            parameter = plain.get_parameter(weight)
            frozen = original.model.get_parameter(f"{name}.{weight}")
            # In new memory, as the original shares that of weights which did not train.
            parameter.data = changed(parameter if parameter.requires_grad else frozen, factors)
        backbone.model.set_submodule(name, plain)
    return merged


def _only(adapters: Any) -> Any:
    """Returns the one adapter that phreg injects, whatever PEFT calls it."""
    (name,) = adapters
    return adapters[name]


def parameter_roles(backbone: Backbone, trained: Mapping[str, nn.Parameter]) -> dict[str, str]:
    """Returns the role of each parameter that trains, by name; what LoRA adds to a block has its role."""
    roles = {
        id(parameter): f"block.{index}"
        for index, block in enumerate(backbone.blocks)
        for parameter in block.parameters()
    }
    for role, names in backbone.roles().items():
        if not role.startswith("block."):
            roles |= {id(backbone.model.get_parameter(name)): role for name in names}
    return {name: roles.get(id(parameter), "others") for name, parameter in trained.items()}


def optimizer(
    parameters: Mapping[str, nn.Parameter], config: OptimConfig, shares: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Makes the optimizer. Weight decay applies to everything that trains, as in the paper.

    Args:
        parameters: The parameters that train, by name.
        config: Optimizer and its rates.
        shares: Share of the learning rate that a parameter gets, by name; all of it where it is not named.
    """
    share = {name: (shares or {}).get(name, 1.0) for name in parameters}
    values: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in names], "share": value}
        for value, names in groupby(parameters, key=share.__getitem__)
    ]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(
                values, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
            )
        case "adam":
            return torch.optim.Adam(
                values, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
            )
        case "sgd":
            return torch.optim.SGD(
                values, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )


def set_learning_rate(optim: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of a step; each parameter gets its share."""
    for group in optim.param_groups:
        group["lr"] = rate * group["share"]


def learning_rate(config: OptimConfig, step: int, steps: int, steps_per_epoch: float | int) -> float:
    """The learning rate of a step.

    With a schedule by epoch, the paper's code sets the rate after each step to that of the epoch's end. So
    the first step runs at `lr`, and each later step at the rate of its predecessor's epoch. This function
    does the same.

    Args:
        config: Rates, shape and unit of the schedule.
        step: Step, from 0.
        steps: Steps in the whole run.
        steps_per_epoch: Steps in one pass over the images; a fraction if batches are accumulated across the
            end of a pass.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule_unit == "epoch":
        epochs = math.ceil(steps / steps_per_epoch)
        progress = ((step - 1) // steps_per_epoch + 1) / epochs if step else 0.0
    else:
        progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    match config.schedule:
        case "exponential":
            return config.lr * (config.final_lr / config.lr) ** progress
        case "cosine":
            return config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
        case "constant":
            return config.lr


class MovingAverage:
    """An exponential moving average of the weights that train (Polyak and Juditsky 1992).

    Args:
        parameters: The weights, by name.
        decay: Weight of the old average at each step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = parameters
        self.average: dict[str, Float[Tensor, "..."]] = {n: p.detach().clone() for n, p in parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Adds the current weights to the average."""
        for name, parameter in self.parameters.items():
            self.average[name].lerp_(parameter, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replaces the weights by the average for as long as it lasts."""
        current = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.apply()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(current[name])

    @torch.no_grad()
    def apply(self) -> None:
        """Replaces the weights by the average."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])


def _inject_lora(backbone: Backbone, config: LoraConfig) -> None:
    """Puts adapters on every linear layer and attention projection of the last blocks."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    names = {id(module): name for name, module in backbone.model.named_modules()}
    blocks = list(backbone.blocks)
    if config.blocks != "all":
        blocks = blocks[-config.blocks :]
    inside = [module for block in blocks for module in block.modules()]
    fused = [module for module in inside if isinstance(module, nn.MultiheadAttention)]
    covered = {id(part) for module in fused for part in module.modules()}
    linear = [module for module in inside if isinstance(module, nn.Linear) and id(module) not in covered]
    targets = [names[id(module)] for module in fused + linear]
    rank = automatic_rank(backbone, blocks) if config.rank == "auto" else config.rank
    lora = PeftConfig(r=rank, lora_alpha=config.alpha, target_modules=targets)  # pyright: ignore
    inject_adapter_in_model(lora, backbone.model)


def automatic_rank(backbone: Backbone, blocks: Sequence[nn.Module]) -> int:
    """Returns the largest rank at which adapters have at most `LORA_SHARE` of the model's weights.

    A matrix of the blocks costs its rows and columns for each rank.
    """
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2]
    each = sum(rows + columns for rows, columns in (matrix.shape for matrix in matrices))
    total = sum(parameter.numel() for parameter in backbone.model.parameters())
    return max(1, int(LORA_SHARE * total / each))
