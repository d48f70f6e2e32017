"""Test-time registers: a model's sinks moved into registers by a hook, without any training.

Hooks edit the hidden units that cause sinks (`phreg.sinks.locate`). Each unit's largest activation over the
patches of an image goes to the register; everywhere else the unit is set to zero (Jiang et al. 2025, arXiv
2506.08010; by their appendix, a register may start from zero).

    hidden units [cls | register | patches]  ──►  [0 | largest of the patches | 0]  ──► down projection

This is the cheapest repair and not the best: the patches also lose what these units said about them. It holds
for the image size of the calibration; at another size the model warns once. Inference needs the hooks, and no
stock checkpoint can carry them.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.errors import PhregError
from phreg.registers import remove_registers
from phreg.rollback import rollback_on_error
from phreg.sinks.locate import Sinks

logger = logging.getLogger(__name__)

Units = dict[int, list[tuple[int, int]]]
"""By block: each unit, and the sign of its activation on sinks."""


def moved_units(sinks: Sinks) -> Units:
    """Lists the units that cause sinks, as `install` takes them."""
    return {
        block: [(unit.index, 1 if unit.sink_level >= 0 else -1) for unit in units]
        for block, units in sinks.by_block().items()
    }


def add_test_time_registers(backbone: Backbone, sinks: Sinks | None, count: int) -> None:
    """Adds registers, and the hooks that move a model's sinks into them.

    Args:
        backbone: The model.
        sinks: Its sinks, found on images of the size that it is to be used at.
        count: Registers to add.

    Raises:
        PhregError: There are none to add, or no hidden unit is known to cause the sinks.
    """
    if count < 1:
        raise PhregError(f"asked for {count} test-time registers; use 1 or more: artifacts are moved there")
    if sinks is None or not sinks.units:
        raise PhregError(
            f"asked for test-time registers on {backbone.describe()}, where no hidden unit was found to "
            "cause artifacts; use phreg distill with --method relocate, which can do without"
        )
    rows, cols = sinks.norms.position_histogram.shape
    size = (rows * backbone.spec.patch_size[0], cols * backbone.spec.patch_size[1])
    install(backbone, moved_units(sinks), count, size)


def install(
    backbone: Backbone, units: Units, num_registers: int = 1, size: tuple[int, int] | None = None
) -> None:
    """Adds registers of zeros to a model, and the hooks that move units into them.

    Args:
        backbone: The model.
        units: The units to move.
        num_registers: Registers to add.
        size: Pixels of the images that the units were found on, (height, width); None means not known.

    Raises:
        PhregError: A block or unit does not exist, or the model has registers from phreg; it is as it was.
    """
    with rollback_on_error(backbone):
        backbone.insert_registers(torch.zeros(num_registers, backbone.spec.width))
        attach(backbone, units, size)


def attach(
    backbone: Backbone, units: Mapping[Any, Sequence[Sequence[int]]], size: Sequence[int] | None = None
) -> None:
    """Attaches the hooks to a model whose registers are in place.

    Args:
        backbone: The model.
        units: As `Units`; what JSON makes of them will do.
        size: As `install` takes it.

    Raises:
        PhregError: A block or unit does not exist.
    """
    checked = {int(block): [(int(u), int(s)) for u, s in chosen] for block, chosen in units.items()}
    for block, chosen in checked.items():
        mlp = backbone.mlp(block) if 0 <= block < len(backbone.blocks) else None
        count = mlp.num_units if mlp is not None else 0
        wrong = [unit for unit, _ in chosen if not 0 <= unit < count]
        if wrong:
            raise PhregError(
                f"asked to move hidden units {wrong[:3]} of block {block} of {backbone.describe()}, which "
                f"has {count} there; these test-time registers belong to another model"
            )
    prefix, patch = backbone.spec.num_prefix, backbone.spec.patch_size
    tokens = None
    if size is not None:
        tokens = prefix + backbone.num_registers + size[0] // patch[0] * (size[1] // patch[1])
    for index, chosen in sorted(checked.items()):
        mlp, block = backbone.mlp(index), backbone.blocks[index]
        assert mlp is not None  # checked above
        down = next(name for name, module in block.named_modules() if module is mlp.down)
        # The first of them knows the size, so that it is warned of once.
        known = (size[0], size[1]) if size is not None and index == min(checked) else None
        watch = Watch(down, known, tokens if known else None)
        block.register_forward_pre_hook(watch, with_kwargs=True)
        move = MoveUnits(
            [unit for unit, _ in chosen], [sign for _, sign in chosen], prefix, backbone.num_registers
        )
        mlp.down.register_forward_pre_hook(move)


def installed(backbone: Backbone) -> Units | None:
    """Says which units a model's test-time registers move; None where it has none."""
    found: Units = {}
    for block in range(len(backbone.blocks)):
        mlp = backbone.mlp(block)
        for hook in mlp.down._forward_pre_hooks.values() if mlp is not None else ():
            if isinstance(hook, MoveUnits):
                found[block] = list(zip(hook.units, hook.signs, strict=True))
    return found or None


def calibrated_size(backbone: Backbone) -> tuple[int, int] | None:
    """Says on images of which size the units were found; None where there are none, or it is not known."""
    hooks = [hook for block in backbone.blocks for hook in block._forward_pre_hooks.values()]
    return next((hook.size for hook in hooks if isinstance(hook, Watch)), None)


def uninstall(backbone: Backbone) -> None:
    """Takes hooks and registers out again, as `phreg.remove_registers` does."""
    remove_registers(backbone)


class Seen:
    """Which tokens are no padding, for the images on their way; an object, as exports assign no tensors."""

    tokens: Tensor | None = None
    """Those that any token may attend to (batch, tokens); None means all."""


SEEN = "_phreg_seen"
"""Attribute of a down projection that holds its `Seen`: of the one that runs, as replicas (DataParallel) have
images of their own."""


class Watch:
    """A pre-hook on a block that has units to move: notes padding, and warns of another size.

    Args:
        down: Path of the down projection in the block.
        size: Pixels of the images that the units were found on; None warns of none.
        tokens: Tokens that such images make.
    """

    moves_units = True

    def __init__(self, down: str, size: tuple[int, int] | None, tokens: int | None) -> None:
        self.down, self.size, self.tokens = down, size, tokens
        self._warned = False

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the block's tokens and attention mask."""
        tokens = (*args, *kwargs.values())[0].shape[1]
        given = (*args[1:2], kwargs.get("attention_mask"), kwargs.get("attn_mask"))
        mask = next((value for value in given if isinstance(value, Tensor) and value.dim() == 4), None)
        if mask is not None and mask.is_floating_point():  # added to scores
            mask = mask > torch.finfo(mask.dtype).min / 2
        seen = Seen()
        seen.tokens = None if mask is None else mask.flatten(1, 2).any(1)
        setattr(block.get_submodule(self.down), SEEN, seen)
        other = self.tokens is not None and tokens != self.tokens
        if other and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(
                "test-time registers found on images of %s pixels, %d tokens, run on %d tokens; "
                "they hold for that size: find them anew at this one",
                "x".join(map(str, self.size or ())),
                self.tokens,
                tokens,
            )


class MoveUnits:
    """A pre-hook on a down projection that gives each unit's largest activation to the registers.

    An object, not a closure, so that models which carry it can be copied and pickled.

    Args:
        units: Hidden units to move.
        signs: Sign of each one's activation on sinks; the largest is the one furthest on that side.
        num_prefix: Tokens before the registers.
        num_registers: Registers.
    """

    moves_units = True
    """By which `phreg.backbones.base.unit_movers` knows it."""

    def __init__(
        self,
        units: Sequence[int],
        signs: Sequence[int],
        num_prefix: int,
        num_registers: int,
    ) -> None:
        self.units, self.signs = list(units), list(signs)
        self.start, self.stop = num_prefix, num_prefix + num_registers

    def __call__(self, down: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Edits hidden units (batch, tokens, hidden), image by image and unit by unit."""
        hidden = args[0]
        signs = hidden.new_tensor(self.signs)
        patches = hidden[:, self.stop :, self.units] * signs
        seen = getattr(down, SEEN, Seen).tokens
        if seen is not None:  # the units of padding count for nothing
            padding = ~seen[:, self.stop :, None]
            patches = patches.masked_fill(padding, torch.finfo(patches.dtype).min)
        largest = patches.amax(1, keepdim=True) * signs
        edited = hidden.clone()
        edited[:, :, self.units] = 0
        edited[:, self.start : self.stop, self.units] = largest.expand(-1, self.stop - self.start, -1)
        return (edited, *args[1:])
