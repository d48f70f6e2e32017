"""Which weights train, by role, and how they move: unlocking, LoRA, the optimizer and its schedule.

An adapter says which parameters are the position embedding or block 3 (`Backbone.roles`). Nothing here
matches parameter names. PEFT injects LoRA into the model in place. LoRA is merged into the weights before
anything is saved.
"""

import logging
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.config import DistillConfig, OptimConfig, UnlockConfig
from phreg.data.crops import Order
from phreg.errors import ConfigError
from phreg.training.task import RetrofitTask

logger = logging.getLogger(__name__)


def unlock(backbone: Backbone, config: UnlockConfig) -> dict[str, nn.Parameter]:
    """Freezes a model except its registers and the configured roles, and injects LoRA if configured.

    Returns:
        The parameters that train, by name in `backbone`.

    Raises:
        ConfigError: A role does not exist for this model, or nothing is left to train.
    """
    names = {name for role in expand_roles(backbone, config.roles) for name in backbone.roles()[role]}
    chosen = {id(backbone.model.get_parameter(name)) for name in names}
    if config.lora.rank is not None:
        _inject_lora(backbone, config)
    trained = {}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(id(parameter) in chosen or "lora_" in name)
        if parameter.requires_grad:
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
    Order(num_images, config.batch_size, world_size=processes)
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
        elif role in known:
            expanded.append(role)
        else:
            blocks = f"block.0 to block.{depth - 1}, block.-{depth} to block.-1, blocks"
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


def merge_lora(backbone: Backbone) -> None:
    """Merges LoRA into the weights and removes it. Models without LoRA stay unchanged."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    def outermost() -> tuple[str, BaseTunerLayer] | None:
        named = backbone.model.named_modules()
        return next(((name, module) for name, module in named if isinstance(module, BaseTunerLayer)), None)

    while (found := outermost()) is not None:
        name, layer = found
        # Fused attention is unwrapped by PEFT itself: its output projection is wrapped a second time inside.
        unload = getattr(layer, "unload_and_optionally_merge_module", None)
        if unload is not None:
            plain = unload(merge=True, safe_merge=True, adapter_names=None)
        else:
            layer.merge(safe_merge=True)
            plain = layer.get_base_layer()
        backbone.model.set_submodule(name, plain)


def optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """Makes the optimizer with one group: weight decay applies to everything that trains, as in the paper."""
    values = list(parameters.values())
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

    @torch.no_grad()
    def apply(self) -> None:
        """Replaces the weights by the average."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.average[name])


def _inject_lora(backbone: Backbone, config: UnlockConfig) -> None:
    """Puts adapters on every linear layer and attention projection of the last blocks."""
    from peft import LoraConfig, inject_adapter_in_model

    names = {id(module): name for name, module in backbone.model.named_modules()}
    inside = [module for block in list(backbone.blocks)[-config.lora.blocks :] for module in block.modules()]
    fused = [module for module in inside if isinstance(module, nn.MultiheadAttention)]
    covered = {id(part) for module in fused for part in module.modules()}
    linear = [module for module in inside if isinstance(module, nn.Linear) and id(module) not in covered]
    targets = [names[id(module)] for module in fused + linear]
    lora = LoraConfig(r=config.lora.rank or 1, lora_alpha=config.lora.alpha, target_modules=targets)  # pyright: ignore
    inject_adapter_in_model(lora, backbone.model)
