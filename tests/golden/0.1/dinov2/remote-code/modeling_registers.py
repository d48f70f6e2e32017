"""Dinov2Model with 2 register tokens: the code beside the weights, for trust_remote_code.

Written by phreg 0.1.0, which is licensed under Apache-2.0, and so is this file. Registers take part in
attention inside the block stack and are seen nowhere else: inputs and outputs are those of the stock class.
It needs transformers alone, 5 or newer: AutoModel.from_pretrained(folder, trust_remote_code=True).
Dinov2Model itself, which has no place for registers, refuses the config.

    embeddings -> registers in -> (pre-norm) -> blocks -> registers out -> norm, pooler, heads
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

REFUSAL = "registers, which take trust_remote_code=True"
REGISTERS = "registers"
HANDLES = "phreg_hooks"


class Registers(nn.Module):
    """Register tokens, and where in a sequence they belong.

    Args:
        tokens: Initial values, copied.
        num_prefix: Tokens of the sequence that stay in front.
    """

    def __init__(self, tokens: Tensor, num_prefix: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens.detach().clone()[None])
        self.num_prefix = num_prefix

    def forward(self, sequence: Tensor) -> Tensor:
        """Inserts the registers into a sequence."""
        registers = self.tokens.to(sequence.dtype).expand(sequence.shape[0], -1, -1)
        before, after = sequence[:, : self.num_prefix], sequence[:, self.num_prefix :]
        return torch.cat([before, registers, after], dim=1)


@dataclass(frozen=True)
class Place:
    """Where registers are in a sequence: after `start` tokens, `count` of them."""

    start: int
    count: int

    def take_out(self, tokens: Tensor) -> Tensor:
        """Takes a sequence without its registers."""
        return torch.cat([tokens[:, : self.start], tokens[:, self.start + self.count :]], dim=1)

    def open_up(self, mask: Tensor, dim: int, filling: Tensor) -> Tensor:
        """Makes room for the registers along one axis of a mask."""
        before, after = mask.split([self.start, mask.shape[dim] - self.start], dim)
        return torch.cat([before, filling, after], dim)


@dataclass(frozen=True, repr=False)
class Insert:
    """A forward pre-hook that lets registers in; it looks them up by name on the tower at every call."""

    tower: nn.Module

    def __call__(self, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replaces the first argument, a sequence, by one with registers."""
        registers = cast(nn.Module, getattr(self.tower, REGISTERS))
        return (registers(args[0]), *args[1:])


@dataclass(frozen=True)
class Strip:
    """A forward hook that takes registers out of the last block's output."""

    place: Place

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Replaces the output."""
        return self.place.take_out(output)


@dataclass(frozen=True)
class StripStates:
    """A forward hook that takes registers out of the hidden states of a model's output, object or tuple.

    The last of them was collected behind `Strip`, and has none.
    """

    place: Place

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Replaces hidden states in the output."""
        if isinstance(output, tuple):
            return tuple(self._strip(item) if _are_states(item) else item for item in output)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = self._strip(output["hidden_states"])
        return output

    def _strip(self, states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        *inner, last = states
        # None stands for a state that the caller did not ask for.
        return (*(None if state is None else self.place.take_out(state) for state in inner), last)


def _are_states(item: Any) -> bool:
    """Tells hidden states (batch, tokens, width) from attention maps (batch, heads, queries, keys)."""
    return isinstance(item, tuple) and all(state is None or state.dim() == 3 for state in item)


@dataclass(frozen=True)
class PadMask:
    """A forward pre-hook that makes room for registers in a block's attention mask, where there is one.

    Every token may attend to registers, and registers to whatever some token may attend to.
    """

    place: Place

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the mask, the second argument or `attention_mask`."""
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._pad(args[1]), *args[2:]), kwargs
        if kwargs.get("attention_mask") is not None:
            return args, kwargs | {"attention_mask": self._pad(kwargs["attention_mask"])}
        return None

    def _pad(self, mask: Any) -> Tensor:
        if not isinstance(mask, Tensor):
            raise ValueError(
                f"a model with registers was run with a {type(mask).__name__} as attention mask, which "
                'cannot be made longer; call model.set_attn_implementation("sdpa") first'
            )
        count = self.place.count
        if mask.dim() == 4 and mask.shape[-2] > 1:  # (batch, heads, queries, keys)
            mask = self.place.open_up(mask, -2, mask.amax(-2, keepdim=True).expand(-1, -1, count, -1))
        seen = 0 if mask.is_floating_point() else 1  # added to scores, or a flag
        return self.place.open_up(mask, -1, mask.new_full((*mask.shape[:-1], count), seen))


def attach(
    tower: nn.Module,
    registers: Registers,
    entrance: nn.Module,
    blocks: Sequence[nn.Module],
    collector: nn.Module,
) -> None:
    """Gives a tower its registers, and the hooks that let them in and out.

    Args:
        tower: The module that turns pixels into tokens.
        registers: Become its child.
        entrance: The module before which they come in: the pre-norm, or the first block.
        blocks: The transformer blocks, first to last.
        collector: The module that returns hidden states.
    """
    tower.add_module(REGISTERS, registers)
    place = Place(registers.num_prefix, registers.tokens.shape[1])
    vars(tower)[HANDLES] = [
        entrance.register_forward_pre_hook(Insert(tower)),
        # Ahead of the hooks that collect hidden states, which come with the first call that wants some.
        blocks[-1].register_forward_hook(Strip(place), prepend=True),
        collector.register_forward_hook(StripStates(place)),
        *(block.register_forward_pre_hook(PadMask(place), with_kwargs=True) for block in blocks),
    ]


def with_refusal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the config of a model with registers one that its stock class does not take.

    Beside the number in a field of the vision tower's config, its own or inside of it, stands the reason, and
    configs of transformers check the types of their fields. Trainer, which reads the file as the config of no
    model in particular, has no such field.
    """
    if "vision_config" in config:
        return {**config, "vision_config": with_refusal(config["vision_config"])}
    return {**config, "num_channels": [config["num_channels"], REFUSAL]}


def without_refusal(config: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `with_refusal`; a config without a refusal is copied."""
    value = config.get("num_channels")
    if isinstance(config.get("vision_config"), dict):
        return {**config, "vision_config": without_refusal(config["vision_config"])}
    return {**config, "num_channels": value[0]} if isinstance(value, list) else dict(config)


class RegistersDinov2Config(Dinov2Config):
    """The config of Dinov2Model, and how many registers it has."""

    model_type = "registers_dinov2"
    num_registers: int = 2

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        return super().from_dict(without_refusal(config_dict), **kwargs)

    def to_json_string(self, *args, **kwargs):
        config = json.loads(super().to_json_string(*args, **kwargs))
        return json.dumps(with_refusal(config), indent=2, sort_keys=True) + "\n"


class RegistersDinov2Model(Dinov2Model):
    """Dinov2Model with registers."""

    config_class = RegistersDinov2Config

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        tower = self
        blocks = tower.get_submodule("encoder.layer")
        tokens = 0.02 * torch.randn(config.num_registers, tower.config.hidden_size)
        registers = Registers(tokens, num_prefix=1)
        attach(tower, registers, tower.get_submodule("encoder.layer.0"), blocks, tower.get_submodule("encoder"))
