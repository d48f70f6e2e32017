"""Tiny, seeded models of every timm family that phreg patches: name -> builder.

`ARCHITECTURES` holds the same as construction arguments, for tests that build stock counterparts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

TINY = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
FLEX = {
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
    "num_classes": 5,
    "pos_embed_grid_size": (4, 4),
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", TINY | {"patch_size": 8}),
    "vit-no-embed-class": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "no_embed_class": True}),
    "vit-gap": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "class_token": False, "global_pool": "avg"}),
    "vit-qk-norm": (
        "vit_tiny_patch16_224",
        TINY | {"patch_size": 8, "qk_norm": True, "scale_attn_norm": True},
    ),
    "vit-headless": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "num_classes": 0, "global_pool": ""}),
    "deit3": ("deit3_small_patch16_224", TINY | {"patch_size": 8}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", TINY | {"patch_size": 8}),
    "siglip": ("vit_base_patch16_siglip_224", TINY | {"patch_size": 8, "num_classes": 0}),
    "dinov2": ("vit_small_patch14_dinov2", TINY | {"img_size": 56, "num_classes": 0}),
    "dinov2-reg4": ("vit_small_patch14_reg4_dinov2", TINY | {"img_size": 56, "num_classes": 0}),
    "vit-native-rows": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "reg_tokens": 2}),
    "dinov2-swiglu": ("vit_giant_patch14_dinov2", TINY | {"img_size": 56, "num_classes": 0}),
    "eva02": ("eva02_tiny_patch14_224", TINY | {"img_size": 56}),
    "eva02-inner-norm": ("eva02_base_patch14_224", TINY | {"img_size": 56}),
    "eva-post-norm": ("eva_giant_patch14_224", TINY | {"img_size": 56, "use_post_norm": True}),
    "dinov3": ("vit_small_patch16_dinov3", TINY | {"patch_size": 8}),
    "vit-rope": ("vit_small_patch16_rope_224", TINY | {"patch_size": 8}),
    "vit-rope-mixed": ("vit_small_patch16_rope_mixed_224", TINY | {"patch_size": 8}),
    "naflexvit": ("naflexvit_base_patch16_siglip", FLEX),
    "naflexvit-reg": ("naflexvit_base_patch16_gap", FLEX | {"reg_tokens": 2, "class_token": True}),
}


def build(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """Builds a model with random weights, in eval mode, biases, scales and position embeddings included."""
    overlay = {"input_size": (3, *2 * (arguments.get("img_size", 32),)), "pool_size": None}
    if "clip" in architecture:  # weights whose head is a projection of this width
        overlay["num_classes"] = arguments["num_classes"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(architecture, pretrained_cfg_overlay=overlay, **arguments).eval()
        head_bias = getattr(model.head, "bias", None)
        with torch.no_grad():
            for parameter in model.parameters():
                # Away from the zeros and ones of an initialisation, which would hide a wrong token or norm.
                if (
                    architecture.find("clip") < 0 or parameter is not head_bias
                ):  # CLIP projects without a bias
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    name: partial(build, *arguments) for name, arguments in ARCHITECTURES.items()
}
