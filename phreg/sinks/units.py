"""Hidden units of MLPs: what is known of one, and reading or holding some while a model runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from phreg.backbones.base import Backbone


@dataclass(frozen=True)
class Unit:
    """One hidden unit of an MLP.

    Attributes:
        block: Index of its block.
        index: Its index among the block's hidden units.
        level: Its activation on the outliers it answers to.
        ordinary: Its mean activation on all other patches.
        share: For a cause, its share of what the MLP writes into outliers and not into others; for an
            upstream unit, its share of what sets the causes off, to first order. Shares add up to 1 over all
            units, those that work against it being negative, so that one alone can exceed 1.
        kind: For a cause, the number of its kind, from 0; None for an upstream unit.
        fed: For a cause, what its activation is computed from at its level: one pre-activation in a plain
            MLP, two in a gated one; none for an upstream unit.
    """

    block: int
    index: int
    level: float
    ordinary: float
    share: float
    kind: int | None = 0
    fed: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self) | {"fed": list(self.fed)}


def by_block(units: Sequence[Unit]) -> dict[int, list[Unit]]:
    """Sorts units by block, first to last; those of a block stay in their order."""
    blocks = sorted({unit.block for unit in units})
    return {block: [unit for unit in units if unit.block == block] for block in blocks}


@contextmanager
def holding(backbone: Backbone, units: Sequence[Unit]) -> Iterator[None]:
    """Holds units of patches at their ordinary level while the model runs."""
    with ExitStack() as stack:
        for block, held in by_block(units).items():
            mlp = backbone.mlp(block)
            assert mlp is not None  # units were found there
            stack.enter_context(ahead_of(mlp.down, _Hold(held, backbone.spec.num_prefix)))
        yield


class _Hold:
    """A pre-hook that holds units of patches at their ordinary level."""

    def __init__(self, units: Sequence[Unit], start: int) -> None:
        self.index = [unit.index for unit in units]
        self.ordinary = [unit.ordinary for unit in units]
        self.start = start

    def __call__(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0].clone()
        hidden[:, self.start :, self.index] = hidden.new_tensor(self.ordinary)
        return (hidden,)


@contextmanager
def reading_units(backbone: Backbone, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects all hidden units of some blocks' MLPs, (batch, tokens, hidden), while the model runs."""
    found: dict[int, Tensor] = {}

    def keep(block: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            found[block] = args[0]

        return hook

    with ExitStack() as stack:
        for block in blocks:
            if (mlp := backbone.mlp(block)) is not None:
                stack.enter_context(ahead_of(mlp.down, keep(block)))
        yield found


@contextmanager
def ahead_of(module: nn.Module, hook: Any) -> Iterator[None]:
    """Runs a pre-hook for as long as it lasts."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class UnitActivations(NamedTuple):
    """Some hidden units of one MLP, and what feeds them."""

    hidden: Float[Tensor, "batch tokens units"]
    """The units: what the down projection receives of them."""
    fed: Float[Tensor, "batch tokens units inputs"]
    """What their activation is computed from: one input each in a plain MLP, two in a gated one."""


class UnitReader:
    """Reads some hidden units with what feeds them.

    It finds layers by their names, so that layers wrapped since (LoRA) are read in their wrapping.

    Args:
        backbone: The model, its layers plain.
        units: Hidden units, by block.
    """

    def __init__(self, backbone: Backbone, units: Mapping[int, Sequence[int]]) -> None:
        self.backbone = backbone
        self.units = {
            block: torch.tensor(chosen, dtype=torch.long, device=backbone.device)
            for block, chosen in units.items()
        }
        names = {module: name for name, module in backbone.named_modules()}
        self._down: dict[str, int] = {}
        self._up: dict[str, tuple[int, list[Int[Tensor, " units"]]]] = {}
        for block, index in self.units.items():
            mlp = backbone.mlp(block)
            assert mlp is not None  # units were found there
            self._down[names[mlp.down]] = block
            for layer in mlp.up:
                starts = range(0, layer.out_features, mlp.num_units)
                self._up[names[layer]] = block, [index + start for start in starts]

    @contextmanager
    def capture(self) -> Iterator[dict[int, UnitActivations]]:
        """Collects readings by block while the model runs."""
        found: dict[int, UnitActivations] = {}
        fed: dict[int, list[Tensor]] = {}

        def note(block: int, rows: list[Tensor]) -> Any:
            def hook(_module: nn.Module, _args: tuple[Tensor], output: Tensor) -> None:
                fed.setdefault(block, []).extend(output[..., part] for part in rows)

            return hook

        def keep(block: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
                found[block] = UnitActivations(
                    args[0][..., self.units[block]], torch.stack(fed.pop(block), dim=-1)
                )

            return hook

        with ExitStack() as stack:
            for name, (block, rows) in self._up.items():
                layer = self.backbone.get_submodule(name)
                stack.callback(layer.register_forward_hook(note(block, rows)).remove)
            for name, block in self._down.items():
                stack.enter_context(ahead_of(self.backbone.get_submodule(name), keep(block)))
            yield found
