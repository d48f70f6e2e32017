"""The weights that train, spread over processes (FSDP2), for models of which all blocks train.

Student and teacher share what does not train, so a process holds the model once. What trains costs about five
times its size more: a copy, gradients, Adam's two averages, the best state. FSDP spreads that alone. Before a
block runs its trained weights are gathered, and dropped after it:

    frozen, shared with the teacher     whole in each process
    trained: weights, gradients, Adam   1 / processes in each, gathered block by block

Names, checkpoints and results are those of unsharded runs. Forward and backward passes of the student become
collective: all processes make the same number of them.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _composable_state
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from phreg.backbones.base import Backbone, Features
from phreg.errors import PhregError


class ShardedStudent(nn.Module):
    """A student whose trained weights are sharded, under autocast as a run asks for.

    Args:
        student: The student, as it trains. Until `gather` it is called through this.
        trained: The parameters that train, by name in `student`.
        bf16: Whether forward passes run under bf16 autocast.
        reshard: Drop gathered weights after the forward pass, and gather them again in the backward pass.

    Attributes:
        trained: The shards that train, by name.

    Raises:
        PhregError: LoRA is in fused attention.
    """

    def __init__(
        self,
        student: Backbone,
        trained: Mapping[str, nn.Parameter],
        *,
        bf16: bool = False,
        reshard: bool = True,
    ) -> None:
        super().__init__()
        _refuse_fused_lora(student)
        self._student = [student]  # in a list, so that it is no submodule
        self._bf16 = bf16
        self._before = [_note(module) for module in student.modules()]
        chosen = {id(parameter) for parameter in trained.values()}
        ignored = {parameter for parameter in student.parameters() if id(parameter) not in chosen}
        # The last block goes with what is outside of blocks, as some read-outs take it apart.
        for module in (*list(student.blocks)[:-1], student):
            if any(id(parameter) in chosen for parameter in module.parameters()):
                fully_shard(module, reshard_after_forward=reshard, ignored_params=ignored)
        self._whole = dict(trained)
        for parameter in trained.values():
            parameter.data = parameter.data.new_empty(0)  # the shards have the values
        self.trained = {name: student.get_parameter(name) for name in trained}

    def forward(self, *arguments: Any) -> Features:
        """Runs the student; its features are fp32."""
        (student,) = self._student
        with (
            torch.autocast(student.device.type, torch.bfloat16, enabled=self._bf16),
            warnings.catch_warnings(),
        ):
            # That outputs are views: nothing here changes them in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
            features = student(*arguments)
        return Features(*(tensor.float() for tensor in features))

    @torch.no_grad()
    def gather(self) -> None:
        """Makes the student what it was, with its trained weights whole. All processes do so together."""
        gathered = {name: whole(shard.detach()) for name, shard in self.trained.items()}
        for undo in self._before:
            undo()
        for name, parameter in self._whole.items():
            parameter.data = gathered[name]


def _note(module: nn.Module) -> Callable[[], None]:
    """Notes what sharding changes of a module; returns what puts it back."""
    kind, keys, parameters = type(module), set(vars(module)), dict(module._parameters)
    hooks = {name: dict(value) for name, value in vars(module).items() if name.startswith("_forward_")}

    def undo() -> None:
        module.__class__ = kind
        for key in vars(module).keys() - keys:
            if key in _composable_keys(module):
                del module.__dict__[key]
        for name, value in hooks.items():
            getattr(module, name).clear()
            getattr(module, name).update(value)
        module._parameters.clear()
        module._parameters.update(parameters)
        _composable_state._module_state_mapping.pop(module, None)

    return undo


def _composable_keys(module: nn.Module) -> set[str]:
    """Finds under which names torch's composable parallelism notes itself in a module."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    return {key for key in vars(module) if key in (REGISTRY_KEY, STATE_KEY)}


def _refuse_fused_lora(student: Backbone) -> None:
    fused = [module for block in student.blocks for module in block.modules()]
    adapted = [
        module for module in fused if isinstance(getattr(module, "base_layer", None), nn.MultiheadAttention)
    ]
    if adapted:
        raise PhregError(
            f"accelerate is configured for FSDP, and {student.describe()} has LoRA in fused attention, which "
            "writes weights at each forward; train whole blocks (--unlock.roles), or leave out --use_fsdp"
        )


def whole(tensor: Tensor) -> Tensor:
    """Puts the shards of a tensor together, on all processes; other tensors are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, value: Tensor) -> None:
    """Writes a whole value into a tensor, or each process its shard of it."""
    tensor.copy_(like(value, tensor))


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Shards a whole value as a tensor of its shape is; where that is none, the value is as it was."""
    if not isinstance(tensor, DTensor) or value.shape != tensor.shape:
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def is_sharded(backbone: nn.Module) -> bool:
    """Whether a backbone's trained weights are sharded at the moment."""
    return isinstance(backbone, FSDPModule)


@contextmanager
def outer_weights(backbone: nn.Module) -> Iterator[None]:
    """Gathers the trained weights outside of the blocks, where parts of a backbone are run by themselves."""
    if isinstance(backbone, FSDPModule):
        backbone.unshard()
        try:
            yield
        finally:
            backbone.reshard()
    else:
        yield
