"""The open_clip format: a folder that plain `open_clip.create_model_and_transforms("local-dir:…")` loads.

open_clip's own image tower has no registers, but the models of timm that it wraps have. So the image tower is
written as one of timm's, and the text tower as it is:

    image tower ──timm format──► config.json, model.safetensors          a timm folder in its own right
    the whole   ───────────────► open_clip_config.json ─"timm_model_name": "local-dir:…/this folder"
                                 open_clip_model.safetensors

open_clip passes `timm_model_name` on to timm, which reads the registers from the config.json that it finds
there. The price is that the folder knows its own path: moved, it needs a new one in that one line, or on the
hub `hf-hub:owner/name`.
"""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any, cast

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, cat, nn, randint

from phreg.backbones import hub
from phreg.backbones import open_clip as adapter
from phreg.backbones.base import Backbone
from phreg.backbones.open_clip import NativeTower, TimmTower
from phreg.formats.export import timm
from phreg.formats.export.from_open_clip import activation
from phreg.formats.export.opening import open_stock
from phreg.formats.export.spec import FOLDER, WEIGHTS, Card, Contents, FormatSpec, Write
from phreg.formats.export.towers import ratio
from phreg.seeding import keyed_generator

log = logging.getLogger(__name__)

BPE_WORDS = 49408
"""Size of the vocabulary of CLIP's own tokenizer, which open_clip brings along."""

TOKENIZER = ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
"""Settings of a text tower that name its tokenizer."""

TOKENIZER_FILES = ("*token*.json", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model")
"""What the files of a tokenizer are called."""


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    model: Any = backbone.model
    if not isinstance(backbone, NativeTower | TimmTower):
        found = "phreg converts none of transformers" if hasattr(model, "text_model") else "it has none"
        return f"an open_clip folder holds a text tower too, and {found}"
    if isinstance(model, CoCa):
        return "it writes captions (CoCa), from image tokens pooled in a way that no tower of timm has"
    if not isinstance(model, CLIP | CustomTextCLIP):
        return (
            "an open_clip folder holds a text tower too, and it is an image tower alone; give the whole model"
        )
    reason = timm.unsupported_reason(backbone)
    if reason:
        return f"its image tower would be a model of timm, and {reason}"
    text = _text(model)
    if not isinstance(text, TextTransformer | CLIP):
        return (
            f"its text tower is a {type(text).__name__}, which open_clip could not build without its origin"
        )
    block: Any = text.transformer.resblocks[0]
    if type(block) is not ResidualAttentionBlock or activation(block.mlp.gelu) is None:
        return "its text tower has blocks whose settings cannot be read off them"
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the model's folder holds."""
    model: Any = backbone.model
    image = timm.contents(backbone)
    named, files = _tokenizer(backbone)
    config = {
        "embed_dim": _joint_width(_text(model)),
        "quick_gelu": activation(_text(model).transformer.resblocks[0].mlp.gelu) == "quick_gelu",
        "custom_text": isinstance(model, CustomTextCLIP),
        "vision_cfg": {"timm_model_name": f"local-dir:{FOLDER}", **_image_settings(backbone, image)},
        "text_cfg": _text_settings(_text(model)) | named,
    }
    if model.logit_bias is not None:
        config["init_logit_bias"] = 0.0
    if model.logit_scale.ndim:
        config["nonscalar_logit_scale"] = True
    return Contents(
        tensors={**image.tensors, "open_clip_model.safetensors": _tensors(backbone, image)},
        settings={
            **image.settings,
            "open_clip_config.json": {"model_cfg": config, "preprocess_cfg": _preparation(backbone)},
        },
        tolerance=image.tolerance,
        files=files,
    )


def load(folder: Path) -> Backbone:
    """Reads the folder by open_clip's own loader, in eval mode and fp32."""
    return adapter.load(folder)


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Encodes images, and as many random texts, as their users do, to unit length, side by side."""
    model: Any = backbone.model
    shape = (len(images), model.context_length)
    texts = randint(model.vocab_size, shape, generator=keyed_generator("export", "texts"))
    return cat(
        [
            model.encode_image(images, normalize=True),
            model.encode_text(texts.to(images.device), normalize=True),
        ],
        dim=1,
    )


# -- the image tower -----------------------------------------------------------------------------------------


def _image_settings(backbone: Backbone, image: Contents) -> dict[str, Any]:
    """Says how open_clip wraps the timm model: what it pools, and where it keeps the projection."""
    projection = _projection(backbone)
    has_head = projection is None and image.settings["config.json"]["num_classes"] > 0
    settings = {
        "image_size": list(backbone.spec.input_size),
        "timm_pool": image.settings["config.json"]["global_pool"],
        "timm_proj": "linear" if projection else "" if has_head else "none",
    }
    return settings | ({"timm_proj_bias": True} if projection and len(projection) > 1 else {})


def _projection(backbone: Backbone) -> dict[str, Tensor] | None:
    """Finds the projection that open_clip keeps beside the timm model; None where there is none."""
    tower: Any = cast(Any, backbone).tower
    if isinstance(backbone, TimmTower):
        layer = getattr(tower.head, "proj", None)
        return None if layer is None else dict(layer.state_dict())
    return None if tower.proj is None else {"weight": tower.proj.T}


def _tensors(backbone: Backbone, image: Contents) -> dict[str, Tensor]:
    """Puts the weights of both towers together, as open_clip names them."""
    tensors = {
        name: tensor for name, tensor in backbone.disk_state().items() if not name.startswith("visual.")
    }
    projection = _projection(backbone)
    for name, tensor in image.tensors[WEIGHTS].items():
        if projection is None or not name.startswith("head."):
            tensors[f"visual.trunk.{name}"] = tensor
    return tensors | {f"visual.head.proj.{name}": tensor for name, tensor in (projection or {}).items()}


def _preparation(backbone: Backbone) -> dict[str, Any]:
    noted = getattr(cast(Any, backbone).tower, "preprocess_cfg", {})
    known = {name: noted[name] for name in ("interpolation", "resize_mode", "fill_color") if name in noted}
    return {"mean": backbone.spec.mean, "std": backbone.spec.std} | known


# -- the text tower ------------------------------------------------------------------------------------------


def _text(model: Any) -> Any:
    """Finds the text tower, whose parts a plain CLIP holds itself."""
    return model.text if isinstance(model, CustomTextCLIP) else model


def _joint_width(text: Any) -> int:
    projection = text.text_projection
    if projection is None:
        return text.token_embedding.embedding_dim
    return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]


def _text_settings(text: Any) -> dict[str, Any]:
    """Reads the settings of a text tower off its modules, since open_clip's models do not keep them."""
    block, width, eps = text.transformer.resblocks[0], text.token_embedding.embedding_dim, text.ln_final.eps
    inside = isinstance(text, CLIP)
    settings = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": width,
        "heads": block.attn.num_heads,
        "layers": len(text.transformer.resblocks),
        "mlp_ratio": ratio(block.mlp.c_fc.out_features, width),
        "ls_init_value": 1e-5 if hasattr(block.ls_1, "gamma") else None,
        "embed_cls": getattr(text, "cls_emb", None) is not None,
        "pad_id": getattr(text, "pad_id", 0),
        "eos_id": text.text_eos_id if inside else text.eos_id,
        "pool_type": text.text_pool_type if inside else text.pool_type,
        "no_causal_mask": text.attn_mask is None,
        "proj_type": "none" if text.text_projection is None else "linear",
        "proj_bias": isinstance(text.text_projection, nn.Linear),
        "output_tokens": getattr(text, "output_tokens", False),
        "norm_kwargs": {"eps": eps},
    }
    if activation(block.mlp.gelu) == "gelu_tanh":
        settings["act_kwargs"] = {"approximate": "tanh"}
    return settings


def _tokenizer(backbone: Backbone) -> tuple[dict[str, Any], dict[str, Write]]:
    """Finds the tokenizer's settings and files, where it is none of open_clip's own.

    Raises:
        LoadError: It is on the hub, and cannot be fetched.
    """
    tower = cast(NativeTower | TimmTower, backbone)
    known = tower.config["model_cfg"]["text_cfg"] if tower.config else {}
    settings = {name: known[name] for name in TOKENIZER if known.get(name)}
    if "hf_tokenizer_name" not in settings:
        if cast(Any, backbone.model).vocab_size != BPE_WORDS:
            log.warning(
                "the tokenizer of %s is not known, since the model was not loaded from where it is named; "
                "the exported folder has none, so tokenize texts as before",
                backbone.describe(),
            )
        return settings, {}
    found: list[Path] = []
    if tower.origin:
        folder = Path(tower.origin.removeprefix("local-dir:"))
        found = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)]
    if not found:
        folder = hub.snapshot(settings["hf_tokenizer_name"], None, TOKENIZER_FILES)
        found = [path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)]
    return settings, {path.name: partial(shutil.copyfile, path) for path in found}


SPEC = FormatSpec(
    name="open_clip",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=load,
    answer=answer,
    open=open_stock,
    load_line='open_clip.create_model_and_transforms("local-dir:{folder}")',
    card=Card(
        library="open_clip",
        code=(
            "import open_clip\n\n"
            'model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{repository}")'
        ),
    ),
)
