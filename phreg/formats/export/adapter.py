"""The adapter format: what a run made, its model card and all, taken out of the run and tried on the base.

It is the small one, and asks most of whoever loads it: phreg, and the very weights it was made from.

    run/model/{adapter.safetensors, phreg.json, README.md} ──copied──► folder ──onto the base──► same model?
"""

import shutil
from functools import partial
from pathlib import Path

from torch import Tensor

from phreg.backbones import resolve
from phreg.backbones.base import Backbone
from phreg.backbones.readout import set_readout
from phreg.formats.adapter import read_adapter
from phreg.formats.export.base import Contents
from phreg.formats.load import open_saved
from phreg.storage import ADAPTER_TENSORS

FILES = (ADAPTER_TENSORS, "README.md")
"""What is copied as it is; the card may be missing."""


def unsupported_reason(backbone: Backbone) -> str | None:
    """Says why a model cannot take this format; None where it can."""
    if backbone.adapter is None:
        return "it was not loaded from a run or an adapter, so what it has that its base has not is unknown"
    if not (backbone.adapter / FILES[0]).is_file():
        return f"the adapter it was loaded from, {backbone.adapter}, is no longer there"
    return None


def contents(backbone: Backbone) -> Contents:
    """Names the files to copy."""
    folder = backbone.adapter or Path()
    present = [folder / name for name in FILES if (folder / name).is_file()]
    copied = {file.name: partial(shutil.copyfile, file) for file in present}
    return Contents({}, {}, copied, record=read_adapter(folder))


def load(folder: Path) -> Backbone:
    """Reads the base again, puts the adapter onto it, and sets the read-out."""
    backbone, _ = open_saved(resolve.locate(folder))
    set_readout(backbone, backbone.trained_readout)
    return backbone


def answer(backbone: Backbone, images: Tensor) -> Tensor:
    """Reads dense features, by the read-out that the model has."""
    return backbone(images).patches
