"""What several verbs take, and checks of it before any work is done: models, images, devices, folders."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phreg.backbones.base import Backbone
from phreg.backbones.resolve import display_name
from phreg.errors import DataError, PhregError
from phreg.formats.load import Model

ImagesPath = str | os.PathLike[str]


def usable_device(device: str | torch.device | None, *, for_weights: bool = False) -> torch.device:
    """Finds the device to run on, or only to hold weights on; None means a GPU where there is one."""
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        usable = torch.device(name)
        probe = torch.zeros(1, device=usable)
        if not for_weights:
            probe.item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        reason = str(error).partition("\n")[0]
        raise PhregError(
            f"asked to run on device '{name}', which cannot be used here: {reason}; leave --device out, or "
            "give cpu, cuda, cuda:1 or mps, whichever there is"
        ) from error
    return usable


def checked_batch(backbone: Backbone, images: Any) -> Tensor:
    """Gives a batch of normalised images as the model takes it; refuses anything else."""
    if isinstance(images, Tensor):
        fits = images.dim() == 4 and images.shape[1] == 3 and images.is_floating_point()
        found = f"a tensor of shape {tuple(images.shape)} and {images.dtype}"
    else:
        fits, found = False, type(images).__name__
    if not fits:
        raise DataError(
            "asked to read images: expected a normalised float tensor (batch, 3, height, width), found "
            f"{found}; normalise with mean {backbone.spec.mean} and standard deviation {backbone.spec.std}"
        )
    backbone.check_size((images.shape[-2], images.shape[-1]))
    return images.to(backbone.device, backbone.dtype)


def check_folder(folder: Path) -> None:
    """Checks that a folder can be written to, or made, before anything is done that would be lost."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "may not be written to" if there.is_dir() else "is no folder"
        raise PhregError(
            f"asked to write to {folder}, and {there} {found}; choose another --output or --cache"
        )


def named_models(models: Sequence[Model], instance: str = "instance") -> dict[str, Model]:
    """Names models for tables: as the user does, or `instance 2`."""
    return {
        f"{instance} {number}" if isinstance(model, nn.Module) else os.fspath(model): model
        for number, model in enumerate(models, start=1)
    }


def short_names(named: dict[str, Any]) -> dict[str, Any]:
    """Calls local folders by their last parts, as few as tell them apart."""
    folders = {name: Path(name).absolute().parts for name in named if display_name(name) != name}
    for count in range(1, 1 + max(map(len, folders.values()), default=0)):
        short = {name: os.path.join(*parts[-count:]) for name, parts in folders.items()}  # noqa: PTH118
        renamed = {short.get(name, name): model for name, model in named.items()}
        if len(renamed) == len(named):
            return renamed
    return named
