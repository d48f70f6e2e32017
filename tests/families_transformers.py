"""Tiny, seeded models of every transformers family that phreg patches: name -> builder."""

from collections.abc import Callable

import torch
import transformers as hf
from torch import nn

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
WIDE = TINY | {"intermediate_size": 64}
VISION = WIDE | {"projection_dim": 16}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
NAFLEX = {key: value for key, value in WIDE.items() if key != "image_size"} | {"num_patches": 16}
STAGES = {"out_features": ["stage1", "stage3"]}


def build(model_class: type[nn.Module], config: hf.PretrainedConfig) -> nn.Module:
    """Builds a model with random weights, in eval mode, biases, scales and position embeddings included."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Away from the zeros and ones of an initialisation, which would hide a wrong token or norm.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def joint(config_class: type[hf.PretrainedConfig], **vision) -> hf.PretrainedConfig:
    """Configures an image-text model."""
    return config_class(text_config=TEXT, vision_config=vision, projection_dim=16)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "dinov2": lambda: build(hf.Dinov2Model, hf.Dinov2Config(**TINY, mlp_ratio=2)),
    "dinov2-swiglu": lambda: build(hf.Dinov2Model, hf.Dinov2Config(**TINY, mlp_ratio=2, use_swiglu_ffn=True)),
    "dinov2-classifier": lambda: build(
        hf.Dinov2ForImageClassification, hf.Dinov2Config(**TINY, mlp_ratio=2, num_labels=5)
    ),
    "dinov2-backbone": lambda: build(hf.Dinov2Backbone, hf.Dinov2Config(**TINY, mlp_ratio=2, **STAGES)),
    "dinov2-registers": lambda: build(
        hf.Dinov2WithRegistersModel,
        hf.Dinov2WithRegistersConfig(**TINY, mlp_ratio=2, num_register_tokens=2),
    ),
    "dinov2-registers-classifier": lambda: build(
        hf.Dinov2WithRegistersForImageClassification,
        hf.Dinov2WithRegistersConfig(**TINY, mlp_ratio=2, num_register_tokens=2, num_labels=5),
    ),
    "dinov2-registers-backbone": lambda: build(
        hf.Dinov2WithRegistersBackbone,
        hf.Dinov2WithRegistersConfig(**TINY, mlp_ratio=2, num_register_tokens=2, **STAGES),
    ),
    "dinov3": lambda: build(hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**WIDE, num_register_tokens=2)),
    "dinov3-gated": lambda: build(
        hf.DINOv3ViTModel, hf.DINOv3ViTConfig(**WIDE, num_register_tokens=2, use_gated_mlp=True)
    ),
    "dinov3-backbone": lambda: build(
        hf.DINOv3ViTBackbone, hf.DINOv3ViTConfig(**WIDE, num_register_tokens=2, **STAGES)
    ),
    "clip": lambda: build(hf.CLIPModel, joint(hf.CLIPConfig, **VISION)),
    "clip-vision": lambda: build(hf.CLIPVisionModel, hf.CLIPVisionConfig(**VISION)),
    "clip-vision-projection": lambda: build(hf.CLIPVisionModelWithProjection, hf.CLIPVisionConfig(**VISION)),
    "clip-classifier": lambda: build(hf.CLIPForImageClassification, joint(hf.CLIPConfig, **VISION)),
    "metaclip2": lambda: build(hf.MetaClip2Model, joint(hf.MetaClip2Config, **VISION)),
    "metaclip2-vision": lambda: build(hf.MetaClip2VisionModel, hf.MetaClip2VisionConfig(**VISION)),
    "metaclip2-vision-projection": lambda: build(
        hf.MetaClip2VisionModelWithProjection, hf.MetaClip2VisionConfig(**VISION)
    ),
    "siglip": lambda: build(hf.SiglipModel, hf.SiglipConfig(text_config=TEXT, vision_config=WIDE)),
    "siglip-vision": lambda: build(hf.SiglipVisionModel, hf.SiglipVisionConfig(**WIDE)),
    "siglip-classifier": lambda: build(
        hf.SiglipForImageClassification, hf.SiglipConfig(text_config=TEXT, vision_config=WIDE, num_labels=5)
    ),
    "siglip2": lambda: build(hf.Siglip2Model, hf.Siglip2Config(text_config=TEXT, vision_config=NAFLEX)),
    "siglip2-vision": lambda: build(hf.Siglip2VisionModel, hf.Siglip2VisionConfig(**NAFLEX)),
    "siglip2-classifier": lambda: build(
        hf.Siglip2ForImageClassification,
        hf.Siglip2Config(text_config=TEXT, vision_config=NAFLEX, num_labels=5),
    ),
    "vit": lambda: build(hf.ViTModel, hf.ViTConfig(**WIDE)),
    "vit-classifier": lambda: build(hf.ViTForImageClassification, hf.ViTConfig(**WIDE, num_labels=5)),
    "deit": lambda: build(hf.DeiTModel, hf.DeiTConfig(**WIDE)),
    "deit-classifier": lambda: build(
        hf.DeiTForImageClassificationWithTeacher, hf.DeiTConfig(**WIDE, num_labels=5)
    ),
    "vit-msn": lambda: build(hf.ViTMSNModel, hf.ViTMSNConfig(**WIDE)),
    # Its own calls drop patches at random, and a shorter sequence hides from whoever masks registers by its
    # length.
    "vit-mae": lambda: build(hf.ViTMAEModel, hf.ViTMAEConfig(**WIDE, mask_ratio=0.0)),
    "ijepa": lambda: build(hf.IJepaModel, hf.IJepaConfig(**WIDE)),
    "aimv2": lambda: build(hf.Aimv2Model, joint(hf.Aimv2Config, **WIDE)),
    "aimv2-vision": lambda: build(hf.Aimv2VisionModel, hf.Aimv2VisionConfig(**WIDE)),
    "aimv2-native": lambda: build(
        hf.Aimv2VisionModel, hf.Aimv2VisionConfig(**WIDE, is_native=True, use_head=False)
    ),
}
