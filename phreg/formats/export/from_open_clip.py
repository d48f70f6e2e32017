"""Converts image towers of open_clip to timm: its own vision transformer, and timm's models that it wraps.

open_clip's tower has timm's blocks under other names. A timm trunk stays what it is; its projection, which
open_clip keeps beside it, becomes its head.
"""

from typing import Any, cast

from open_clip.transformer import ResidualAttentionBlock
from timm.models import get_model_args
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.backbones.open_clip import NativeTower, TimmTower
from phreg.formats.export.towers import (
    TimmTowerSpec,
    architecture,
    named,
    ratio,
    sequence,
    tolerance,
    unsupported_norm,
)

CROPS = {"shortest": "center", "longest": "border", "squash": "squash"}
"""What timm calls open_clip's ways to resize."""


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why timm has no model that computes what the image tower does; None where it has."""
    tower: Any = cast(Any, backbone).tower
    if isinstance(backbone, TimmTower):
        if set(dict(tower.head.named_children())) - {"drop", "proj"}:
            return "its head is more than a projection, and that of a timm model is not"
        return None
    block: Any = tower.transformer.resblocks[0]
    if type(block) is not ResidualAttentionBlock:
        return f"its blocks are open_clip's {type(block).__name__}, which timm does not have"
    if tower.attn_pool is not None:
        return "its pooler (CoCa's attention) has no counterpart in timm"
    if tower.pool_type == "none":
        return "it does not pool, and a timm model that does not has no projection"
    if tower.pool_type == "avg" and tower.final_ln_after_pool:
        return "it norms the mean of its patches, and so its patches, unlike timm's, are read without a norm"
    if activation(block.mlp.gelu) is None:
        return f"timm has no activation {type(block.mlp.gelu).__name__}"
    return unsupported_norm(tower.ln_post.eps)


def tower(backbone: Backbone) -> TimmTowerSpec:
    """Converts an image tower that `unsupported_reason` lets pass, projection included."""
    if isinstance(backbone, TimmTower):
        return _trunk(backbone)
    native = cast(NativeTower, backbone)
    tower, spec = cast(Any, native.tower), native.spec
    tensors = _blocks(tower) | sequence(
        tower.class_embedding.detach()[None, None],
        tower.positional_embedding.detach()[None],
        None if native.registers is None else native.registers.detach(),
        num_patches=tower.grid_size[0] * tower.grid_size[1],
        class_token=True,
    )
    tensors |= named(patch_embed__proj=tower.conv1, norm_pre=tower.ln_pre, norm=tower.ln_post)
    if tower.proj is not None:
        tensors["head.weight"] = tower.proj.T.detach()
    block, eps = tower.transformer.resblocks[0], tower.ln_post.eps
    arguments = {
        "img_size": list(spec.input_size),
        "patch_size": spec.patch_size[0] if len(set(spec.patch_size)) == 1 else list(spec.patch_size),
        "embed_dim": spec.width,
        "depth": len(native.blocks),
        "num_heads": spec.num_heads,
        "mlp_ratio": ratio(block.mlp.c_fc.out_features, spec.width),
        "init_values": 1e-5 if hasattr(block.ls_1, "gamma") else None,
        "class_token": True,
        "reg_tokens": native.num_registers,
        "no_embed_class": True,
        "pre_norm": not isinstance(tower.ln_pre, nn.Identity),
        "global_pool": {"tok": "token", "avg": "avg"}[tower.pool_type],
        "fc_norm": False,
        "act_layer": activation(block.mlp.gelu),
    }
    return TimmTowerSpec(
        architecture=architecture(eps, "224", spec),
        arguments=arguments,
        tensors=tensors,
        preparation=_preparation(tower),
        tolerance=tolerance(eps),
    )


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Encodes images as the model does."""
    return backbone.run(images)


def activation(layer: Any) -> str | None:
    """Names one of open_clip's activations as timm does; None where timm has none such."""
    if isinstance(layer, nn.GELU):
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    return "quick_gelu" if type(layer).__name__ == "QuickGELU" else None


def _blocks(tower: Any) -> dict[str, Tensor]:
    tensors = {}
    for index, block in enumerate(tower.transformer.resblocks):
        attention = {"weight": block.attn.in_proj_weight, "bias": block.attn.in_proj_bias}
        parts = named(
            norm1=block.ln_1,
            attn__qkv=attention,
            attn__proj=block.attn.out_proj,
            ls1=block.ls_1,
            norm2=block.ln_2,
            mlp__fc1=block.mlp.c_fc,
            mlp__fc2=block.mlp.c_proj,
            ls2=block.ls_2,
        )
        tensors |= {f"blocks.{index}.{name}": tensor for name, tensor in parts.items()}
    return tensors


def _trunk(backbone: TimmTower) -> TimmTowerSpec:
    trunk: Any = backbone.tower.trunk
    tensors = {name: tensor.detach() for name, tensor in trunk.state_dict().items()}
    projection = getattr(backbone.tower.head, "proj", None)
    if projection is not None:
        tensors |= named(head=projection)
    arguments = {name: value for name, value in get_model_args(trunk).items() if name != "num_classes"}
    return TimmTowerSpec(
        architecture=trunk.pretrained_cfg["architecture"],
        arguments=arguments,
        tensors=tensors,
        preparation=_preparation(backbone.tower),
    )


def _preparation(tower: Any) -> dict[str, Any]:
    """Says how images are prepared: as open_clip noted on the tower, else OpenAI's way."""
    noted = getattr(tower, "preprocess_cfg", {})
    return {
        "interpolation": noted.get("interpolation", "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": CROPS[noted.get("resize_mode", "shortest")],
    }
