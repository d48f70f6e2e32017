"""What becomes of every family in every stock format: the table, and a function that finds it out.

`outcome` is what anybody who writes the table down for readers calls; `EXPECTED` is what it should find.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from families import FAMILIES

from phreg.backbones import resolve
from phreg.exports import export, why_not
from phreg.registers import add_registers

COUNT = 3
"""Registers added."""

EVERY_SIZE, OWN_SIZE, REFUSED = "every size", "own size", "refused"


class Refused(str):
    """What the reason of a refusal should match."""


class Outcome(NamedTuple):
    """What becomes of a family in a format.

    Attributes:
        claimed: At which of the measured sizes it is equal, or that it is refused.
        difference: The largest relative difference at a claimed size; 0 where refused.
        reason: Why it is refused; empty elsewhere.
    """

    claimed: str
    difference: float
    reason: str


def outcome(family: str, format: str, folder: Path) -> Outcome:
    """Exports a family's tiny model with registers into a new folder, unless the format refuses it."""
    backbone, base = resolve.load(FAMILIES[family]())
    add_registers(backbone, COUNT)
    reason = why_not(backbone, format)
    if reason:
        return Outcome(REFUSED, 0.0, reason)
    with torch.no_grad():
        figures = export(backbone, folder, format, base=base)
    claimed = [figure.relative for figure in figures if figure.claimed]
    return Outcome(EVERY_SIZE if len(claimed) == len(figures) else OWN_SIZE, max(claimed), "")


_STAGES = "feature maps of several blocks"
_SIDE_BY_SIDE = "CLS and the mean of the patches side by side"
_POOLER = "its pooler .* has no counterpart in timm; take it off"
_AIMV2 = "does not convert AIMv2"
_ONLY_DINOV2 = "only those of DINOv2 have registers"
_TEXT = "holds a text tower too"

EXPECTED: dict[str, dict[str, str]] = {
    "timm": {
        "timm/": EVERY_SIZE,
        # Positions are resampled without antialiasing there, and with it in timm.
        "transformers/dinov2": OWN_SIZE,
        "transformers/dinov2-swiglu": OWN_SIZE,
        "transformers/dinov2-classifier": Refused(_SIDE_BY_SIDE),
        "transformers/dinov2-backbone": Refused(_STAGES),
        "transformers/dinov2-registers": EVERY_SIZE,
        "transformers/dinov2-registers-classifier": Refused(_SIDE_BY_SIDE),
        "transformers/dinov2-registers-backbone": Refused(_STAGES),
        "transformers/dinov3": EVERY_SIZE,
        "transformers/dinov3-gated": EVERY_SIZE,
        "transformers/dinov3-backbone": Refused(_STAGES),
        "transformers/clip": OWN_SIZE,
        "transformers/clip-vision": OWN_SIZE,
        "transformers/clip-vision-projection": OWN_SIZE,
        "transformers/clip-classifier": Refused("classifier reads tokens ahead of the final norm"),
        "transformers/metaclip2": OWN_SIZE,
        "transformers/metaclip2-vision": OWN_SIZE,
        "transformers/metaclip2-vision-projection": OWN_SIZE,
        "transformers/siglip": OWN_SIZE,
        "transformers/siglip-vision": OWN_SIZE,
        "transformers/siglip-classifier": OWN_SIZE,
        "transformers/siglip2": EVERY_SIZE,
        "transformers/siglip2-vision": EVERY_SIZE,
        "transformers/siglip2-classifier": EVERY_SIZE,
        "transformers/vit": Refused(_POOLER),
        "transformers/vit-classifier": OWN_SIZE,
        "transformers/deit": Refused(_POOLER),
        "transformers/deit-classifier": Refused("two classifiers, one of them on the distillation token"),
        "transformers/vit-msn": OWN_SIZE,
        "transformers/vit-mae": OWN_SIZE,
        "transformers/ijepa": OWN_SIZE,
        "transformers/aimv2": Refused(_AIMV2),
        "transformers/aimv2-vision": Refused(_AIMV2),
        "transformers/aimv2-native": Refused(_AIMV2),
        "open_clip/": EVERY_SIZE,
        "open_clip/average": Refused("norms the mean of its patches"),
        "open_clip/coca": Refused("its pooler .* has no counterpart in timm"),
    },
    "transformers": {
        "timm/": Refused("model of timm"),
        "open_clip/": Refused("model of open_clip"),
        "transformers/": Refused(_ONLY_DINOV2),
        "transformers/dinov2": OWN_SIZE,
        "transformers/dinov2-swiglu": OWN_SIZE,
        "transformers/dinov2-classifier": OWN_SIZE,
        "transformers/dinov2-backbone": OWN_SIZE,
        "transformers/dinov2-registers": EVERY_SIZE,
        "transformers/dinov2-registers-classifier": EVERY_SIZE,
        "transformers/dinov2-registers-backbone": EVERY_SIZE,
    },
    "open_clip": {
        "timm/": Refused(f"{_TEXT}, and it has none"),
        "transformers/": Refused(_TEXT),
        "open_clip/": EVERY_SIZE,
        "open_clip/average": Refused("norms the mean of its patches"),
        "open_clip/coca": Refused("writes captions"),
        "open_clip/tower": Refused(f"{_TEXT}, and it is an image tower alone"),
    },
}
"""Format -> family, or a library that stands for its other families -> what becomes of it."""


def expected(family: str, format: str) -> str:
    """Looks a family up in the table."""
    outcomes = EXPECTED[format]
    return outcomes.get(family) or outcomes[family[: family.index("/") + 1]]
