"""The merged format: the whole patched model, for `phreg.load` without its base.

All tensors, named as the model's library names them on disk, and that library's own config, of which its
class is built again. A patched transformers model's `save_pretrained` writes the same.

    phreg.json         library, class, config, registers, size, read-out
    phreg.safetensors  every tensor
"""

import copy
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from phreg import __version__
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.backbones.saved import load_patched
from phreg.checkpoint import FORMAT_VERSION, LIBRARIES, SAVED_FORMAT, read_adapter
from phreg.exports import timm as timm_format
from phreg.exports.base import Contents


def why_not(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    match backbone.spec.library:
        case "timm":
            return timm_format.why_not(backbone)
        case "open_clip" if getattr(backbone, "config", None) is None:
            return (
                "an open_clip instance does not say what it was built from; name the model by its folder, "
                "hub id or open_clip:ARCH/TAG, or load a run that was made so"
            )
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the folder holds."""
    description = {
        "format": SAVED_FORMAT,
        "format_version": FORMAT_VERSION,
        "library": backbone.spec.library,
        "class": type(backbone.model).__name__,
        "config": _config(backbone),
        "num_registers": backbone.num_registers,
        "input_size": list(backbone.spec.input_size),
        "readout": backbone.readout,
        "versions": {"phreg": __version__} | {name: version(name) for name in LIBRARIES},
    }
    return Contents(backbone.disk_state(), {"phreg.json": description}, weights="phreg.safetensors")


def load(folder: Path) -> Backbone:
    """Reads the folder as `phreg.load` does, and sets the read-out."""
    backbone = load_patched(folder)
    set_readout(backbone, read_adapter(folder).get("readout", "plain"))
    return backbone


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Reads dense features, by the read-out that the model has."""
    return backbone(images).patches


def _config(backbone: Any) -> dict[str, Any]:
    """Puts down what its library builds the model of, registers apart."""
    match backbone.spec.library:
        case "transformers":
            return json.loads(backbone.model.config.to_json_string(use_diff=False))
        case "timm":
            plain = copy.deepcopy(backbone)
            plain.remove_registers()
            return timm_format.contents(plain).settings["config.json"]
        case _:
            return backbone.config
