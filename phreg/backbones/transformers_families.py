"""What phreg knows about the vision transformers of transformers, one row per family.

A tower is the module that turns pixels into tokens: the model itself (`Dinov2Model`) or its child
(`CLIPModel.vision_model`). Every path below is relative to the tower; paths of an attention's parts are
relative to a block. Nothing else in phreg depends on how transformers names a module.
"""

from dataclasses import dataclass, replace
from typing import Literal

from phreg.backbones.base import Triple

IMAGENET: tuple[Triple, Triple] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: tuple[Triple, Triple] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF: tuple[Triple, Triple] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Family:
    """The facts of one architecture.

    Attributes:
        name: The `model_type` of its vision config.
        towers: Classes that are its towers.
        blocks: Path of the block list.
        final_norm: Path of the norm after the blocks.
        attention_norm: Path, in a block, of the norm before attention.
        attention: Path, in a block, of the attention, whose projections are `q_proj`, `k_proj` and `v_proj`.
        out: Name of the attention's output projection.
        mlp: Path, in a block, of the MLP, whose layers are named as in one of `MLPS`.
        pos_embed: Path of the stored position table, a parameter whose last two axes are positions and width;
            None without.
        patch_embed: Paths of the patch embedding.
        cls: Paths of the tokens that the model came with, CLS first.
        pre_norm: Path of a norm between embeddings and blocks; None without.
        sizes: How it runs at other sizes: given `interpolate_pos_encoding` (`keyword`), without being told
            (`always`), or not at all (`own`), except where its config leaves the table out.
        antialias: Whether it resamples its table, bicubically, with antialiasing.
        normalisation: Mean and standard deviation of the input, where no image processor says otherwise.
    """

    name: str
    towers: tuple[str, ...]
    blocks: str
    final_norm: str
    attention_norm: str
    attention: str
    out: str
    pos_embed: str | None
    patch_embed: tuple[str, ...]
    cls: tuple[str, ...]
    mlp: str = "mlp"
    pre_norm: str | None = None
    sizes: Literal["keyword", "always", "own"] = "keyword"
    antialias: bool = False
    normalisation: tuple[Triple, Triple] = IMAGENET


_VIT = Family(
    name="vit",
    towers=("ViTModel",),
    blocks="layers",
    final_norm="layernorm",
    attention_norm="layernorm_before",
    attention="attention",
    out="o_proj",
    pos_embed="embeddings.position_embeddings",
    patch_embed=("embeddings.patch_embeddings",),
    cls=("embeddings.cls_token",),
    normalisation=HALF,
)
_DINOV2 = replace(
    _VIT,
    name="dinov2",
    towers=("Dinov2Model", "Dinov2Backbone"),
    blocks="encoder.layer",
    attention_norm="norm1",
    sizes="always",
    normalisation=IMAGENET,
)
_SIGLIP = Family(
    name="siglip_vision_model",
    towers=("SiglipVisionModel",),
    blocks="encoder.layers",
    final_norm="post_layernorm",
    attention_norm="layer_norm1",
    attention="self_attn",
    out="out_proj",
    pos_embed="embeddings.position_embedding.weight",
    patch_embed=("embeddings.patch_embedding",),
    cls=(),
    normalisation=HALF,
)
_CLIP = replace(
    _SIGLIP,
    name="clip_vision_model",
    towers=("CLIPVisionModel",),
    cls=("embeddings.class_embedding",),
    pre_norm="pre_layrnorm",
    normalisation=OPENAI,
)

FAMILIES: tuple[Family, ...] = (
    _VIT,
    replace(
        _VIT,
        name="deit",
        towers=("DeiTModel",),
        cls=("embeddings.cls_token", "embeddings.distillation_token"),
        normalisation=IMAGENET,
    ),
    replace(_VIT, name="vit_msn", towers=("ViTMSNModel",), normalisation=IMAGENET),
    replace(_VIT, name="vit_mae", towers=("ViTMAEModel",), normalisation=IMAGENET),
    replace(_VIT, name="ijepa", towers=("IJepaModel",), cls=(), normalisation=IMAGENET),
    _DINOV2,
    replace(
        _DINOV2,
        name="dinov2_with_registers",
        towers=("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        antialias=True,
        cls=("embeddings.cls_token", "embeddings.register_tokens"),
    ),
    replace(
        _DINOV2,
        name="dinov3_vit",
        towers=("DINOv3ViTModel", "DINOv3ViTBackbone"),
        blocks="model.layer",
        final_norm="norm",
        pos_embed=None,
        cls=("embeddings.cls_token", "embeddings.register_tokens"),
    ),
    _CLIP,
    replace(_CLIP, name="metaclip_2_vision_model", towers=("MetaClip2VisionModel",)),
    _SIGLIP,
    replace(_SIGLIP, name="siglip2_vision_model", towers=("Siglip2VisionModel",), sizes="always"),
    replace(
        _SIGLIP,
        name="aimv2_vision_model",
        towers=("Aimv2VisionModel",),
        final_norm="rms_norm",
        attention_norm="rms_norm1",
        attention="attention",
        mlp="ffn",
        patch_embed=("embeddings.patch_embed", "embeddings.rms_norm"),
        sizes="own",
        normalisation=OPENAI,
    ),
)

TOWERS: dict[str, Family] = {tower: family for family in FAMILIES for tower in family.towers}
"""Tower class name -> its family."""

MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("fc1",), "fc2"),
    (("up_proj",), "down_proj"),
    (("gate_proj", "up_proj"), "down_proj"),
)
"""The layers of an MLP by name: those that feed its hidden units, and the one they write through."""

HEADS = ("visual_projection", "classifier", "cls_classifier", "distillation_classifier")
"""Children of a model, beside its tower, that are part of the image's path."""

_WINDOWS = "its tokens are merged on the way, or attend within windows, so no token lives through all blocks"
_BIAS = "its attention adds a bias per pair of positions, which has no entry for a register"
REFUSED: dict[str, str] = {
    "swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "hiera": _WINDOWS,
    "convnext": "it is a convolutional network without tokens",
    "convnextv2": "it is a convolutional network without tokens",
    "dinov3_convnext": "it is a convolutional network without tokens",
    "resnet": "it is a convolutional network without tokens",
    "beit": _BIAS,
    "data2vec-vision": _BIAS,
    "timm_wrapper": "it wraps a timm model; hand over its .timm_model, and write that by phreg.export, as "
    "the wrapper's save_pretrained does not note registers in its config",
}
"""`model_type` -> why phreg cannot patch it."""
