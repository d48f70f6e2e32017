"""Loads what phreg wrote.

    adapter ► base ► patched model of its ordinary class

The folders and their checks are described in `phreg.formats.load`.
"""

import os
from contextlib import nullcontext

import torch
from torch import nn

from phreg.api.arguments import usable_device
from phreg.backbones import resolve
from phreg.formats.load import open_into, open_saved, warn_failed_checks
from phreg.rollback import rollback_on_error


def load(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Loads a patched model: an ordinary model of its library's class, registers inside, in eval mode.

    Args:
        path: A run, an adapter, a folder that `export` wrote, what a patched transformers model's own
            `save_pretrained` wrote, or the hub id of any of them.
        revision: Hub commit, branch or tag of it.
        into: The adapter's base, where it is at hand already, or a model around the same vision tower: a
            vision-language model, a depth model, a detector. It is patched in place.
        device: Where to put the model; None means the CPU, and `into` stays where it is.

    Returns:
        The model, or `into`.

    Raises:
        LoadError: phreg did not write it, its base cannot be found, or its weights or its base's are others.
        PhregError: There is no such device.
    """
    if device is not None:
        device = usable_device(device, for_weights=True)
    found = resolve.locate(path, revision)
    with rollback_on_error(into) if into is not None else nullcontext():
        if into is None:
            model = open_saved(found)[0].model
        else:
            open_into(found, into)
            model = into
        warn_failed_checks(found)
        return model.eval() if device is None else model.eval().to(device)
