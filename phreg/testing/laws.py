"""The laws of phreg that a single model can show, one short function each."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import adapt
from phreg.registers import add_registers, remove_registers
from phreg.testing.expectations import expect, expect_close
from phreg.testing.hidden_units import check_mlp
from phreg.testing.instruments import (
    RunModule,
    enable_checkpointing,
    first_block_input,
    move_registers,
    native_outputs,
    register_gradient,
    registers_masked,
)
from phreg.testing.subject import Subject

BF16_TOLERANCE = 0.1
"""Largest relative distance of bf16 from fp32 outputs: bf16 keeps 8 bits (0.4 %), each block adds some."""


def check_roles(subject: Subject) -> None:
    """Roles name existing parameters, each once, and those of every block and of the registers completely."""
    for backbone in (subject.original(), subject.patched()):
        parameters, roles = dict(backbone.model.named_parameters()), backbone.roles()
        names = [name for role in roles.values() for name in role]
        expect(
            set(names) <= set(parameters),
            "roles",
            f"these are no parameters: {sorted(set(names) - set(parameters))}",
        )
        twice = sorted({name for name in names if names.count(name) > 1})
        expect(not twice, "roles", f"these parameters have two roles: {twice}")
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
    expect(
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
    expect(
        found == subject.num_registers,
        "law 2",
        f"{found} registers found in a model with {subject.num_registers}",
    )
    layout = backbone.layout(subject.images)
    before = first_block_input(backbone, subject.images)
    move_registers(backbone)
    moved = (first_block_input(backbone, subject.images) != before).any(-1).any(0)
    expect(
        len(moved) == layout.num_tokens,
        "law 2 (order)",
        f"the first block receives {len(moved)} tokens, the layout says {layout.num_tokens}",
    )
    positions = moved.nonzero().flatten().tolist()
    # Where a class has native registers of its own, the parameter holds those too, in front of ours.
    last = layout.num_prefix + layout.num_registers
    expect(
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
        expect(
            found.keys() == expected.keys(),
            "law 2 (registers stay inside)",
            f"outputs differ: {sorted(found.keys() ^ expected.keys())}",
        )
        for name, tensor in found.items():
            shapes = tuple(tensor.shape), tuple(expected[name].shape)
            expect(
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
        expect_close(tensor, expected[name], "law 3 (masked registers have no influence)", name)


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
    expect(not lost, "disk state", f"load_disk_state(disk_state()) does not bring back {lost[:5]}")


def check_gradients(subject: Subject) -> None:
    """Law 8: every register receives a gradient."""
    backbone = subject.patched()
    gradient = register_gradient(backbone, subject.images, "law 8 (gradients)")
    dead = (gradient[-subject.num_registers :] == 0).all(-1).nonzero().flatten().tolist()
    expect(not dead, "law 8 (gradients)", f"the gradient of these registers is zero: {dead}")


@torch.no_grad()
def check_deepcopy(subject: Subject) -> None:
    """Law 8: a copy of a patched model is a model of its own."""
    backbone = subject.patched()
    before, twin = backbone.run(subject.images), adapt(copy.deepcopy(backbone.model))
    expect(torch.equal(twin.run(subject.images), before), "law 8 (deepcopy)", "a copy's output differs")
    move_registers(twin)
    expect(
        not _same_patches(twin, backbone, subject.images),
        "law 8 (deepcopy)",
        "a copy does not use its own registers",
    )
    expect(
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
            expect(
                bool(distance < BF16_TOLERANCE),
                f"law 8 (bf16 {how})",
                f"{name} lie {distance:.3g} from fp32, relative, more than {BF16_TOLERANCE}",
            )


def check_checkpointing(subject: Subject) -> None:
    """Law 8: gradient checkpointing changes no gradient."""
    backbone = subject.patched()
    backbone.model.train()
    law = "law 8 (gradient checkpointing)"
    expected = register_gradient(backbone, subject.images, law)
    enable_checkpointing(backbone.model)
    expect_close(register_gradient(backbone, subject.images, law), expected, law, "the registers' gradient")


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
        expect(
            found == (rows, cols), "law 8 (other sizes)", f"{rows}x{cols} patches in, a grid of {found} out"
        )
    for name in ("patches", "pooled"):
        expect_close(getattr(masked, name), getattr(expected, name), "laws 3 and 8 (other sizes)", name)


@torch.no_grad()
def check_dense(subject: Subject) -> None:
    """The dense features of a model without registers are those its library gives, where it gives any."""
    if subject.dense is None:
        return
    backbone = subject.original()
    expect_close(
        backbone(subject.images).patches,
        subject.dense(backbone.model, subject.images),
        "dense features",
        "patches",
    )


@torch.no_grad()
def check_compile(subject: Subject) -> None:
    """Law 8: a patched model goes through torch.compile, without a graph break, and through torch.export.

    The compiler's `aot_eager` backend traces everything and generates no code: patches fail in tracing.
    """
    torch.compiler.reset()  # the models of one process share a limit on compilations
    backbone = RunModule(subject.patched())
    expected = backbone(subject.images)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")(subject.images)
    expect_close(compiled, expected, "law 8 (torch.compile)", "the pooled output")
    exported = torch.export.export(backbone, (subject.images,)).module()(subject.images)
    expect_close(exported, expected, "law 8 (torch.export)", "the pooled output")


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


def _rows(backbone: Backbone) -> int:
    """Counts the rows of the register parameter, native registers included."""
    return 0 if backbone.registers is None else backbone.registers.shape[-2]


def _same_patches(one: Backbone, other: Backbone, images: Tensor) -> bool:
    return torch.equal(one(images).patches, other(images).patches)


def _expect_same_model(before: Backbone, after: Backbone, images: Tensor, law: str) -> None:
    """Compares two models bit for bit: class, tensors, what trains, and outputs."""
    for name, module in before.model.named_modules():
        found = type(after.model.get_submodule(name))
        expect(found is type(module), law, f"the class of {name or 'the model'} became {found.__name__}")
    tensors, expected = after.model.state_dict(keep_vars=True), before.model.state_dict(keep_vars=True)
    expect(tensors.keys() == expected.keys(), law, f"tensors: {sorted(tensors.keys() ^ expected.keys())}")
    for name, tensor in tensors.items():
        expect(torch.equal(tensor, expected[name]), law, f"tensor {name} changed")
        expect(tensor.requires_grad == expected[name].requires_grad, law, f"requires_grad of {name} changed")
    outputs, wanted = native_outputs(after, images), native_outputs(before, images)
    expect(outputs.keys() == wanted.keys(), law, f"outputs: {sorted(outputs.keys() ^ wanted.keys())}")
    changed = [name for name, tensor in outputs.items() if not torch.equal(tensor, wanted[name])]
    expect(not changed, law, f"these outputs are no longer bit-identical: {changed[:5]}")


def _expect_parameters(
    roles: Mapping[str, list[str]],
    role: str,
    parameters: Mapping[str, nn.Parameter],
    wanted: set[nn.Parameter],
) -> None:
    found = {parameters[name] for name in roles.get(role, [])}
    expect(
        found == wanted,
        "roles",
        f"role {role} names {roles.get(role, [])}, which is not all of it and nothing else",
    )
