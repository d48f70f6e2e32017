"""Converts vision towers of transformers to timm.

Where blocks, norms and tokens are is known from `phreg.backbones.transformers_families`; here stands only
what timm calls them.

    ViT, DeiT, ViTMSN, ViTMAE, I-JEPA, DINOv2, CLIP, MetaCLIP 2, SigLIP  ─► VisionTransformer
    DINOv3  ─► Eva          SigLIP 2, which takes any aspect ratio  ─► NaFlexVit

Not converted are models of which timm could build a part only, such as a classifier that reads two tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin

from phreg.backbones.base import first_unpacked
from phreg.backbones.transformers import TransformersBackbone
from phreg.formats.export.towers import (
    CLIP_EPS,
    TimmTowerSpec,
    architecture,
    joined,
    named,
    ratio,
    sequence,
    tolerance,
    unsupported_norm,
)

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
"""What timm calls an activation."""

KINDS = {"dinov2": "dinov2", "dinov2_with_registers": "dinov2", "siglip_vision_model": "siglip_224"}
"""Family -> how the name of its timm model ends; `224` elsewhere."""

_CLIP = ("bicubic", 1.0, "center")
PREPARATION = {
    "clip_vision_model": _CLIP,
    "metaclip_2_vision_model": _CLIP,
    "siglip_vision_model": ("bicubic", 1.0, "squash"),
    "dinov2": ("bicubic", 224 / 256, "center"),
    "dinov2_with_registers": ("bicubic", 224 / 256, "center"),
    "deit": ("bicubic", 224 / 256, "squash"),
}
"""Family -> interpolation, `crop_pct` and `crop_mode` of its images; the others are squashed, bilinearly."""

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""What timm calls pillow's filters."""


def unsupported_reason(backbone: TransformersBackbone) -> str | None:
    """Says why timm has no model that computes the same; None where it has."""
    model, family, config = backbone.model, backbone.family, cast(Any, backbone.tower.config)
    classifier = getattr(model, "classifier", None)
    if isinstance(model, BackboneMixin):
        return "it returns feature maps of several blocks, and a timm model a single output"
    if hasattr(model, "distillation_classifier"):
        return "it has two classifiers, one of them on the distillation token, and a timm model one"
    if getattr(backbone.tower, "pooler", None) is not None:
        return (
            "its pooler (a layer and an activation on CLS) has no counterpart in timm; take it off "
            "(model.pooler = None) if you read tokens alone"
        )
    if isinstance(classifier, nn.Linear) and classifier.in_features != backbone.spec.width:
        return "its classifier reads CLS and the mean of the patches side by side, as no timm model does"
    if classifier is not None and family.pre_norm:
        return "its classifier reads tokens ahead of the final norm, and that of a timm model behind it"
    if family.name == "aimv2_vision_model":
        return "phreg does not convert AIMv2 to timm"
    if config.hidden_act not in ACTIVATIONS:
        return f"timm has no activation {config.hidden_act!r}"
    if family.name == "dinov3_vit":
        return _unsupported_eva(backbone)
    return unsupported_norm(_eps(backbone))


def _unsupported_eva(backbone: TransformersBackbone) -> str | None:
    config: Any = backbone.tower.config
    if _eps(backbone) != CLIP_EPS:
        return f"its norms add {_eps(backbone):g} to the variance, and those of timm's DINOv3 {CLIP_EPS:g}"
    if config.key_bias:
        return "its keys have a bias, and those of timm's DINOv3 none"
    if config.hidden_act != ("silu" if config.use_gated_mlp else "gelu"):
        return f"its activation is {config.hidden_act}, which timm's DINOv3 does not have in such an MLP"
    return None


def tower(backbone: TransformersBackbone) -> TimmTowerSpec:
    """Converts the image's path, classifier or projection included, of a model that is supported."""
    match backbone.family.name:
        case "dinov3_vit":
            name, arguments, tensors = _eva(backbone)
        case "siglip2_vision_model":
            name, arguments, tensors = _naflex(backbone)
        case _:
            name, arguments, tensors = _vision_transformer(backbone)
    patch = backbone.spec.patch_size
    common = {
        "embed_dim": backbone.spec.width,
        "depth": len(backbone.blocks),
        "num_heads": backbone.spec.num_heads,
        "patch_size": patch[0] if patch[0] == patch[1] else list(patch),
        "global_pool": _pooling(backbone),
    }
    tensors |= named(norm=backbone.final_norm) | _head(backbone)
    return TimmTowerSpec(
        architecture=name,
        arguments=common | arguments,
        tensors=tensors,
        preparation=_preparation(backbone),
        labels=_labels(backbone),
        tolerance=tolerance(_eps(backbone)),
    )


def answer(backbone: TransformersBackbone, images: Tensor) -> Tensor:
    """Calls the model as its users do: logits, an embedding in the joint space, or the pooled output."""
    return backbone.logits(images) if hasattr(backbone.model, "classifier") else backbone.run(images)


# -- the three classes of timm -------------------------------------------------------------------------------


def _vision_transformer(backbone: TransformersBackbone) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    blocks, width = _blocks(backbone, "ls1.gamma", "ls2.gamma"), backbone.spec.width
    tensors = blocks | _sequence(backbone) | named(patch_embed__proj=_patch_embedding(backbone))
    if backbone.family.pre_norm:
        tensors |= named(norm_pre=backbone.tower.get_submodule(backbone.family.pre_norm))
    gated = len(blocks["blocks.0.mlp.fc1.weight"]) != blocks["blocks.0.mlp.fc2.weight"].shape[1]
    kind = KINDS.get(backbone.family.name, "224")
    # timm has a packed SwiGLU in this model alone.
    name = "vit_giant_patch14_dinov2" if gated else architecture(_eps(backbone), kind, backbone.spec)
    arguments = {
        "img_size": list(backbone.spec.input_size),
        "mlp_ratio": ratio(len(blocks["blocks.0.mlp.fc1.weight"]), width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in blocks,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in blocks else None,
        "class_token": "cls_token" in tensors,
        "reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "no_embed_class": True,
        "pre_norm": backbone.family.pre_norm is not None,
        "fc_norm": False,
    }
    if not gated:
        arguments["act_layer"] = _activation(backbone)
    return name, arguments, tensors


def _naflex(backbone: TransformersBackbone) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    (height, width), patch = backbone.spec.input_size, backbone.spec.patch_size
    grid = (height // patch[0], width // patch[1])
    blocks, begin = _blocks(backbone, "ls1.gamma", "ls2.gamma"), _sequence(backbone)
    begin["pos_embed"] = begin["pos_embed"].unflatten(1, grid)
    embeds = begin | named(proj=_patch_embedding(backbone))
    arguments = {
        "mlp_ratio": ratio(len(blocks["blocks.0.mlp.fc1.weight"]), backbone.spec.width),
        "reg_tokens": begin["reg_token"].shape[1] if "reg_token" in begin else 0,
        "pos_embed_grid_size": list(grid),
        "act_layer": _activation(backbone),
        "fc_norm": False,
    }
    tensors = blocks | {f"embeds.{name}": tensor for name, tensor in embeds.items()}
    return "naflexvit_base_patch16_siglip", arguments, tensors


def _eva(backbone: TransformersBackbone) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    config: Any = backbone.tower.config
    tensors = _blocks(backbone, "gamma_1", "gamma_2")
    for index in range(len(backbone.blocks)):
        attention = f"blocks.{index}.attn"
        if f"{attention}.qkv.bias" in tensors:
            query, _, value = tensors.pop(f"{attention}.qkv.bias").chunk(3)
            tensors |= {f"{attention}.q_bias": query, f"{attention}.v_bias": value}
    tensors |= _sequence(backbone) | named(patch_embed__proj=_patch_embedding(backbone))
    arguments = {
        "img_size": list(backbone.spec.input_size),
        "mlp_ratio": ratio(config.intermediate_size, backbone.spec.width),
        "qkv_bias": config.query_bias or config.value_bias,
        "init_values": 1e-5,
        "num_reg_tokens": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "rope_temperature": config.rope_theta,
        "swiglu_mlp": config.use_gated_mlp,
        "swiglu_align_to": 0,
        "use_fc_norm": False,
    }
    return "vit_small_patch16_dinov3", arguments, tensors


# -- parts ---------------------------------------------------------------------------------------------------


def _blocks(backbone: TransformersBackbone, *scales: str) -> dict[str, Tensor]:
    """Converts all blocks; `scales` is what timm calls the two layer scales."""
    tensors = {}
    for index, block in enumerate(backbone.blocks):
        attention: Any = block.get_submodule(backbone.family.attention)
        mlp = cast(nn.Module, block.mlp)
        # A gated MLP is one packed layer in timm, the gate first.
        first_block_input = (
            (mlp.gate_proj, mlp.up_proj) if hasattr(mlp, "gate_proj") else (_child(mlp, "fc1", "up_proj"),)
        )
        parts = named(
            norm1=block.get_submodule(backbone.family.attention_norm),
            norm2=_child(block, "norm2", "layer_norm2", "layernorm_after"),
            attn__qkv=joined(attention.q_proj, attention.k_proj, attention.v_proj),
            attn__proj=attention.get_submodule(backbone.family.out),
            mlp__fc1=joined(*cast(Any, first_block_input)),
            mlp__fc2=_child(mlp, "fc2", "down_proj"),
        )
        for number, scale in enumerate(scales, start=1):
            layer: Any = getattr(block, f"layer_scale{number}", None)
            if layer is not None:
                parts[scale] = layer.lambda1.detach()
        tensors |= {f"blocks.{index}.{name}": tensor for name, tensor in parts.items()}
    return tensors


def _sequence(backbone: TransformersBackbone) -> dict[str, Tensor]:
    """Converts CLS, registers and positions."""
    own, family, spec = dict(backbone.tower.named_parameters()), backbone.family, backbone.spec
    tokens = [own[path].detach().reshape(1, -1, spec.width) for path in family.cls if path in own]
    none = first_unpacked(backbone.tower.parameters()).detach().new_empty(1, 0, spec.width)
    table = own[family.pos_embed].detach().reshape(1, -1, spec.width) if family.pos_embed else None
    return sequence(
        torch.cat([none, *tokens], dim=1),
        table,
        None if backbone.registers is None else backbone.registers.detach(),
        num_patches=spec.grid[0] * spec.grid[1],
        class_token=bool(family.cls),
    )


def _patch_embedding(backbone: TransformersBackbone) -> nn.Module:
    module = backbone.tower.get_submodule(backbone.family.patch_embed[0])
    return cast(nn.Module, getattr(module, "projection", module))


def _pooling(backbone: TransformersBackbone) -> str:
    """Says how the model pools, in timm's words."""
    if backbone.spec.num_prefix:
        return "token"
    # A classifier of SigLIP reads the mean of its patches, whether or not there is a pooling head.
    pools = hasattr(backbone.tower, "head") and not hasattr(backbone.model, "classifier")
    return "map" if pools else "avg"


def _head(backbone: TransformersBackbone) -> dict[str, Tensor]:
    """Converts what comes after the final norm: attention pooling, and a classifier or projection."""
    tensors = {}
    if _pooling(backbone) == "map":
        pooling: Any = backbone.tower.head
        attention, width = pooling.attention, backbone.spec.width
        query, key_value = (
            {"weight": weight, "bias": bias}
            for weight, bias in zip(
                attention.in_proj_weight.detach().split([width, 2 * width]),
                attention.in_proj_bias.detach().split([width, 2 * width]),
                strict=True,
            )
        )
        tensors = {"attn_pool.latent": pooling.probe.detach()} | named(
            attn_pool__q=query,
            attn_pool__kv=key_value,
            attn_pool__proj=attention.out_proj,
            attn_pool__norm=pooling.layernorm,
            attn_pool__mlp__fc1=pooling.mlp.fc1,
            attn_pool__mlp__fc2=pooling.mlp.fc2,
        )
    classifier = getattr(backbone.model, "classifier", None)
    if isinstance(classifier, nn.Linear):
        tensors |= named(head=classifier)
    elif backbone.projection is not None:
        tensors["head.weight"] = backbone.projection.T.detach()
    return tensors


def _child(module: nn.Module, *names: str) -> nn.Module:
    """Finds the child that goes by one of some names."""
    return next(child for name, child in module.named_children() if name in names)


def _eps(backbone: TransformersBackbone) -> float:
    return cast(Any, backbone.final_norm).eps


def _activation(backbone: TransformersBackbone) -> str:
    return ACTIVATIONS[cast(Any, backbone.tower.config).hidden_act]


def _labels(backbone: TransformersBackbone) -> list[str] | None:
    """Names the classes, unless they only have numbers."""
    if not isinstance(getattr(backbone.model, "classifier", None), nn.Linear):
        return None
    names = [label for _, label in sorted(cast(Any, backbone.model.config).id2label.items())]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _preparation(backbone: TransformersBackbone) -> dict[str, Any]:
    """Says how images are prepared: as the model's own image processor does, else as its family's."""
    kind, settings = backbone.family.name, backbone.image_processor
    interpolation, crop_pct, crop_mode = PREPARATION.get(kind, ("bilinear", 1.0, "squash"))
    if settings.get("size"):
        size, cut = settings["size"], settings.get("crop_size") if settings.get("do_center_crop") else None
        if isinstance(size, int):  # as older processors wrote it
            size = {"height" if crop_mode == "squash" else "shortest_edge": size}
        side = size.get("shortest_edge") or size["height"]
        crop_pct = ((cut["height"] if isinstance(cut, dict) else cut) or side) / side
        crop_mode = "squash" if "height" in size else "center"
    return {
        "interpolation": RESAMPLING.get(settings.get("resample", -1), interpolation),
        "crop_pct": crop_pct,
        "crop_mode": crop_mode,
    }
