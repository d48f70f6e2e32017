"""PH-Reg to the letter (arXiv 2505.21501), made for DINOv2- and CLIP-type models."""

from typing import Any

from phreg.methods.base import Method, add_registers

DINOV2: dict[str, Any] = {
    "registers": 16,
    "register_init": "randn",
    "batch_size": 8,
    "data.limit": "all",
    "epochs": 1,
    "target.cache": False,
    "loss.pooled": 0.0,
    "unlock.roles": ("pos_embed", "patch_embed", "block.-1"),
    "optim.final_lr": 5e-6,
    "optim.schedule": "exponential",
    "optim.schedule_unit": "epoch",
}
"""PH-Reg for DINOv2-type models, where it differs from the defaults (PH-Reg code, DINOv2 part)."""

CLIP: dict[str, Any] = DINOV2 | {
    "batch_size": 16,
    "optim.lr": 3e-4,
    "optim.final_lr": 1e-5,
    "target.teacher_readout": "naclip",
    "target.student_readout": "value-only",
    "target.native_size": True,
    "unlock.roles": ("pos_embed", "patch_embed", "block.-2", "block.-1"),
}
"""PH-Reg for CLIP-type models, where it differs from the defaults (PH-Reg code, CLIP part)."""


METHOD = Method(
    name="paper",
    summary="PH-Reg (arXiv 2505.21501) to the letter, for DINOv2- and CLIP-type models",
    add=add_registers,
    settings=DINOV2,
    clip_settings=CLIP,
    needs_sinks=False,
)
