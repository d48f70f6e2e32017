"""Hidden units of MLPs: what is known of a unit, and how to read or fix units while a model runs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.deprecated import current_attribute


@dataclass(frozen=True)
class Unit:
    """One hidden unit of an MLP.

    Attributes:
        block: Index of its block.
        index: Its index among the block's hidden units.
        sink_level: Its activation on the outliers that it responds to.
        baseline: Its mean activation on all other patches.
        share: For a cause, its share of what the MLP writes into outliers and not into others. For an
            upstream unit, its share of what activates the causes, to first order. Shares add up to 1 over
            all units. Units that counteract have a negative share, so a single share can exceed 1.
        cluster: For a cause, the number of its cluster, from 0; None for an upstream unit.
    """

    block: int
    index: int
    sink_level: float
    baseline: float
    share: float
    cluster: int | None = 0

    def __getattr__(self, name: str) -> Any:
        """Finds an attribute by its old name, with a warning."""
        if (new := current_attribute("phreg.sinks.units.Unit", name)) is not None:
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold. Files keep the keys of version 0.1."""
        return {
            "block": self.block,
            "index": self.index,
            "level": self.sink_level,
            "ordinary": self.baseline,
            "share": self.share,
            "kind": self.cluster,
        }


def by_block(units: Sequence[Unit]) -> dict[int, list[Unit]]:
    """Groups units by block, first to last. Units of one block keep their order."""
    blocks = sorted({unit.block for unit in units})
    return {block: [unit for unit in units if unit.block == block] for block in blocks}


@contextmanager
def at_baseline(backbone: Backbone, units: Sequence[Unit]) -> Iterator[None]:
    """Fixes units at their baseline on patches while the model runs."""
    with ExitStack() as stack:
        for block, fixed in by_block(units).items():
            down = backbone.require_mlp(block).down
            stack.enter_context(ahead_of(down, _FixAtBaseline(fixed, backbone.spec.num_prefix)))
        yield


class _FixAtBaseline:
    """A pre-hook that fixes units at their baseline on patches."""

    def __init__(self, units: Sequence[Unit], start: int) -> None:
        self.index = [unit.index for unit in units]
        self.baseline = [unit.baseline for unit in units]
        self.start = start

    def __call__(self, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0].clone()
        hidden[:, self.start :, self.index] = hidden.new_tensor(self.baseline)
        return (hidden,)


@contextmanager
def reading_units(backbone: Backbone, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collects all hidden units of some blocks' MLPs, (batch, tokens, hidden), while the model runs."""
    found: dict[int, Tensor] = {}

    def collect(block: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
            found[block] = args[0]

        return hook

    with ExitStack() as stack:
        for block in blocks:
            if (mlp := backbone.mlp(block)) is not None:
                stack.enter_context(ahead_of(mlp.down, collect(block)))
        yield found


@contextmanager
def ahead_of(module: nn.Module, hook: Any) -> Iterator[None]:
    """Runs a pre-hook inside the context."""
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
