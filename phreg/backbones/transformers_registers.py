"""Registers in a vision tower of transformers: a child that holds them, hooks that let them in and out.

    tower ─LinkRegisters─┐
    embeddings ─► InsertRegisters ─► (pre-norm) ─► block 0 … block N ─► Strip ─► norm, pooler, heads
                                                    └ PadMask, each       └► StripStates: hidden_states

Hidden states are handed out without registers. Where gradients are on and a call asks for hidden states,
`RouteStates` leads the sequence through what is handed out, so that gradients reach it:

    block k ─► tokens ─┬─► state, handed out ─┬─► block k + 1
                       └─► registers ─────────┘

Hooks are small objects, never closures or bound methods: a deep copy of the model copies them along. They
hold no module, and take what they need from the one that runs: PEFT puts a trainable copy in a module's
place, and DataParallel runs replicas with weights of their own. A patched model also saves itself in a format
of its own, which no stock loader takes for the unpatched model.
"""

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from phreg.backbones.base import NORMALISATION, TRAINED_READOUT, packed_types, unit_movers
from phreg.errors import PhregError
from phreg.record import RunRecord, write_record
from phreg.storage import ADAPTER_FILE, FORMAT_VERSION, MODEL_FORMAT, MODEL_TENSORS, write_file, writing

REMOTE_CLASS, REMOTE_MODEL_TYPE = "Registers", "registers_"
"""What a stock class's name and its model type open with in the code of a remote-code export."""

REFUSAL = "registers, which take trust_remote_code=True"
"""What stock classes, which would leave the registers out, say as they refuse a remote-code export."""

REGISTERS = "registers"
"""Name of the child that a patched tower has."""

HANDLES = "phreg_hooks"
"""Attribute of a patched tower that keeps the hooks' handles, for taking them off again."""

RUNNING = "phreg_running_registers"
"""Attribute of the module before which registers come in: those to insert, in a tuple, so that they are no
child of it."""

LONGER_MASK = "phreg_longer_mask"
"""Attribute of a mask of flex_attention that keeps the one with room for registers, for all blocks."""

STATE = "phreg_hidden_state"
"""Attribute of a sequence with registers that holds the hidden state that it was made of."""


class Registers(nn.Module):
    """Register tokens, and where in a sequence they belong.

    Args:
        tokens: Initial values, copied.
        num_prefix: Tokens of the sequence that stay in front.
    """

    def __init__(self, tokens: Float[Tensor, "registers width"], num_prefix: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens.detach().clone()[None])
        self.num_prefix = num_prefix

    def forward(self, sequence: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch longer width"]:
        """Inserts the registers into a sequence."""
        # Of its type, and where it lies: a model's embeddings and blocks may be on different devices.
        registers = self.tokens.to(sequence).expand(sequence.shape[0], -1, -1)
        before, after = sequence[:, : self.num_prefix], sequence[:, self.num_prefix :]
        return torch.cat([before, registers, after], dim=1)


@dataclass(frozen=True)
class RegisterSpan:
    """Where registers are in a sequence: after `start` tokens, `count` of them."""

    start: int
    count: int

    def take_out(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch shorter width"]:
        """Takes a sequence without its registers."""
        return torch.cat([tokens[:, : self.start], tokens[:, self.start + self.count :]], dim=1)

    def open_up(self, shorter: Tensor, dim: int, filling: Tensor) -> Tensor:
        """Makes room for the registers along one axis of a mask or a sequence."""
        before, after = shorter.split([self.start, shorter.shape[dim] - self.start], dim)
        return torch.cat([before, filling, after], dim)


@dataclass(frozen=True)
class LinkRegisters:
    """A forward pre-hook on a tower that links the module before which registers come in to its registers.

    It finds both by name on the tower that runs.
    """

    first_block_input: str

    def __call__(self, tower: nn.Module, _args: Any) -> None:
        """Links them where they are not linked yet."""
        first_block_input, registers = tower.get_submodule(self.first_block_input), getattr(tower, REGISTERS)
        if getattr(first_block_input, RUNNING)[0] is not registers:
            setattr(first_block_input, RUNNING, (registers,))


@dataclass(frozen=True)
class InsertRegisters:
    """A forward pre-hook that lets in the registers that `LinkRegisters` linked to the module that runs."""

    def __call__(self, first_block_input: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Replaces the first argument, a sequence, by one with registers."""
        (registers,) = getattr(first_block_input, RUNNING)
        return (registers(args[0]), *args[1:])


@dataclass(frozen=True)
class Strip:
    """A forward hook that takes registers out of the last block's output."""

    span: RegisterSpan

    def __call__(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Replaces the output."""
        return self.span.take_out(output)


@dataclass(frozen=True)
class TellBlocks:
    """A forward pre-hook on the module that returns hidden states: tells blocks if the config asks for some.

    What a call asks for, transformers hands down to the blocks itself.
    """

    def __call__(self, collector: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Adds `output_hidden_states` to the keywords."""
        asked = kwargs.get("output_hidden_states", getattr(collector.config, "output_hidden_states", False))
        return (args, kwargs | {"output_hidden_states": asked}) if asked else None


@dataclass(frozen=True)
class RouteStates:
    """A hook that makes the sequence of the hidden state that is handed out, so that gradients reach that.

    It is a forward pre-hook on the first block and a forward hook on all but the last, and does nothing
    unless gradients are on and the call asks for hidden states. No value changes.
    """

    span: RegisterSpan

    def __call__(self, _block: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        """Replaces the sequence: the output, or the first argument."""
        tokens = args[0] if output is None else output
        # What a compiler makes of a model is one step to autograd, registers or not.
        if not (kwargs.get("output_hidden_states") and tokens.requires_grad) or torch.compiler.is_compiling():
            return None
        state = self.span.take_out(tokens)
        registers = tokens[:, self.span.start : self.span.start + self.span.count]
        routed = self.span.open_up(state, 1, registers)
        setattr(routed, STATE, state)
        return routed if output is not None else ((routed, *args[1:]), kwargs)


@dataclass(frozen=True)
class StripStates:
    """A forward hook that takes registers out of the hidden states of a model's output, object or tuple.

    The last of them was collected behind `Strip`, and has none.
    """

    span: RegisterSpan

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """Replaces hidden states in the output."""
        if isinstance(output, tuple):
            return tuple(self._strip(item) if _are_states(item) else item for item in output)
        if output.get("hidden_states") is not None:
            output["hidden_states"] = self._strip(output["hidden_states"])
        return output

    def _strip(self, states: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        # None stands for a state that the caller did not ask for.
        inner = (None if state is None else self._strip_one(state) for state in states[:-1])
        return (*inner, *states[-1:])

    def _strip_one(self, state: Tensor) -> Tensor:
        routed = getattr(state, STATE, None)
        return self.span.take_out(state) if routed is None else routed


def _are_states(item: Any) -> bool:
    """Tells hidden states (batch, tokens, width) from attention maps (batch, heads, queries, keys).

    A fused kernel gives no maps, and an empty tuple in their place; nothing is to be taken out of it.
    """
    return isinstance(item, tuple) and all(state is None or state.dim() == 3 for state in item)


@dataclass(frozen=True)
class PadMask:
    """A forward pre-hook that makes room for registers in a block's attention mask, where there is one.

    Every token may attend to registers, and registers to whatever some token may attend to.
    """

    span: RegisterSpan

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replaces the mask, the second argument or `attention_mask`."""
        if len(args) > 1 and args[1] is not None:
            return (args[0], self._pad(args[1]), *args[2:]), kwargs
        if kwargs.get("attention_mask") is not None:
            return args, kwargs | {"attention_mask": self._pad(kwargs["attention_mask"])}
        return None

    def _pad(self, mask: Any) -> Any:
        if isinstance(mask, BlockMask):
            return self._pad_blocks(mask)
        if not isinstance(mask, Tensor):
            raise PhregError(
                f"a model with registers was run with a {type(mask).__name__} as attention mask, which "
                'cannot be made longer; call model.set_attn_implementation("sdpa") first'
            )
        count = self.span.count
        if mask.dim() == 4 and mask.shape[-2] > 1:  # (batch, heads, queries, keys)
            mask = self.span.open_up(mask, -2, mask.amax(-2, keepdim=True).expand(-1, -1, count, -1))
        seen = 0 if mask.is_floating_point() else 1  # added to scores, or a flag
        return self.span.open_up(mask, -1, mask.new_full((*mask.shape[:-1], count), seen))

    def _pad_blocks(self, mask: BlockMask) -> BlockMask:
        """Makes a longer mask for flex_attention, once for all blocks."""
        longer: dict[RegisterSpan, BlockMask] = vars(mask).setdefault(LONGER_MASK, {})
        if self.span not in longer:
            batch, heads = mask.kv_num_blocks.shape[:2]
            device = mask.kv_num_blocks.device
            seen = self._pad(create_mask(mask.mask_mod, batch, heads, *mask.seq_lengths, device=device))
            # A mask for all images, or all heads, has one row for them.
            images, heads_apart = int(batch > 1), int(heads > 1)
            longer[self.span] = create_block_mask(
                lambda image, head, query, key: seen[image * images, head * heads_apart, query, key],
                *(batch, heads, *seen.shape[-2:]),
                device=device,
            )
        return longer[self.span]


@dataclass(frozen=True)
class RefuseStockSaving:
    """A hook on registers that keeps them out of the file of a model around the one that was patched.

    That model does not know of them, and saves itself by transformers' own `save_pretrained`, as stock.
    """

    def __call__(self, _registers: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """Looks at who collects the tensors.

        Raises:
            PhregError: It is that `save_pretrained`.
        """
        frame = inspect.currentframe()
        while frame is not None and frame.f_code is not PreTrainedModel.save_pretrained.__code__:
            frame = frame.f_back
        if frame is not None:
            raise PhregError(
                f"asked to save {type(frame.f_locals['self']).__name__}, whose vision tower was given "
                "registers by itself, and they would be lost on loading; write it by phreg.export(model, "
                'folder, format="merged"), or save the tower alone, or add registers to the whole model'
            )


def attach(
    tower: nn.Module,
    registers: Registers,
    first_block_input: nn.Module,
    blocks: Sequence[nn.Module],
    collector: nn.Module,
) -> None:
    """Gives a tower its registers, and the hooks that let them in and out.

    Args:
        tower: The module that turns pixels into tokens.
        registers: Become its child.
        first_block_input: The module before which they come in: the pre-norm, or the first block.
        blocks: The transformer blocks, first to last.
        collector: The module that returns hidden states.
    """
    tower.add_module(REGISTERS, registers)
    setattr(first_block_input, RUNNING, (registers,))
    path = next(name for name, module in tower.named_modules() if module is first_block_input)
    span = RegisterSpan(registers.num_prefix, registers.tokens.shape[1])
    vars(tower)[HANDLES] = [
        tower.register_forward_pre_hook(LinkRegisters(path)),
        first_block_input.register_forward_pre_hook(InsertRegisters()),
        # Ahead of the hooks that collect hidden states, which come with the first call that wants some.
        blocks[-1].register_forward_hook(Strip(span), prepend=True),
        collector.register_forward_pre_hook(TellBlocks(), with_kwargs=True),
        collector.register_forward_hook(StripStates(span)),
        *(block.register_forward_pre_hook(PadMask(span), with_kwargs=True) for block in blocks),
        blocks[0].register_forward_pre_hook(RouteStates(span), with_kwargs=True),
        *(
            block.register_forward_hook(RouteStates(span), with_kwargs=True, prepend=True)
            for block in blocks[:-1]
        ),
    ]


def detach(tower: nn.Module, first_block_input: nn.Module) -> None:
    """Takes off a tower all that `attach` gave it."""
    for handle in vars(tower).pop(HANDLES):
        handle.remove()
    delattr(first_block_input, RUNNING)
    delattr(tower, REGISTERS)


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


@dataclass(frozen=True, repr=False)
class SavePatched:
    """Stands in for `save_pretrained` on a patched model, and so for `push_to_hub`, which calls it.

    A model keeps it when its tower's registers were removed through the tower alone; it then does what was
    there before.
    """

    model: PreTrainedModel
    tower: nn.Module

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Writes the model with `save_patched`; transformers' other options have no meaning there.

        Raises:
            PhregError: `push_to_hub` is set, or the model cannot be saved so.
        """
        if not hasattr(self.tower, REGISTERS):
            tensors = None if state_dict is None else dict(state_dict)
            type(self.model).save_pretrained(
                self.model, save_directory, is_main_process, tensors, push_to_hub, **options
            )
            return
        if push_to_hub:
            raise PhregError(
                f"save_pretrained(push_to_hub=True) asked of {type(self.model).__name__} with registers, "
                "which saves in a format of its own; call push_to_hub(repo_id) on the model instead"
            )
        if is_main_process:
            save_patched(self.model, Path(save_directory), state_dict)


def save_patched(
    model: PreTrainedModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a patched model so that no stock loader can load it without its registers.

    First `phreg.safetensors` (all tensors, named as on the hub), then `phreg.json` (class, config, number of
    registers), each atomically.

    Args:
        model: A model with registers.
        folder: Folder to write into; created where missing.
        state_dict: Tensors to write in place of the model's own.

    Raises:
        PhregError: The model has no registers or test-time ones, or tensors without values, or `state_dict`
            lacks some, or the folder holds a stock model, which would be taken for it, or cannot be written.
    """
    registers = _registers_to_save(model, folder)
    own = model.state_dict()
    lacking = sorted(own.keys() - (own if state_dict is None else state_dict).keys())
    if lacking:
        raise PhregError(
            f"asked to save {type(model).__name__} with registers by a state_dict that lacks {len(lacking)} "
            f"of its tensors, such as {lacking[0]}, so that it could not be loaded again; give all of them, "
            "or leave state_dict out"
        )
    tensors = disk_names(model, own if state_dict is None else state_dict)
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise PhregError(
            f"asked to save {type(model).__name__} with registers, of which {len(empty)} tensors, such as "
            f"{empty[0]}, have no values: it is on the meta device, or accelerate has offloaded it; save it "
            "before that, or bring offloaded values back first, by "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    # Copies, since tied weights are two names of one tensor, which safetensors does not write.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    record = RunRecord(
        format=MODEL_FORMAT,
        format_version=FORMAT_VERSION,
        model_class=type(model).__name__,
        registers=registers.tokens.shape[1],
        **dict(zip(("mean", "std"), vars(model).get(NORMALISATION, ()), strict=False)),
        library="transformers",
        config=json.loads(model.config.to_json_string(use_diff=False)),
        readout=vars(model).get(TRAINED_READOUT, "plain"),
        versions={name: version(name) for name in ("torch", "transformers")},
    )
    with writing(folder, "free space, or give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / MODEL_TENSORS, lambda path: save_file(plain, path, metadata={"format": "pt"}))
        write_record(folder / ADAPTER_FILE, record.with_sums(plain))


def _registers_to_save(model: PreTrainedModel, folder: Path) -> Registers:
    """Finds a model's registers, and refuses what could not be loaded again as it is.

    Raises:
        PhregError: See `save_patched`.
    """
    registers = next((module for module in model.modules() if isinstance(module, Registers)), None)
    if registers is None:
        raise PhregError(
            f"asked to save {type(model).__name__}, part of a model whose registers lie outside of it; "
            "save the whole model"
        )
    packed = packed_types(model)
    if packed:
        raise PhregError(
            f"asked to save {type(model).__name__} with registers, whose weights are quantised "
            f"({', '.join(packed)}) and cannot be built again from phreg's format; save the model before it "
            "is quantised, or share its adapter, which phreg.load(adapter, into=model) puts onto the base"
        )
    if unit_movers(model):
        raise PhregError(
            f"asked to save {type(model).__name__} with test-time registers, whose hooks are no weights and "
            'would be lost; share the adapter of phreg.distill(method="test-time"), which phreg.load reads'
        )
    stock = [
        name for name in ("config.json", "model.safetensors", "pytorch_model.bin") if (folder / name).exists()
    ]
    if stock:
        raise PhregError(
            f"asked to save a model with registers to {folder}, which holds {', '.join(stock)} of a model "
            "without; give another folder"
        )
    return registers


def disk_names(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames, and where transformers does so joins, a model's tensors to those that it writes to disk."""
    return revert_weight_conversion(model, dict(tensors))
