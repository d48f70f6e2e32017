"""The timm format: a folder that plain `timm.create_model("local-dir:…", pretrained=True)` loads.

A patched timm model is one that timm could have built (see `phreg.backbones.timm`), so its tensors are
written as they are, and the registers are among its construction arguments. Vision towers of other libraries
become such models first (`phreg.formats.export.towers`). A text tower is left out: timm has none.

    timm model ────────────────────────────────┬──► config.json, model.safetensors
    tower of transformers or open_clip ──build─┘

The config is put together here, and not by timm's `save_for_hf`, which writes `num_classes` among those
arguments, where transformers' wrapper stumbles over it, and the tag and licence of the architecture's default
weights for a model whose weights are others.
"""

import importlib
import json
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import timm
from timm.models import filter_pretrained_cfg, get_model_args, get_model_input_config
from torch import Tensor

from phreg.backbones import timm as adapter
from phreg.backbones.base import Backbone
from phreg.backbones.timm import TimmBackbone
from phreg.formats.export import towers
from phreg.formats.export.opening import open_stock
from phreg.formats.export.spec import TOLERANCE, WEIGHTS, Card, Contents, FormatSpec
from phreg.formats.export.towers import TimmTowerSpec

PROVENANCE = {"tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"}
"""Settings that say where weights come from."""

FOREIGN = {"state_dict", "architecture", "custom_load", "label_offset"}
"""Settings about a file that was loaded, and no longer about the model."""

LABELS = {"label_names", "label_descriptions"}
TEST_SIZE = {"test_input_size", "test_pool_size"}


@runtime_checkable
class Converter(Protocol):
    """The module that converts the towers of a library to timm."""

    def unsupported_reason(self, backbone: Backbone) -> str | None:
        """Says why timm has no model that computes the same; None where it has."""
        ...

    def tower(self, backbone: Backbone) -> TimmTowerSpec:
        """Converts the image's path through the model."""
        ...

    def answer(self, backbone: Backbone, images: Tensor) -> Tensor:
        """Calls the model as its users do, at the images' size."""
        ...


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    # open_clip may keep a model of timm, which is then as timm's own are.
    trunk = getattr(backbone, "trunk", backbone)
    if isinstance(trunk, TimmBackbone):
        reason = _unsupported_timm(trunk.model)
        if reason or trunk is backbone:
            return reason
    return _converter(backbone).unsupported_reason(backbone)


def _unsupported_timm(model: Any) -> str | None:
    architecture = _architecture(model)
    if not architecture:
        return (
            "it was built by calling its class, so timm has no name to build it by "
            "(build it by timm.create_model instead)"
        )
    if not timm.is_model(architecture):
        return f"timm {timm.__version__} knows no architecture {architecture!r}"
    objects = [name for name, value in _arguments(model).items() if not _is_plain(value)]
    if objects:
        return f"it was built with {', '.join(sorted(objects))}, which cannot be written down as JSON"
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the model's timm folder holds."""
    if isinstance(backbone, TimmBackbone):
        return _contents(backbone, TOLERANCE)
    tower = _converter(backbone).tower(backbone)
    return _contents(towers.build(tower, backbone.spec), tower.tolerance)


def _contents(backbone: TimmBackbone, tolerance: float) -> Contents:
    model: Any = backbone.model
    weights = filter_pretrained_cfg(model.pretrained_cfg, remove_source=True, remove_null=True)
    fixed = get_model_input_config(model)["fixed_input_size"]
    dropped = FOREIGN | LABELS
    if fixed:
        dropped |= TEST_SIZE
    # Without a folder or repository that it came with, timm's entry is that of the architecture's default
    # weights, whatever weights the model has.
    if not model.pretrained_cfg.get("source"):
        dropped |= PROVENANCE
    same_classes = model.num_classes == weights.get("num_classes")
    labels = {name: weights[name] for name in LABELS & weights.keys() if same_classes}
    weights = {name: value for name, value in weights.items() if name not in dropped}
    config = {
        "architecture": _architecture(model),
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "global_pool": model.global_pool,
        "model_args": _arguments(model),
        **labels,
        "pretrained_cfg": weights
        | {
            "input_size": (3, *backbone.spec.input_size),
            "fixed_input_size": fixed,
            "mean": backbone.spec.mean,
            "std": backbone.spec.std,
            "num_classes": model.num_classes,
        },
    }
    if adapter.is_clip(model, config["pretrained_cfg"]) and not backbone.is_clip:
        config["pretrained_cfg"]["notes"] = [*weights.get("notes", ()), adapter.CLASSIFIER]
    return Contents({WEIGHTS: backbone.disk_state()}, {"config.json": config}, tolerance=tolerance)


def load(folder: Path) -> Backbone:
    """Reads a timm folder by timm's own loader, in eval mode and fp32."""
    return adapter.load(folder)


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Calls the model as its users do: logits, an embedding in the joint space, or the pooled output."""
    if isinstance(backbone, TimmBackbone):
        with backbone._taking((images.shape[-2], images.shape[-1])):
            return backbone.model(images)
    return _converter(backbone).answer(backbone, images)


def _converter(backbone: Backbone) -> Converter:
    """Imports the converter of a model's library."""
    return cast(Converter, importlib.import_module(f"phreg.formats.export.from_{backbone.spec.library}"))


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


SPEC = FormatSpec(
    name="timm",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=load,
    answer=answer,
    open=open_stock,
    load_line='timm.create_model("local-dir:{folder}", pretrained=True)',
    card=Card(
        library="timm",
        code='import timm\n\nmodel = timm.create_model("hf-hub:{repository}", pretrained=True)',
    ),
)
