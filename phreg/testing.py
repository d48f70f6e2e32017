"""The conformance suite: what every backbone must do, checked on one model.

An adapter is right when a model with registers behaves as the same model without them, wherever registers
are not meant to be seen. Each law of phreg that a single model can show is one short function here;
`check_backbone` runs them all on copies of the model and names the law that broke, and how.

    model ──copy──► original ─┐
          ──copy──► patched  ─┴─► native outputs: equal shapes always, equal values with registers masked

It says nothing about trained models, about exports or about speed.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from torch import Tensor, nn

from phreg.backbones.base import Backbone, Mlp
from phreg.backbones.resolve import adapt
from phreg.registers import add_registers, remove_registers
from phreg.tokens import TokenLayout

DenseReader = Callable[[nn.Module, Tensor], Tensor]

TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of a tensor, that counts as rounding.

A masked register adds exact zeros to the softmax, but the sums run over longer rows, so fp32 results differ
in their last bits (1e-7 a block), and massive activations pass some of that on to small values. A register
that leaks moves outputs by 1e-2.
"""
BF16_TOLERANCE = 0.1
"""Largest relative distance of bf16 from fp32 outputs: bf16 keeps 8 bits (0.4 %), each block adds some."""


@dataclass(frozen=True)
class Subject:
    """A model under test, and what it is tested with.

    Attributes:
        model: The model without registers; only copies of it are touched.
        images: Images of the size to test at.
        num_registers: How many registers to add.
        dense: How the model's library gives dense features, if it does.
    """

    model: nn.Module
    images: Float[Tensor, "batch 3 height width"]
    num_registers: int
    dense: DenseReader | None = None

    def original(self) -> Backbone:
        """Copies the model as it is."""
        return adapt(copy.deepcopy(self.model))

    def patched(self) -> Backbone:
        """Copies the model and adds registers."""
        return add_registers(self.original(), self.num_registers)


def check_backbone(
    model: nn.Module,
    *,
    size: int | tuple[int, int] | None = None,
    num_registers: int = 4,
    dense: DenseReader | None = None,
    compile: bool = False,
) -> None:
    """Checks that phreg handles a model as its laws say.

    Args:
        model: A model without phreg registers; it is not changed.
        size: Pixels to test at, a side or (height, width); None means the model's own.
        num_registers: Registers to add.
        dense: How the library itself gives dense features (batch, rows, cols, dim) after the final norm, from
            the model and images; None skips that comparison.
        compile: Also check torch.compile and torch.export, which take seconds to minutes.

    Raises:
        AssertionError: A law is broken; the message says which and how.
        UnsupportedModelError: phreg does not handle the model at all.
    """
    model = copy.deepcopy(model).eval()
    backbone = adapt(model)
    height, width = (size, size) if isinstance(size, int) else size or backbone.spec.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, height, width, generator=generator).to(backbone.device)
    subject = Subject(model, images, num_registers, dense)
    checks: list[Callable[[Subject], None]] = list(LAWS)
    if backbone.spec.any_size:
        checks.append(check_other_size)
    if compile:
        checks.append(check_compile)
    for check in checks:
        try:
            check(subject)
        except RuntimeError as error:
            raise AssertionError(f"{check.__name__} fails on {backbone.describe()}: {error}") from error


def check_roles(subject: Subject) -> None:
    """Roles name existing parameters, each once, and those of every block and of the registers completely."""
    for backbone in (subject.original(), subject.patched()):
        parameters, roles = dict(backbone.model.named_parameters()), backbone.roles()
        names = [name for role in roles.values() for name in role]
        _expect(
            set(names) <= set(parameters),
            "roles",
            f"these are no parameters: {sorted(set(names) - set(parameters))}",
        )
        twice = sorted({name for name in names if names.count(name) > 1})
        _expect(not twice, "roles", f"these parameters have two roles: {twice}")
        for index, block in enumerate(backbone.blocks):
            _expect_parameters(roles, f"block.{index}", parameters, set(block.parameters()))
        registers = set() if backbone.registers is None else {backbone.registers}
        _expect_parameters(roles, "registers", parameters, registers)


def check_zero_registers(subject: Subject) -> None:
    """Law 1: adding no registers changes no bit."""
    before, after = subject.original(), add_registers(subject.original(), 0)
    _expect_same_model(before, after, subject.images, "law 1 (0 registers change nothing)")


def check_removal(subject: Subject) -> None:
    """Law 1: removing registers is the exact inverse of adding them."""
    after = subject.patched()
    after.run(subject.images)
    remove_registers(after)
    _expect(
        after.num_registers == 0 and after.registers is None,
        "law 1 (removal)",
        f"{after.num_registers} registers remain",
    )
    _expect_same_model(subject.original(), after, subject.images, "law 1 (removal is an exact inverse)")


def check_order(subject: Subject) -> None:
    """Law 2: tokens lie as [prefix | registers | patches], and a patched model is known as one.

    Moving the registers must move exactly their own positions in what the first block receives.
    """
    backbone = subject.patched()
    found = adapt(backbone.model).num_registers
    _expect(
        found == subject.num_registers,
        "law 2",
        f"{found} registers found in a model with {subject.num_registers}",
    )
    layout = backbone.layout(subject.images)
    before = _first_block_input(backbone, subject.images)
    _move_registers(backbone)
    moved = (_first_block_input(backbone, subject.images) != before).any(-1).any(0)
    _expect(
        len(moved) == layout.num_tokens,
        "law 2 (order)",
        f"the first block receives {len(moved)} tokens, the layout says {layout.num_tokens}",
    )
    positions = moved.nonzero().flatten().tolist()
    # Where a class has native registers of its own, the parameter holds those too, in front of ours.
    last = layout.num_prefix + layout.num_registers
    _expect(
        positions == list(range(last - _rows(backbone), last)),
        "law 2 (order)",
        f"registers sit at positions {positions}, expected the last of the {last} before the patches",
    )


def check_hidden_outside(subject: Subject) -> None:
    """Law 2: outside the block stack nothing is longer than it was, in any form the library offers."""
    original = subject.original()
    expected = native_outputs(original, subject.images)
    # A library may install its own hooks at first use, so registers come once before and once after that.
    for patched in (subject.patched(), add_registers(original, subject.num_registers)):
        found = native_outputs(patched, subject.images)
        _expect(
            found.keys() == expected.keys(),
            "law 2 (registers stay inside)",
            f"outputs differ: {sorted(found.keys() ^ expected.keys())}",
        )
        for name, tensor in found.items():
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            _expect(
                shapes[0] == shapes[1],
                "law 2 (registers stay inside)",
                f"{name} has shape {shapes[0]}, was {shapes[1]}",
            )


def check_masked(subject: Subject) -> None:
    """Law 3: with the registers masked out of attention, every output equals the original model's."""
    expected, patched = native_outputs(subject.original(), subject.images), subject.patched()
    with registers_masked(patched, subject.images):
        found = native_outputs(patched, subject.images)
    for name, tensor in found.items():
        _expect_close(tensor, expected[name], "law 3 (masked registers have no influence)", name)


def check_disk_state(subject: Subject) -> None:
    """A model's tensors go out under the library's names and come back bit for bit."""
    backbone = subject.patched()
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    saved = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.add_(1)
    backbone.load_disk_state(saved)
    after = backbone.model.state_dict()
    lost = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    _expect(not lost, "disk state", f"load_disk_state(disk_state()) does not bring back {lost[:5]}")


def check_gradients(subject: Subject) -> None:
    """Law 8: every register receives a gradient."""
    backbone = subject.patched()
    gradient = _register_gradient(backbone, subject.images, "law 8 (gradients)")
    dead = (gradient[-subject.num_registers :] == 0).all(-1).nonzero().flatten().tolist()
    _expect(not dead, "law 8 (gradients)", f"the gradient of these registers is zero: {dead}")


@torch.no_grad()
def check_deepcopy(subject: Subject) -> None:
    """Law 8: a copy of a patched model is a model of its own."""
    backbone = subject.patched()
    before, twin = backbone.run(subject.images), adapt(copy.deepcopy(backbone.model))
    _expect(torch.equal(twin.run(subject.images), before), "law 8 (deepcopy)", "a copy's output differs")
    _move_registers(twin)
    _expect(
        not _same_patches(twin, backbone, subject.images),
        "law 8 (deepcopy)",
        "a copy does not use its own registers",
    )
    _expect(
        torch.equal(backbone.run(subject.images), before),
        "law 8 (deepcopy)",
        "a copy's registers change the original",
    )


@torch.no_grad()
def check_bf16(subject: Subject) -> None:
    """Law 8: a patched model works under bf16 autocast and with bf16 weights."""
    backbone = subject.patched()
    expected = backbone(subject.images)
    with torch.autocast(subject.images.device.type, torch.bfloat16):
        found = {"autocast": backbone(subject.images)}
    backbone.model.to(torch.bfloat16)
    found["weights"] = backbone(subject.images.to(torch.bfloat16))
    for how, features in found.items():
        for name in ("patches", "pooled"):
            reference = getattr(expected, name)
            distance = (getattr(features, name).float() - reference).norm() / reference.norm()
            _expect(
                bool(distance < BF16_TOLERANCE),
                f"law 8 (bf16 {how})",
                f"{name} lie {distance:.3g} from fp32, relative, more than {BF16_TOLERANCE}",
            )


def check_checkpointing(subject: Subject) -> None:
    """Law 8: gradient checkpointing changes no gradient."""
    backbone = subject.patched()
    backbone.model.train()
    law = "law 8 (gradient checkpointing)"
    expected = _register_gradient(backbone, subject.images, law)
    _enable_checkpointing(backbone.model)
    _expect_close(_register_gradient(backbone, subject.images, law), expected, law, "the registers' gradient")


@torch.no_grad()
def check_other_size(subject: Subject) -> None:
    """Law 8: an image of another size, and not square, keeps its grid and, registers masked, its features."""
    original, patched = subject.original(), subject.patched()
    (rows, cols), (high, wide) = (2, 3), original.spec.patch_size
    if original.spec.input_size == (rows * high, cols * wide):
        rows, cols = cols, rows
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, rows * high, cols * wide, generator=generator).to(subject.images)
    expected, free = original(images), patched(images)
    with registers_masked(patched, images):
        masked = patched(images)
    for features in (expected, free):
        found = tuple(features.patches.shape[1:3])
        _expect(
            found == (rows, cols), "law 8 (other sizes)", f"{rows}x{cols} patches in, a grid of {found} out"
        )
    for name in ("patches", "pooled"):
        _expect_close(getattr(masked, name), getattr(expected, name), "laws 3 and 8 (other sizes)", name)


@torch.no_grad()
def check_dense(subject: Subject) -> None:
    """The dense features of a model without registers are those its library gives, where it gives any."""
    if subject.dense is None:
        return
    backbone = subject.original()
    _expect_close(
        backbone(subject.images).patches,
        subject.dense(backbone.model, subject.images),
        "dense features",
        "patches",
    )


@torch.no_grad()
def check_mlp(subject: Subject) -> None:
    """The rows of a hidden unit are all that feeds it, and its column of `down` is all that it writes.

    Hidden units are watched where activation, and gate, put them out: what `down` receives, or the inner norm
    ahead of it, behind which units depend on each other. Zeroed rows make a unit one constant for all tokens
    (zero, where the activation of zero is zero or a gate multiplies); rows copied from another unit make it
    that unit, which they would not if one were missing; the others stay as they were. Scaling a column of
    `down` does to the block's output what scaling the unit in a hook on `down` does.
    """
    backbone = subject.patched()
    for index in range(len(backbone.blocks)):
        mlp = backbone.mlp(index)
        if mlp is not None:
            _check_units(backbone, subject.images, index, mlp)


def _check_units(backbone: Backbone, images: Tensor, index: int, mlp: Mlp) -> None:
    law = f"mlp (block {index})"

    def run(scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _hidden_units(backbone, images, index, mlp, scale)

    before, written = run()
    shape = (len(images), backbone.layout(images).num_tokens, mlp.num_units)
    _expect(before.shape == shape, law, f"hidden units have shape {tuple(before.shape)}, expected {shape}")
    # The most active, so that changes show.
    unit, other = before.abs().mean((0, 1)).topk(2).indices.split(1)
    rest = torch.ones(mlp.num_units, dtype=torch.bool, device=unit.device).index_fill(0, unit, False)
    rows = mlp.rows(unit)

    with _overwritten(rows, [torch.zeros_like(parameter[positions]) for parameter, positions in rows]):
        zeroed = run()[0]
    constant = bool((zeroed[..., unit] == zeroed[0, 0, unit]).all())
    _expect(constant, law, f"unit {unit.item()} still follows its input, with all its rows zero")
    _expect_close(zeroed[..., rest], before[..., rest], law, "what other units do, one unit's rows zero,")

    with _overwritten(rows, [parameter[positions] for parameter, positions in mlp.rows(other)]):
        copied = run()[0]
    _expect_close(copied[..., unit], before[..., other], law, "a unit with another's rows")

    column, scale = [(mlp.down.weight.T, unit)], torch.ones(mlp.num_units).to(before).index_fill(0, unit, 3.0)
    with _overwritten(column, [3 * mlp.down.weight.T[unit]]):
        scaled = run()[1]
    _expect(not torch.equal(scaled, written), law, f"column {unit.item()} of down writes nothing")
    _expect_close(scaled, run(scale)[1], law, "the block's output, one column of down scaled,")


@torch.no_grad()
def check_compile(subject: Subject) -> None:
    """Law 8: a patched model goes through torch.compile, without a graph break, and through torch.export.

    The compiler's `aot_eager` backend traces everything and generates no code: patches fail in tracing.
    """
    torch.compiler.reset()  # the models of one process share a limit on compilations
    backbone = _Run(subject.patched())
    expected = backbone(subject.images)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")(subject.images)
    _expect_close(compiled, expected, "law 8 (torch.compile)", "the pooled output")
    exported = torch.export.export(backbone, (subject.images,)).module()(subject.images)
    _expect_close(exported, expected, "law 8 (torch.export)", "the pooled output")


LAWS = (
    check_roles,
    check_zero_registers,
    check_removal,
    check_order,
    check_hidden_outside,
    check_masked,
    check_disk_state,
    check_gradients,
    check_deepcopy,
    check_bf16,
    check_checkpointing,
    check_dense,
    check_mlp,
)
"""What is checked on every model."""


# -- instruments ---------------------------------------------------------------------------------------------


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
    _expect(
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
def _first_block_input(backbone: Backbone, images: Tensor) -> Tensor:
    found: list[Tensor] = []
    # Registered last, so it sees what any hook that inserts registers has made.
    handle = backbone.blocks[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        backbone.run(images)
    finally:
        handle.remove()
    return found[0]


def _hidden_units(
    backbone: Backbone, images: Tensor, index: int, mlp: Mlp, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the model, units scaled on their way into `down`; returns them unscaled, and the block's output.

    Where there is an inner norm, the units returned are those that it receives.
    """
    found: list[Tensor] = []
    source = mlp.down if mlp.norm is None else mlp.norm
    handles = [source.register_forward_pre_hook(lambda _, args: found.append(args[0]))]
    if scale is not None:
        handles.append(mlp.down.register_forward_pre_hook(lambda _, args: (args[0] * scale,)))
    try:
        output = backbone.block_tokens(images, [index])[index]
    finally:
        for handle in handles:
            handle.remove()
    _expect(len(found) == 1, f"mlp (block {index})", f"its layers took part {len(found)} times in one run")
    return found[0], output


@contextmanager
def _overwritten(rows: Sequence[tuple[Tensor, Tensor]], values: Sequence[Tensor]) -> Iterator[None]:
    """Puts values into rows of parameters, and afterwards the old ones back."""
    # Indexing by tensors copies.
    before = [parameter[positions] for parameter, positions in rows]
    for (parameter, positions), value in zip(rows, values, strict=True):
        parameter[positions] = value
    try:
        yield
    finally:
        for (parameter, positions), value in zip(rows, before, strict=True):
            parameter[positions] = value


def _rows(backbone: Backbone) -> int:
    """Counts the rows of the register parameter, native registers included."""
    return 0 if backbone.registers is None else backbone.registers.shape[-2]


@torch.no_grad()
def _move_registers(backbone: Backbone) -> None:
    assert backbone.registers is not None
    noise = torch.randn(backbone.registers.shape, generator=torch.Generator().manual_seed(2))
    backbone.registers.add_(noise.to(backbone.registers))


def _same_patches(one: Backbone, other: Backbone, images: Tensor) -> bool:
    return torch.equal(one(images).patches, other(images).patches)


def _register_gradient(backbone: Backbone, images: Tensor, law: str) -> Tensor:
    """Takes the gradient of a random mixture of all outputs; (registers, width)."""
    assert backbone.registers is not None
    backbone.registers.requires_grad_(True).grad = None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = backbone(images)
        loss = torch.stack([(torch.randn_like(tensor) * tensor).sum() for tensor in features]).sum()
    loss.backward()
    if backbone.registers.grad is None:
        raise AssertionError(f"{law} is broken: the registers receive no gradient")
    return backbone.registers.grad[0]


def _enable_checkpointing(model: nn.Module) -> None:
    """Turns gradient checkpointing on, by the name that the model's library has for it, if it has any."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "set_grad_checkpointing")
    for name in [name for name in names if hasattr(model, name)][:1]:
        getattr(model, name)()


class _Run(nn.Module):
    """A backbone's `run` as a module's `forward`, for the compilers."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.run(images)


def _expect(holds: bool, law: str, found: str) -> None:
    if not holds:
        raise AssertionError(f"{law} is broken: {found}")


def _expect_close(found: Tensor, expected: Tensor, law: str, name: str) -> None:
    _expect(
        found.shape == expected.shape,
        law,
        f"{name} has shape {tuple(found.shape)}, was {tuple(expected.shape)}",
    )
    difference, limit = (found - expected).abs().max().item(), TOLERANCE * expected.abs().max().item()
    _expect(
        difference <= limit, law, f"{name} differs by up to {difference:.3g}, rounding explains {limit:.3g}"
    )


def _expect_same_model(before: Backbone, after: Backbone, images: Tensor, law: str) -> None:
    """Compares two models bit for bit: class, tensors, what trains, and outputs."""
    for name, module in before.model.named_modules():
        found = type(after.model.get_submodule(name))
        _expect(found is type(module), law, f"the class of {name or 'the model'} became {found.__name__}")
    tensors, expected = after.model.state_dict(keep_vars=True), before.model.state_dict(keep_vars=True)
    _expect(tensors.keys() == expected.keys(), law, f"tensors: {sorted(tensors.keys() ^ expected.keys())}")
    for name, tensor in tensors.items():
        _expect(torch.equal(tensor, expected[name]), law, f"tensor {name} changed")
        _expect(tensor.requires_grad == expected[name].requires_grad, law, f"requires_grad of {name} changed")
    outputs, wanted = native_outputs(after, images), native_outputs(before, images)
    _expect(outputs.keys() == wanted.keys(), law, f"outputs: {sorted(outputs.keys() ^ wanted.keys())}")
    changed = [name for name, tensor in outputs.items() if not torch.equal(tensor, wanted[name])]
    _expect(not changed, law, f"these outputs are no longer bit-identical: {changed[:5]}")


def _expect_parameters(
    roles: Mapping[str, list[str]],
    role: str,
    parameters: Mapping[str, nn.Parameter],
    wanted: set[nn.Parameter],
) -> None:
    found = {parameters[name] for name in roles.get(role, [])}
    _expect(
        found == wanted,
        "roles",
        f"role {role} names {roles.get(role, [])}, which is not all of it and nothing else",
    )
