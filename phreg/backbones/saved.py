"""Patched models saved whole, and loaded without the base they were made from.

`phreg.json` says which library builds the model, and of what config; `phreg.safetensors` holds every tensor.
The names of the files are no stock library's, so none takes such a folder for a model without registers.

    config ──library──► model of random weights ──registers of zeros──► ──every tensor──► the patched model
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import library_adapter
from phreg.errors import LoadError, PhregError


def load_patched(folder: Path) -> Backbone:
    """Builds a patched model that was saved whole: eval mode, tensors only, read-out plain.

    Args:
        folder: What the `merged` export or a patched transformers model's own `save_pretrained` wrote.

    Raises:
        LoadError: The folder cannot be read, or its tensors are not those of the class.
    """
    asked = f"patched model in {folder}"
    try:
        description = json.loads((folder / "phreg.json").read_bytes())
        tensors = load_file(folder / "phreg.safetensors")
        library = library_adapter(description["library"])
        backbone = library.build(description["class"], description["config"])
        size = tuple(description.get("input_size", backbone.spec.input_size))
        if size != backbone.spec.input_size:
            backbone.set_input_size(size)
        if description["num_registers"]:
            backbone.insert_registers(torch.zeros(description["num_registers"], backbone.spec.width))
        missing = sorted(backbone.disk_state().keys() - tensors.keys())
        if missing:
            raise LoadError(f"it lacks {missing[:3]}")
        backbone.load_disk_state(tensors)
    except (OSError, ValueError, TypeError, LookupError, SafetensorError, PhregError) as error:
        raise LoadError(f"{asked} cannot be loaded ({error}); save or copy it again") from error
    backbone.eval()
    return backbone
