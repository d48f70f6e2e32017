"""The methods that are compared, as settings of `phreg.distill`, and variants of two of them.

A method without settings needs no distillation: `raw` is the model as it is, `teacher` its average over 10
fresh views. Every row but those two says what it changes from `phreg distill`'s defaults, and nothing else.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from phreg.settings import read_settings

Settings = Mapping[str, Any]
"""Settings of `phreg.distill`, by dotted key."""

UNTRAINED = ("raw", "teacher")
"""Rows that distil nothing."""

OLD: Settings = read_settings("relocate-0.1")[1]
"""The default of phreg 0.1."""

METHODS: dict[str, Settings] = {
    "test-time": {"method": "test-time"},
    "paper": {"method": "paper", "epochs": 1},  # as many views of the teacher as 8 epochs of kept targets
    "no-registers": {**OLD, "registers": 0},
    # Its pooled term wants the unmoved view alone, so a target is one forward.
    "relocation-only": {**OLD, "loss.cosine": 0.0, "loss.mse": 0.0, "views.count": 1},
    "relocate-0.1": OLD,
    "auto": {},
}
"""Methods: settings that differ from the defaults."""


RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""Learning rates that a user may ask for."""


def from_block(first: int | None, depth: int) -> Settings:
    """Unlocks embeddings as the defaults do, but blocks only from `first` on (None: all of them)."""
    blocks = (f"block.{index}" for index in range(first or 0, depth))
    return {**OLD, "unlock.roles": ("pos_embed", "patch_embed", *blocks)}


def low_rank(_first: int | None, depth: int) -> Settings:
    """Unlocks embeddings as the defaults do, and LoRA on all blocks in their place."""
    roles = ("pos_embed", "patch_embed")
    return {**OLD, "unlock.roles": roles, "unlock.lora.rank": 16, "unlock.lora.blocks": depth}


VARIANTS: dict[str, Settings | Callable[[int | None, int], Settings]] = {
    "views-5": {**OLD, "views.count": 5},
    "views-20": {**OLD, "views.count": 20},
    "registers-1": {**OLD, "registers": 1},
    "registers-16": {**OLD, "registers": 16},
    "registers-randn": {**OLD, "register_init": "randn"},
    "images-125": {**OLD, "data.limit": 125},
    "images-250": {**OLD, "data.limit": 250},
    "epochs-2": {**OLD, "epochs": 2},
    "epochs-4": {**OLD, "epochs": 4},
    "epochs-16": {**OLD, "epochs": 16},
    "fill-white": {**OLD, "views.fill": "white"},
    "fill-reflect": {**OLD, "views.fill": "reflect"},
    "fill-mean": {**OLD, "views.fill": "mean"},
    "fill-valid-crop": {**OLD, "views.fill": "valid-crop"},
    "unlock-paper": {**OLD, "unlock.roles": ("pos_embed", "patch_embed", "block.-1")},
    "unlock-from-emergence": from_block,
    "lora-16": low_rank,
    "pooled-0": {**OLD, "loss.pooled": 0.0},
    "pooled-2": {**OLD, "loss.pooled": 2.0},
    "ema": {**OLD, "optim.ema": 0.98},  # 248 steps: an average over the last 50
    "relocation-1.0": {**OLD, "loss.relocation": 1.0},
    "relocation-0.1": {**OLD, "loss.relocation": 0.1},
    "relocation-0": {**OLD, "loss.relocation": 0.0},  # registers and distillation alone
    "before": {**OLD, "loss.relocation": 1.0, "views.fill": "white"},
    "paper-4": {"method": "paper", "epochs": 4},  # takes as long as `relocate-0.1`
    "test-time-1": {"method": "test-time", "registers": 1},
    "auto-forced": {"force": True},
    "auto-pooled-1": {"loss.pooled": 1.0},
    "auto-number": {"loss.relocation_counts": "number", "loss.relocation": 0.3, "loss.pooled": 1.0},
    **{f"auto-lr-{rate:g}": {"force": True, "optim.lr": rate} for rate in RATES},
}
"""Ablations of `relocate-0.1`, each one setting away; `before`, its defaults until two changed; a longer
`paper`; and ablations of `test-time` and `auto`. Two need to know the emergence block or the depth."""

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
