"""What the checks look at a model with: all its outputs, its registers masked or moved, their gradient."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.testing.expectations import expect
from phreg.tokens import TokenLayout


@torch.no_grad()
def native_outputs(backbone: Backbone, images: Float[Tensor, "batch 3 height width"]) -> dict[str, Tensor]:
    """Collects every tensor that a user of the model's library gets to see, by name.

    The pooled output; from transformers, what the vision model returns with its hidden states, as an object
    and as a tuple; from timm and open_clip, `forward_intermediates`. Random choices, such as a masked
    autoencoder's, are made alike.
    """
    outputs: dict[str, Any] = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outputs["run"], call = _outermost_call(backbone, images)
        if call is not None:
            module, args, kwargs = call
            for form, keywords in (("object", {"return_dict": True}), ("tuple", {"return_dict": False})):
                torch.manual_seed(0)
                outputs[form] = module(*args, **kwargs | keywords | {"output_hidden_states": True})
        elif backbone.spec.library != "transformers" and images.shape[-2:] == backbone.spec.input_size:
            native: Any = backbone.model
            outputs["intermediates"] = native.forward_intermediates(images, intermediates_only=True)
    return dict(_tensors("", outputs))


@contextmanager
def registers_masked(backbone: Backbone, images: Float[Tensor, "batch 3 height width"]) -> Iterator[None]:
    """Hides the registers from all attention over images of this size, as if they were not there.

    Attention is caught at `torch.nn.functional.scaled_dot_product_attention`: wherever there are as many
    keys as the patched model has tokens, the registers' scores become minus infinity.

    Raises:
        AssertionError: Nothing was caught: the model computes attention in another way.
    """
    layout, attention, caught = backbone.layout(images), nn.functional.scaled_dot_product_attention, []

    def masked(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if key.shape[-2] == layout.num_tokens:
            caught.append(True)
            attn_mask = _without_registers(query, attn_mask, layout)
        return attention(query, key, value, attn_mask, *args, **kwargs)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(
        False
    )  # on which nn.MultiheadAttention would go past the function
    try:
        with mock.patch.object(nn.functional, "scaled_dot_product_attention", masked):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    expect(
        bool(caught),
        "law 3",
        "no attention over all tokens went through torch's scaled_dot_product_attention",
    )


def _without_registers(query: Tensor, attn_mask: Tensor | None, layout: TokenLayout) -> Tensor:
    """Adds the registers' columns to an attention mask, boolean or additive."""
    hidden = torch.zeros(layout.num_tokens, dtype=torch.bool, device=query.device)
    hidden[layout.num_prefix : layout.num_prefix + layout.num_registers] = True
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        return attn_mask & ~hidden
    additive = torch.zeros(layout.num_tokens, dtype=query.dtype, device=query.device).masked_fill(
        hidden, float("-inf")
    )
    return additive.expand(query.shape[-2], -1) if attn_mask is None else attn_mask + additive


def _outermost_call(
    backbone: Backbone, images: Tensor
) -> tuple[Tensor, tuple[nn.Module, tuple[Any, ...], dict[str, Any]] | None]:
    """Runs the model and finds how the outermost transformers model was called that took part, if any did."""
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    # Of transformers' modules, those with a configuration and several outputs are the ones that users call.
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: (
                calls.append((module, args, kwargs)) if isinstance(output, Mapping) else None
            ),
            with_kwargs=True,
        )
        for module in backbone.model.modules()
        if backbone.spec.library == "transformers" and hasattr(module, "config")
    ]
    try:
        pooled = backbone.run(images)
    finally:
        for handle in handles:
            handle.remove()
    return pooled, calls[-1] if calls else None


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Walks through nested outputs."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}[{index}]", item)


@torch.no_grad()
def first_block_input(backbone: Backbone, images: Tensor) -> Tensor:
    """Runs the model and returns the tokens that its first block receives."""
    found: list[Tensor] = []
    # Registered last, so it sees what any hook that inserts registers has made.
    handle = backbone.blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        backbone.run(images)
    finally:
        handle.remove()
    return found[0]


@torch.no_grad()
def move_registers(backbone: Backbone) -> None:
    """Adds noise to the registers, in place."""
    registers = _registers(backbone)
    noise = torch.randn(registers.shape, generator=torch.Generator().manual_seed(2))
    registers.add_(noise.to(registers))


def register_gradient(backbone: Backbone, images: Tensor, law: str) -> Tensor:
    """Takes the gradient of a random mixture of all outputs; (registers, width)."""
    registers = _registers(backbone).requires_grad_(True)
    registers.grad = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = backbone(images)
        loss = torch.stack([(torch.randn_like(tensor) * tensor).sum() for tensor in features]).sum()
    loss.backward()
    if registers.grad is None:
        raise AssertionError(f"{law} is broken: the registers receive no gradient")
    return registers.grad[0]


def _registers(backbone: Backbone) -> nn.Parameter:
    """Finds the registers of a patched model."""
    if backbone.registers is None:
        raise AssertionError("law 2 is broken: a patched model names no parameter as its registers")
    return backbone.registers


def enable_checkpointing(model: nn.Module) -> None:
    """Turns gradient checkpointing on, by the name that the model's library has for it, if it has any."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "set_grad_checkpointing")
    for name in [name for name in names if hasattr(model, name)][:1]:
        getattr(model, name)()


class RunModule(nn.Module):
    """A backbone's `run` as a module's `forward`, for the compilers."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Computes the pooled output."""
        return self.backbone.run(images)
