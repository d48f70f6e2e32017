"""The transformers format: a DINOv2 with registers as a folder of the stock `Dinov2WithRegisters` classes.

Those classes have a DINOv2's weights under the same names, and beside them the registers, which come, as
phreg's do, after the position embedding. Native registers stay in front of added ones.

    Dinov2Model                  ─┐   registers, config,      ┌─► Dinov2WithRegistersModel
    Dinov2ForImageClassification ─┼── zero mask token if ─────┼─► Dinov2WithRegistersForImageClassification
    Dinov2Backbone               ─┘   it has none             └─► Dinov2WithRegistersBackbone

One thing differs: at other sizes than its own the stock class resamples the position embedding with
antialiasing, and `Dinov2Model` without. Away from its own size the export of a DINOv2 is another model.
"""

import json
from typing import Any, cast

import torch
import transformers
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.backbones.transformers import TransformersBackbone, load
from phreg.formats.export.opening import open_stock
from phreg.formats.export.spec import WEIGHTS, Card, Contents, FormatSpec

STOCK: dict[type, type[transformers.PreTrainedModel]] = {
    transformers.Dinov2Model: transformers.Dinov2WithRegistersModel,
    transformers.Dinov2ForImageClassification: transformers.Dinov2WithRegistersForImageClassification,
    transformers.Dinov2Backbone: transformers.Dinov2WithRegistersBackbone,
}
STOCK |= {stock: stock for stock in STOCK.values()}
"""Class of a model -> the stock class that it is written as."""

REGISTERS, MASK = "embeddings.register_tokens", "embeddings.mask_token"
"""Weights of the stock tower that a DINOv2 may lack."""

RESIZE = 256 / 224
"""Shorter side to which DINOv2's image processor resizes, relative to the side that it then cuts out."""

OF_THE_OLD_CLASS = {"model_type", "architectures", "use_mask_token", "transformers_version", "_name_or_path"}
"""Settings that do not carry over."""


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    if not isinstance(backbone, TransformersBackbone):
        return f"it is a model of {backbone.spec.library}, and phreg does not convert those to transformers"
    if type(backbone.model) not in STOCK:
        return "of transformers' own classes only those of DINOv2 have registers after the position embedding"
    if type(backbone.model).__name__.endswith("Backbone") and not _config(backbone).reshape_hidden_states:
        return (
            "its feature maps are sequences (reshape_hidden_states=False), in which the stock class would "
            "leave the registers"
        )
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the model's stock folder holds."""
    stock: Any = STOCK[type(backbone.model)]
    tower, stock_tower = "", ""
    if cast(TransformersBackbone, backbone).tower_name:  # below a head
        tower, stock_tower = f"{backbone.model.base_model_prefix}.", f"{stock.base_model_prefix}."
    added = set(backbone.roles()["registers"])
    tensors = {
        name.replace(tower, stock_tower, 1): tensor
        for name, tensor in backbone.disk_state().items()
        if name not in added
    }
    none = next(iter(tensors.values())).new_zeros(1, 0, backbone.spec.width)
    native = tensors.get(f"{stock_tower}{REGISTERS}", none)
    ours = none if backbone.registers is None else backbone.registers.detach()
    registers = torch.cat([native, ours], dim=1)
    mask = {f"{stock_tower}{MASK}": none.new_zeros(1, backbone.spec.width)}
    tensors = mask | tensors | {f"{stock_tower}{REGISTERS}": registers}

    settings = {
        name: value for name, value in _config(backbone).to_dict().items() if name not in OF_THE_OLD_CLASS
    }
    settings |= {
        "architectures": [stock.__name__],
        "num_register_tokens": registers.shape[1],
        "dtype": str(registers.dtype).removeprefix("torch."),
    }
    config = transformers.Dinov2WithRegistersConfig(**settings)
    settings_files = {
        "config.json": json.loads(config.to_json_string()),
        "preprocessor_config.json": _processor(backbone),
    }
    return Contents({WEIGHTS: tensors}, settings_files)


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Calls the model as its users do: logits, feature maps side by side, or the pooled output."""
    output: Any = backbone.model(images)
    if "logits" in output:
        return output.logits
    if "feature_maps" in output:
        return torch.cat(output.feature_maps, dim=1)
    return output.pooler_output


def _config(backbone: Backbone) -> Any:
    return backbone.model.config


def _processor(backbone: Backbone) -> dict[str, Any]:
    """Describes how images are prepared: DINOv2's way, but at the model's own size, for which it is equal."""
    height, width = backbone.spec.input_size
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": round(max(height, width) * RESIZE)},
        crop_size={"height": height, "width": width},
        image_mean=list(backbone.spec.mean),
        image_std=list(backbone.spec.std),
        resample=3,  # bicubic
    )
    return json.loads(processor.to_json_string())


SPEC = FormatSpec(
    name="transformers",
    unsupported_reason=unsupported_reason,
    contents=contents,
    read_back=load,
    answer=answer,
    open=open_stock,
    load_line='transformers.AutoModel.from_pretrained("{folder}")',
    card=Card(
        library="transformers",
        code=(
            "from transformers import AutoImageProcessor, AutoModel\n\n"
            'model = AutoModel.from_pretrained("{repository}")\n'
            'processor = AutoImageProcessor.from_pretrained("{repository}")'
        ),
    ),
)
