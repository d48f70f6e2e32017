"""The methods that are compared, as settings of `phreg.distill`, and variants of the default.

A method without settings needs no distillation: `raw` is the model as it is, `teacher` its average over 10
fresh views. Every row but those two says what it changes from `phreg distill`'s defaults, and nothing else.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

Settings = Mapping[str, Any]
"""Settings of `phreg.distill`, by dotted key."""

UNTRAINED = ("raw", "teacher")
"""Rows that distil nothing."""

METHODS: dict[str, Settings] = {
    "test-time": {"method": "test-time"},
    "paper": {"method": "paper", "epochs": 1},  # as many views of the teacher as 8 epochs of kept targets
    "no-registers": {"registers": 0},
    # Its pooled term wants the unmoved view alone, so a target is one forward.
    "relocation-only": {"loss.cosine": 0.0, "loss.mse": 0.0, "views.count": 1},
    "relocate": {},
}
"""Methods: settings that differ from the defaults."""


def from_block(first: int | None, depth: int) -> Settings:
    """Unlocks embeddings as the defaults do, but blocks only from `first` on (None: all of them)."""
    blocks = (f"block.{index}" for index in range(first or 0, depth))
    return {"unlock.roles": ("pos_embed", "patch_embed", *blocks)}


def low_rank(_first: int | None, depth: int) -> Settings:
    """Unlocks embeddings as the defaults do, and LoRA on all blocks in their place."""
    roles = ("pos_embed", "patch_embed")
    return {"unlock.roles": roles, "unlock.lora.rank": 16, "unlock.lora.blocks": depth}


VARIANTS: dict[str, Settings | Callable[[int | None, int], Settings]] = {
    "views-5": {"views.count": 5},
    "views-20": {"views.count": 20},
    "registers-1": {"registers": 1},
    "registers-16": {"registers": 16},
    "registers-randn": {"register_init": "randn"},
    "images-125": {"data.limit": 125},
    "images-250": {"data.limit": 250},
    "epochs-2": {"epochs": 2},
    "epochs-4": {"epochs": 4},
    "epochs-16": {"epochs": 16},
    "fill-white": {"views.fill": "white"},
    "fill-reflect": {"views.fill": "reflect"},
    "fill-mean": {"views.fill": "mean"},
    "fill-valid-crop": {"views.fill": "valid-crop"},
    "unlock-paper": {"unlock.roles": ("pos_embed", "patch_embed", "block.-1")},
    "unlock-from-emergence": from_block,
    "lora-16": low_rank,
    "pooled-0": {"loss.pooled": 0.0},
    "pooled-2": {"loss.pooled": 2.0},
    "ema": {"optim.ema": 0.98},  # 248 steps: an average over the last 50
    "relocation-1.0": {"loss.relocation": 1.0},
    "relocation-0.1": {"loss.relocation": 0.1},
    "relocation-0": {"loss.relocation": 0.0},  # registers and distillation alone
    "before": {"loss.relocation": 1.0, "views.fill": "white"},
    "paper-4": {"method": "paper", "epochs": 4},  # takes as long as `relocate`
}
"""Ablations of `relocate`, each one setting away; `before`, its defaults until two of them changed; and a
longer `paper`. Two need to know the emergence block or the depth."""

ROWS = (*UNTRAINED, *METHODS, *VARIANTS)
"""Everything that `--methods` takes, in the order of the table."""


def settings(name: str, emergence: int | None, depth: int) -> dict[str, Any]:
    """Says what a method passes to `phreg.distill`, given the raw model's emergence block and depth."""
    found = (METHODS | VARIANTS)[name]
    return dict(found(emergence, depth) if callable(found) else found)


# -- on the command lines of the benchmarks that run them ----------------------------------------------------


def names(text: str) -> list[str]:
    """Reads names given as A,B on the command line."""
    return text.split(",")


def setting(text: str) -> tuple[str, Any]:
    """Reads a setting given as KEY=JSON on the command line."""
    key, _, value = text.partition("=")
    return key, json.loads(value)
