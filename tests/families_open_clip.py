"""Tiny, seeded models of every kind of image tower that open_clip has and phreg patches: name -> builder."""

from collections.abc import Callable
from typing import Any

import timm
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from torch import nn

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
CAPTIONS = {"text_cfg": TEXT | {"embed_cls": True, "output_tokens": True}, "multimodal_cfg": TEXT}
ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
TRUNK = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 0}


def clip(model_class: type[nn.Module] = CLIP, *, quick_gelu: bool = False, **vision: Any) -> nn.Module:
    """Builds an image-text model with a native tower; `vision` is what differs from the plain one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        more = CAPTIONS if model_class is CoCa else {"text_cfg": TEXT}
        model = model_class(embed_dim=16, vision_cfg=VISION | vision, quick_gelu=quick_gelu, **more)
        return shaken(model)


def clip_around_timm(*, pool: str, proj: str, **trunk: Any) -> nn.Module:
    """Builds an image-text model with a timm tower; `trunk` is what differs from a plain transformer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # open_clip passes no settings on to timm, so the trunk is put in afterwards; both are 64 wide.
        vision = {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": pool, "timm_proj": proj}
        model = CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=TEXT)
        model.visual.trunk = timm.create_model("vit_tiny_patch16_224", global_pool=pool, **TRUNK | trunk)
        return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """Moves parameters off the zeros and ones of an initialisation, which would hide a wrong token."""
    with torch.no_grad():
        if isinstance(model, CoCa):  # of which open_clip leaves this as the memory was
            nn.init.normal_(model.text_decoder.text_projection, std=0.1)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "clip": clip,
    "clip-quickgelu": lambda: clip(quick_gelu=True),
    "custom-text": lambda: clip(CustomTextCLIP),
    "no-pre-norm": lambda: clip(no_ln_pre=True),
    "average": lambda: clip(pool_type="avg", final_ln_after_pool=True),
    "layer-scale": lambda: clip(ls_init_value=0.5),
    "coca": lambda: clip(CoCa, **ATTENTION_POOL),
    "tower": lambda: clip().visual,
    "timm": lambda: clip_around_timm(pool="token", proj="linear", pre_norm=True),
    "timm-head": lambda: clip_around_timm(pool="token", proj="", num_classes=64),
    "siglip": lambda: clip_around_timm(pool="map", proj="none", class_token=False),
}
