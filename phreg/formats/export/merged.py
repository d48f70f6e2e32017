"""The merged format: the whole patched model, for `phreg.load` without its base.

All tensors, named as the model's library names them on disk, and that library's own config, of which its
class is built again (`phreg.formats.load`). A patched transformers model's `save_pretrained` writes the same.
The names of the files are no stock library's, so none takes such a folder for a model without registers.

    phreg.json         library, class, config, registers, size, normalisation, read-out, test-time units
    phreg.safetensors  every tensor
"""

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.formats.export import timm as timm_format
from phreg.formats.export.base import Contents
from phreg.formats.load import open_saved
from phreg.record import RunRecord
from phreg.registers import remove_registers
from phreg.sinks import test_time
from phreg.storage import MODEL_FORMAT, MODEL_TENSORS


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    match backbone.spec.library:
        case "timm":
            return timm_format.unsupported_reason(backbone)
        case "open_clip" if getattr(backbone, "config", None) is None:
            return (
                "an open_clip instance does not say what it was built from; name the model by its folder, "
                "hub id or open_clip:ARCH/TAG, or load a run that was made so"
            )
    return None


def contents(backbone: Backbone) -> Contents:
    """Puts together what the folder holds."""
    tensors = backbone.disk_state()
    record = RunRecord(
        format=MODEL_FORMAT,
        model_class=type(backbone.model).__name__,
        registers=backbone.num_registers,
        input_size=backbone.spec.input_size,
        mean=backbone.spec.mean,
        std=backbone.spec.std,
        library=backbone.spec.library,
        config=_config(backbone),
        readout=backbone.readout,
        test_time=test_time.installed(backbone),
        test_time_size=test_time.calibrated_size(backbone),
    )
    return Contents({MODEL_TENSORS: tensors}, {}, record=record.with_sums(tensors))


def load(folder: Path) -> Backbone:
    """Reads the folder as `phreg.load` does, and sets the read-out."""
    backbone, _ = open_saved(resolve.locate(folder))
    set_readout(backbone, backbone.trained_readout)
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
            plain = remove_registers(copy.deepcopy(backbone))
            return dict(timm_format.contents(plain).settings["config.json"])
        case _:
            return backbone.config
