"""What becomes of every family in every format: the table, and a function that finds it out.

`outcome` finds it out, `EXPECTED` is what it should find, and `markdown` writes that down for readers:
`python tests/export_outcomes.py` prints the tables of phreg/formats/export/README.md and of docs/share.md.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from families import FAMILIES

from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.resolve import Base, weights_sha256
from phreg.formats import FORMATS
from phreg.formats.adapter import save_adapter
from phreg.formats.export import export, unsupported_reason
from phreg.formats.load import open_saved
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
    """Exports a family's tiny model with registers into a new folder, unless the format refuses it.

    An adapter is exported from one; its base is the same model, merged without registers.
    """
    backbone, base = resolve.load(FAMILIES[family]())
    if format == "adapter":
        reason = unsupported_reason(backbone, "merged")
        if reason:
            return Outcome(REFUSED, 0.0, reason)
        backbone, base = _from_adapter(backbone, base, folder.parent)
    else:
        add_registers(backbone, COUNT)
    reason = unsupported_reason(backbone, format)
    if reason:
        return Outcome(REFUSED, 0.0, reason)
    with torch.no_grad():
        figures = export(backbone, folder, format, base=base)
    claimed = [figure.relative for figure in figures if figure.claimed]
    several = len(claimed) == len(figures) > 1
    return Outcome(EVERY_SIZE if several else OWN_SIZE, max(claimed), "")


def _from_adapter(backbone: Backbone, base: Base, folder: Path) -> tuple[Backbone, Base]:
    """Writes a model without registers, an adapter of it, and opens that."""
    with torch.no_grad():
        export(backbone, folder / "base", "merged", base=base)
    before = {name: tensor.clone() for name, tensor in backbone.disk_state().items()}
    base = Base(str(folder / "base"), backbone.spec.library, None, weights_sha256(before))
    add_registers(backbone, COUNT)
    save_adapter(folder / "adapter", backbone, base, before, None, lambda _: "")
    return open_saved(resolve.locate(folder / "adapter"))


_STAGES = "feature maps of several blocks"
_SIDE_BY_SIDE = "CLS and the mean of the patches side by side"
_POOLER = "its pooler .* has no counterpart in timm; take it off"
_AIMV2 = "does not convert AIMv2"
_ONLY_DINOV2 = "only those of DINOv2 have registers"
_TEXT = "holds a text tower too"
_UNNAMED = "an open_clip instance does not say what it was built from"
_BACKBONE = "AutoBackbone takes no code"
_IMAGE_BY_IMAGE = "image by image"
_ANTIALIASED = [f"transformers/dinov2-registers{what}" for what in ("", "-classifier", "-backbone")]
"""Models whose way to resample positions torch's exporter cannot write down."""
_FIXED = {"transformers/aimv2": OWN_SIZE, "transformers/aimv2-vision": OWN_SIZE}
"""Models of one size."""

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
        "transformers/dinov3-gated": Refused("its activation is gelu, which timm's DINOv3 does not have"),
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
    "remote-code": {
        "timm/": Refused("model of timm"),
        "open_clip/": Refused("model of open_clip"),
        "transformers/": EVERY_SIZE,
        **_FIXED,
        "transformers/dinov2-backbone": Refused(_BACKBONE),
        "transformers/dinov2-registers-backbone": Refused(_BACKBONE),
        "transformers/dinov3-backbone": Refused(_BACKBONE),
    },
    "onnx": {
        "timm/": EVERY_SIZE,
        "timm/dinov3": OWN_SIZE,
        "transformers/": EVERY_SIZE,
        **_FIXED,
        **dict.fromkeys(_ANTIALIASED, OWN_SIZE),
        "transformers/vit-mae": OWN_SIZE,
        "transformers/siglip2": Refused(_IMAGE_BY_IMAGE),
        "transformers/siglip2-vision": Refused(_IMAGE_BY_IMAGE),
        "transformers/siglip2-classifier": Refused(_IMAGE_BY_IMAGE),
        "open_clip/": EVERY_SIZE,
    },
    # A tower of open_clip knows what it was built of if it was named; the test of `merged` has such a one.
    "merged": {"timm/": EVERY_SIZE, "transformers/": EVERY_SIZE, **_FIXED, "open_clip/": Refused(_UNNAMED)},
    "adapter": {"timm/": EVERY_SIZE, "transformers/": EVERY_SIZE, **_FIXED, "open_clip/": Refused(_UNNAMED)},
}
"""Format -> family, or a library that stands for its other families -> what becomes of it."""


SAME_OPERATIONS = {"remote-code", "merged", "adapter"}
"""Formats whose model has the very class of the patched one."""

_OTHER_NORMS = {f"transformers/{name}" for name in ("vit-classifier", "ijepa", "vit-mae")}
"""Models whose norms add 1e-12 to the variance, and timm's 1e-6."""


def allowed(family: str, format: str) -> float:
    """Says how far apart the two models may be at a claimed size, relative to the largest value.

    fp32 over three blocks; onnxruntime's kernels sum in another order.
    """
    if format in SAME_OPERATIONS:
        return 0
    return 1e-5 if format == "onnx" else 5e-5 if format == "timm" and family in _OTHER_NORMS else 1e-6


def expected(family: str, format: str) -> str:
    """Looks a family up in the table."""
    outcomes = EXPECTED[format]
    return outcomes.get(family) or outcomes[family[: family.index("/") + 1]]


# -- for readers ---------------------------------------------------------------------------------------------

SIGNS = {EVERY_SIZE: "yes", OWN_SIZE: "own size"}
START, END = "<!-- python tests/export_outcomes.py -->", "<!-- end -->"
"""What the tables stand between in phreg/formats/export/README.md and docs/share.md."""

GROUPS = {
    "DINOv2, classifiers and backbones too": "transformers/dinov2(-swiglu|-classifier|-backbone)?",
    "DINOv2 with registers": "transformers/dinov2-registers.*",
    "DINOv3": "transformers/dinov3.*",
    "CLIP, MetaCLIP 2": "transformers/(clip|metaclip2).*",
    "SigLIP": "transformers/siglip(-.*)?",
    "SigLIP 2": "transformers/siglip2.*",
    "ViT, DeiT, MSN, MAE, I-JEPA": "transformers/(vit|deit|ijepa).*",
    "AIMv2": "transformers/aimv2.*",
    "timm": "timm/.*",
    "open_clip": "open_clip/.*",
}
"""Rows of the short table: what readers call them, and the families that they stand for."""


def markdown() -> str:
    """Writes the table in Markdown; families of which the same becomes in every format share a row."""
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for family in FAMILIES:
        library, name = family.split("/")
        found = tuple(_sign(expected(family, format)) for format in FORMATS)
        rows.setdefault((library, found), []).append(name)
    lines = [f"| of | families | {' | '.join(f'`{format}`' for format in FORMATS)} |", "|---" * 9 + "|"]
    lines += [
        f"| {library} | {', '.join(names)} | {' | '.join(found)} |"
        for (library, found), names in rows.items()
    ]
    return "\n".join(lines)


def short_markdown() -> str:
    """Writes the table of docs/share.md: a row for a group of families, and how equal a format is."""
    lines = [f"| | {' | '.join(f'`{format}`' for format in FORMATS)} |", "|---" * (len(FORMATS) + 1) + "|"]
    for group, pattern in GROUPS.items():
        families = [family for family in FAMILIES if re.fullmatch(pattern, family)]
        cells = [_in_short({_sign(expected(family, format)) for family in families}) for format in FORMATS]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    largest = [
        max(allowed(name, format) for name in FAMILIES if not isinstance(expected(name, format), Refused))
        for format in FORMATS
    ]
    lines.append(
        f"| differs by at most | {' | '.join(f'{figure:.0e}' if figure else '0' for figure in largest)} |"
    )
    return "\n".join(lines)


def _in_short(signs: set[str]) -> str:
    """Puts what becomes of a group's families into one cell."""
    if len(signs) == 1:
        return signs.pop()
    return "some" if "-" in signs else "some at own size"


def _sign(should: str) -> str:
    if isinstance(should, Refused):
        return "if named" if should == _UNNAMED else "-"
    return SIGNS[should]


def shown() -> dict[Path, str]:
    """Says where which table stands."""
    root = Path(__file__).parents[1]
    return {
        root / "phreg" / "formats" / "export" / "README.md": markdown(),
        root / "docs" / "share.md": short_markdown(),
    }


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(shown().values()) + "\n")
