"""Distils a model from its own moved views, without looking for sinks."""

from typing import Any

from phreg.methods.base import Method, add_registers

SETTINGS: dict[str, Any] = {
    "register_init": "neutral",
    "epochs": 8,
    "views.fill": "context",
    "loss.mse": 0.0,
    "loss.relative_mse": 1.0,
    "loss.pooled": 0.25,
    "loss.relocation": 1.0,
    "unlock.roles": ("vectors",),
    "unlock.lora.rank": "auto",
    "unlock.lora.blocks": "all",
    "optim.trust_region": True,
    "optim.lr": 1e-2,
    "optim.final_lr": 2e-4,
    "optim.warmup_steps": 10,
    "measure.keep_best": True,
}
"""What phreg's own methods share: a small set of weights, at rates measured on the model, and the best state.

Nothing here depends on the scale of a model's weights or features (benchmarks/methods).
"""


METHOD = Method(
    name="denoise",
    summary="distil the model from its own moved views, without looking for sinks",
    add=add_registers,
    settings=SETTINGS,
    needs_sinks=False,
    reasons=("headroom",),
)
