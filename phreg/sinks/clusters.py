"""Clusters of sinks: units that respond to the same outliers form one cluster.

Two units are joined where they share more than half of the outliers of the rarer one. Units that are
connected over any number of such pairs are one cluster.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from phreg.backbones.base import Backbone
from phreg.sinks.units import Unit, reading_units
from phreg.tokens import ImageBatch


def sink_clusters(
    backbone: Backbone,
    batches: Sequence[ImageBatch],
    masks: Sequence[Bool[Tensor, "_ patches"]],
    units: tuple[Unit, ...],
) -> tuple[tuple[Unit, ...], list[list[Bool[Tensor, "_ patches"]]]]:
    """Sorts units and outliers into clusters.

    Args:
        backbone: The model.
        batches: Normalised images.
        masks: The outliers among their patches.
        units: The causes.

    Returns:
        The units, each with the number of its cluster; and for each cluster its outliers, batch by batch.
    """
    if len(units) < 2:
        return units, [list(masks)]
    activations = torch.cat(list(_relative_activations(backbone, batches, masks, units)))
    responds = (activations > 0.5) | (activations == activations.amax(0))  # every unit responds to some
    shared = responds.T.float() @ responds.float()
    own = shared.diagonal()
    joined = shared > torch.minimum(own, own[:, None]) / 2
    count, clusters = connected_components(joined.numpy(), directed=False)
    units = tuple(
        replace(unit, cluster=number) for unit, number in zip(units, clusters.tolist(), strict=True)
    )
    if count == 1:
        return units, [list(masks)]
    members = []
    for number in range(count):
        is_member = responds[:, [unit.cluster == number for unit in units]].any(1).to(masks[0].device)
        parts = is_member.split([int(mask.sum()) for mask in masks])
        members.append([mask.masked_scatter(mask, part) for mask, part in zip(masks, parts, strict=True)])
    return units, members


def _relative_activations(
    backbone: Backbone,
    batches: Sequence[ImageBatch],
    masks: Sequence[Bool[Tensor, "_ patches"]],
    units: tuple[Unit, ...],
) -> Iterator[Float[Tensor, "_ units"]]:
    """Reads units on each outlier, batch by batch: 0 is their baseline, 1 their sink level."""
    baseline, sink_level = torch.tensor([(unit.baseline, unit.sink_level) for unit in units]).T
    for images, mask in zip(batches, masks, strict=True):
        with reading_units(backbone, sorted({unit.block for unit in units})) as hidden:
            backbone.run(images)
        layout = backbone.layout(images)
        found = [layout.patches(hidden[unit.block])[mask][:, unit.index].float().cpu() for unit in units]
        yield (torch.stack(found, dim=1) - baseline) / (sink_level - baseline)
