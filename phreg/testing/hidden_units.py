"""The check of a backbone's `mlp` role: which rows feed a hidden unit, and which column it writes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from phreg.backbones.base import Backbone, Mlp
from phreg.testing.expectations import expect, expect_close
from phreg.testing.subject import Subject


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
    expect(before.shape == shape, law, f"hidden units have shape {tuple(before.shape)}, expected {shape}")
    # The most active, so that changes show.
    unit, other = before.abs().mean((0, 1)).topk(2).indices.split(1)
    rest = torch.ones(mlp.num_units, dtype=torch.bool, device=unit.device).index_fill(0, unit, False)
    rows = mlp.rows(unit)

    with _overwritten(rows, [torch.zeros_like(parameter[positions]) for parameter, positions in rows]):
        zeroed = run()[0]
    constant = bool((zeroed[..., unit] == zeroed[0, 0, unit]).all())
    expect(constant, law, f"unit {unit.item()} still follows its input, with all its rows zero")
    expect_close(zeroed[..., rest], before[..., rest], law, "what other units do, one unit's rows zero,")

    with _overwritten(rows, [parameter[positions] for parameter, positions in mlp.rows(other)]):
        copied = run()[0]
    expect_close(copied[..., unit], before[..., other], law, "a unit with another's rows")

    column, scale = [(mlp.down.weight.T, unit)], torch.ones(mlp.num_units).to(before).index_fill(0, unit, 3.0)
    with _overwritten(column, [3 * mlp.down.weight.T[unit]]):
        scaled = run()[1]
    expect(not torch.equal(scaled, written), law, f"column {unit.item()} of down writes nothing")
    expect_close(scaled, run(scale)[1], law, "the block's output, one column of down scaled,")


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
    expect(len(found) == 1, f"mlp (block {index})", f"its layers took part {len(found)} times in one run")
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
