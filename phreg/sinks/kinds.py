"""Kinds of sink: units that answer to the same outliers are one kind, connected over any number of steps."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.sinks.units import Unit, reading_units

# Nothing is bound by this shape: the last batch may be smaller than the others.
Images = Float[Tensor, "_ 3 _ _"]


def sort_into_kinds(
    backbone: Backbone,
    batches: Sequence[Images],
    masks: Sequence[Bool[Tensor, "_ patches"]],
    units: tuple[Unit, ...],
) -> tuple[tuple[Unit, ...], list[list[Bool[Tensor, "_ patches"]]]]:
    """Sorts units, and outliers, into kinds of sink: units answering mostly to the same outliers are one.

    Args:
        backbone: The model.
        batches: Images.
        masks: The outliers among their patches.
        units: The causes.

    Returns:
        The units, each with its kind, and for each kind its outliers, batch by batch.
    """
    if len(units) < 2:
        return units, [list(masks)]
    level = torch.cat(list(_relative_levels(backbone, batches, masks, units)))
    fires = (level > 0.5) | (level == level.amax(0))  # every unit answers to some
    both = fires.T.float() @ fires.float()
    alone = both.diagonal()
    alike = both > torch.minimum(alone, alone[:, None]) / 2
    count, kinds = connected_components(alike.numpy(), directed=False)
    units = tuple(replace(unit, kind=kind) for unit, kind in zip(units, kinds.tolist(), strict=True))
    if count == 1:
        return units, [list(masks)]
    members = []
    for kind in range(count):
        own = fires[:, [unit.kind == kind for unit in units]].any(1).to(masks[0].device)
        parts = own.split([int(mask.sum()) for mask in masks])
        members.append([mask.masked_scatter(mask, part) for mask, part in zip(masks, parts, strict=True)])
    return units, members


def _relative_levels(
    backbone: Backbone,
    batches: Sequence[Images],
    masks: Sequence[Bool[Tensor, "_ patches"]],
    units: tuple[Unit, ...],
) -> Iterator[Float[Tensor, "_ units"]]:
    """Reads units on each outlier, batch by batch, from 0, as on ordinary patches, to 1, at their level."""
    ordinary, level = torch.tensor([(unit.ordinary, unit.level) for unit in units]).T
    for images, mask in zip(batches, masks, strict=True):
        with reading_units(backbone, sorted({unit.block for unit in units})) as hidden:
            backbone.run(images)
        layout = backbone.layout(images)
        found = [layout.patches(hidden[unit.block])[mask][:, unit.index].float().cpu() for unit in units]
        yield (torch.stack(found, dim=1) - ordinary) / (level - ordinary)
