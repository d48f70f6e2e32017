"""The timm format: a folder that plain `timm.create_model("local-dir:…", pretrained=True)` loads.

A patched timm model is one that timm could have built (see `phreg.backbones.timm`), so nothing is converted:
the tensors are the model's own, and the registers are among its construction arguments. The config is put
together here, and not by timm's `save_for_hf`, which writes `num_classes` among those arguments, where
transformers' wrapper stumbles over it, and the tag and licence of the architecture's default weights for a
model whose weights are others.
"""

import json
from typing import Any

import timm
from timm.models import filter_pretrained_cfg, get_model_args, get_model_input_config
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.backbones.timm import TimmBackbone
from phreg.backbones.timm import load as load
from phreg.exports.base import Contents

PROVENANCE = {"tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"}
"""Settings that say where weights come from."""

FOREIGN = {"state_dict", "architecture", "custom_load", "label_offset"}
"""Settings about a file that was loaded, and no longer about the model."""

LABELS = {"label_names", "label_descriptions"}
TEST_SIZE = {"test_input_size", "test_pool_size"}


def why_not(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    if not isinstance(backbone, TimmBackbone):
        return f"it is a model of {backbone.spec.library}, and phreg does not convert those to timm"
    architecture = _architecture(backbone.model)
    if not architecture:
        return (
            "it was built by calling its class, so timm has no name to build it by "
            "(build it by timm.create_model instead)"
        )
    if not timm.is_model(architecture):
        return f"timm {timm.__version__} knows no architecture {architecture!r}"
    objects = [name for name, value in _arguments(backbone.model).items() if not _is_plain(value)]
    if objects:
        return f"it was built with {', '.join(sorted(objects))}, which cannot be written down as JSON"
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the model's timm folder holds."""
    model: Any = backbone.model
    weights = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    fixed = get_model_input_config(model)["fixed_input_size"]
    dropped = set(FOREIGN)
    if fixed:
        dropped |= TEST_SIZE
    if model.num_classes != weights.get("num_classes"):
        dropped |= LABELS
    # Without a folder or repository that it came with, timm's entry is that of the architecture's default
    # weights, whatever weights the model has.
    if not model.pretrained_cfg.get("source"):
        dropped |= PROVENANCE
    weights = {name: value for name, value in weights.items() if name not in dropped}
    config = {
        "architecture": _architecture(model),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": _arguments(model),
        "pretrained_cfg": weights
        | {
            "input_size": (3, *backbone.spec.input_size),
            "fixed_input_size": fixed,
            "mean": backbone.spec.mean,
            "std": backbone.spec.std,
            "num_classes": model.num_classes,
        },
    }
    return Contents(backbone.disk_state(), {"config.json": config})


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Calls the model as its users do: logits, or what it gives in their place."""
    return backbone.model(images)


def _architecture(model: Any) -> str | None:
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture")


def _arguments(model: Any) -> dict[str, Any]:
    return {name: value for name, value in get_model_args(model).items() if name != "num_classes"}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
