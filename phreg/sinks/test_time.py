"""Test-time registers: a model's sinks moved into registers by hooks, without any training.

Hooks edit the hidden units that cause sinks (`phreg.sinks.locate`). Each unit's largest activation over the
patches of an image goes to the register; everywhere else the unit is set to zero (Jiang et al. 2025, arXiv
2506.08010; by their appendix, a register may start from zero). There should be as many registers as an image
has sinks: each draws the attention of one, so with fewer the patches get more of it (benchmarks/methods).

    hidden units [cls | register | patches]  ──►  [0 | largest of the patches | 0]  ──► down projection

One `UnitMover` knows the units and owns all hooks. The model's first block keeps it, so that it is copied
and pickled with the model. Replicas (DataParallel) share it; what a hook notes of the images on their way is
on the module that runs.

This is the cheapest repair and not the best: the patches also lose what these units said about them. It holds
for the image size of the calibration; at another size the model warns once. Inference needs the hooks, and no
stock checkpoint can carry them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from phreg.backbones.base import UNIT_MOVER, Backbone, Mlp, unit_movers
from phreg.errors import PhregError
from phreg.registers import insert
from phreg.rollback import rollback_on_error
from phreg.sinks.locate import Sinks

logger = logging.getLogger(__name__)

Units = Mapping[int, Sequence[tuple[int, int]]]
"""By block: each unit, and the sign of its activation on sinks."""

PADDING = "_phreg_padding"
"""Attribute of a down projection while its block runs: which tokens are padding, (batch, tokens), or None.
Each replica has its own."""


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
    units = {
        block: [(unit.index, 1 if unit.sink_level >= 0 else -1) for unit in found]
        for block, found in sinks.by_block().items()
    }
    install(backbone, units, count, size)


def install(
    backbone: Backbone, units: Units, num_registers: int = 1, size: tuple[int, int] | None = None
) -> None:
    """Adds registers of zeros to a model, and the hooks that move units into them.

    `phreg.remove_registers` takes out both.

    Args:
        backbone: The model.
        units: The units to move.
        num_registers: Registers to add.
        size: Pixels of the images that the units were found on, (height, width); None means not known.

    Raises:
        PhregError: A block or unit does not exist, or the model has registers from phreg; it is as it was.
    """
    with rollback_on_error(backbone):
        insert(backbone, torch.zeros(num_registers, backbone.spec.width, device="cpu"))
        UnitMover(backbone, units, size)


def installed(backbone: Backbone) -> "UnitMover | None":
    """Finds what moves units into a model's test-time registers; None where it has none."""
    return next(iter(unit_movers(backbone.model)), None)


class UnitMover:
    """The test-time registers of a model: which units go there, and the hooks that move them.

    Args:
        backbone: The model, its registers in place. It keeps this object.
        units: The units to move.
        size: Pixels of the images that the units were found on; None means not known.

    Raises:
        PhregError: A block or unit does not exist; nothing is hooked then.

    Attributes:
        units: As given, by block.
        size: As given.
    """

    def __init__(self, backbone: Backbone, units: Units, size: tuple[int, int] | None) -> None:
        self.units, self.size = {block: list(units[block]) for block in sorted(units)}, size
        mlps = {block: _mlp_with(backbone, block, chosen) for block, chosen in self.units.items()}
        start = backbone.spec.num_prefix
        stop = start + backbone.num_registers
        self._patch, self._ahead, self._warned = backbone.spec.patch_size, stop, False
        self._keeper = backbone.blocks[0]
        setattr(self._keeper, UNIT_MOVER, self)
        self._handles = [self._keeper.register_forward_pre_hook(self, with_kwargs=True)]
        for index, mlp in mlps.items():
            block = backbone.blocks[index]
            down = next(name for name, module in block.named_modules() if module is mlp.down)
            numbers, signs = ([pair[side] for pair in self.units[index]] for side in (0, 1))
            self._handles += [
                block.register_forward_pre_hook(NotePadding(down), with_kwargs=True),
                mlp.down.register_forward_pre_hook(MoveUnits(numbers, signs, start, stop)),
            ]

    def __call__(self, _block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warns once of images of another size, as a pre-hook on the first block."""
        if self.size is None or self._warned or torch.compiler.is_compiling():
            return
        (height, width), (rows, cols) = self.size, self._patch
        tokens, expected = (
            (*args, *kwargs.values())[0].shape[1],
            self._ahead + height // rows * (width // cols),
        )
        if tokens != expected:
            self._warned = True
            logger.warning(
                "test-time registers found on images of %dx%d pixels, %d tokens, run on %d tokens; "
                "they hold for that size: find them anew at this one",
                height, width, expected, tokens,
            )  # fmt: skip

    def remove(self) -> None:
        """Takes all hooks off the model, and itself; the registers stay."""
        for handle in self._handles:
            handle.remove()
        delattr(self._keeper, UNIT_MOVER)


def _mlp_with(backbone: Backbone, block: int, units: Sequence[tuple[int, int]]) -> Mlp:
    """Takes apart the MLP of a block that has certain hidden units.

    Raises:
        PhregError: There is no such block or unit.
    """
    mlp = backbone.mlp(block) if 0 <= block < len(backbone.blocks) else None
    count = mlp.num_units if mlp is not None else 0
    wrong = [unit for unit, _ in units if not 0 <= unit < count]
    if mlp is None or wrong:
        raise PhregError(
            f"asked to move hidden units {wrong[:3]} of block {block} of {backbone.describe()}, which "
            f"has {count} there; these test-time registers belong to another model"
        )
    return mlp


@dataclass(frozen=True)
class NotePadding:
    """A pre-hook on a block that tells its down projection, at that path, which tokens are padding."""

    down: str

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reads the block's attention mask; padding is what no token may attend to."""
        given = (*args[1:2], kwargs.get("attention_mask"), kwargs.get("attn_mask"))
        mask = next((value for value in given if isinstance(value, Tensor) and value.dim() == 4), None)
        if mask is not None and mask.is_floating_point():  # added to scores
            mask = mask > torch.finfo(mask.dtype).min / 2
        padding = None if mask is None else ~mask.flatten(1, 2).any(1)
        setattr(block.get_submodule(self.down), PADDING, padding)


@dataclass(frozen=True)
class MoveUnits:
    """A pre-hook on a down projection that gives each unit's largest activation to the registers.

    Attributes:
        units: Hidden units to move.
        signs: Sign of each one's activation on sinks; the largest is the one furthest on that side.
        start: Tokens before the registers.
        stop: Tokens before the patches.
    """

    units: list[int]
    signs: list[int]
    start: int
    stop: int

    def __call__(self, down: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Edits hidden units (batch, tokens, hidden), image by image and unit by unit."""
        hidden = args[0]
        signs = hidden.new_tensor(self.signs)
        patches = hidden[:, self.stop :, self.units] * signs
        padding = vars(down).pop(PADDING, None)
        if padding is not None:  # its units count for nothing
            patches = patches.masked_fill(padding[:, self.stop :, None], torch.finfo(patches.dtype).min)
        largest = patches.amax(1, keepdim=True) * signs
        edited = hidden.clone()
        edited[:, :, self.units] = 0
        edited[:, self.start : self.stop, self.units] = largest.expand(-1, self.stop - self.start, -1)
        return (edited, *args[1:])
