"""Loads what phreg wrote.

    adapter ► base ► patched model of its ordinary class

The folders and their checks are described in `phreg.formats.load`.
"""

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from phreg.api.arguments import usable_device
from phreg.backbones import resolve
from phreg.errors import PhregError
from phreg.formats.load import open_as_class, open_into, open_saved, warn_failed_checks
from phreg.rollback import rollback_on_error


def load(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
    cls: type | None = None,
    **settings: Any,
) -> nn.Module:
    """Loads a patched model: an ordinary model of its library's class, registers inside, in eval mode.

    With `cls` and `settings` it does what `cls.from_pretrained(path, **settings)` of transformers does with a
    model without registers. A head that was not saved starts afresh, and transformers reports it:

        phreg.load("runs/vit-reg", cls=transformers.ViTForImageClassification, num_labels=10)

    Args:
        path: A run, an adapter, a folder that `export` wrote, what a patched transformers model's own
            `save_pretrained` wrote, or the hub id of any of them.
        revision: Hub commit, branch or tag of it.
        into: The adapter's base, where it is at hand already, or a model around the same vision tower: a
            vision-language model, a depth model, a detector. It is patched in place.
        device: Where to put the model; None means torch's default device, which is the CPU unless it was set,
            and `into` stays where it is.
        cls: Class of transformers to load it as, with another head or without, or an Auto class; None means
            the class that was saved.
        settings: What that class's `from_pretrained` takes, such as `num_labels`, or
            `ignore_mismatched_sizes=True` for a new head in the place of one that was saved.

    Returns:
        The model, or `into`.

    Raises:
        LoadError: phreg did not write it, its base cannot be found, or its weights or its base's are others;
            or `cls` is no class that the model can be loaded as; or torch's default device is `meta`.
        PhregError: There is no such device, or `into` is given along with `cls` or settings.
    """
    if into is not None and (cls is not None or settings):
        raise PhregError(
            f"phreg.load asked for {', '.join(['cls'] * (cls is not None) + sorted(settings))} along with "
            f"into, a {type(into).__name__} that is built already; leave one of the two out"
        )
    if device is not None:
        device = usable_device(device, for_weights=True)
    resolve.refuse_meta_device(path)
    found = resolve.locate(path, revision)
    with rollback_on_error(into) if into is not None else nullcontext():
        if into is None:
            backbone, _ = open_saved(found)
            model = (open_as_class(found, backbone, cls, settings) if cls or settings else backbone).model
        else:
            open_into(found, into)
            model = into
        warn_failed_checks(found)
        return model.eval() if device is None else model.eval().to(device)
