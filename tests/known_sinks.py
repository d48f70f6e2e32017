"""Sinks whose causes and triggers a test chooses."""

import torch
from planted import Planted, pictures

from phreg.analysis.norms import outliers
from phreg.sinks.locate import Sinks, Unit


def sinks(*units):
    """Sinks of some causes (block, unit, sink level[, cluster]) and their triggers: what relocation needs."""
    causes = tuple(
        Unit(block, index, level, 0.0, 1.0, *(cluster or [0]), pre_activation=(level,))
        for block, index, level, *cluster in units
    )
    norms = outliers(Planted(), [pictures()])
    # Triggers of 2 positions for the first cluster, 3 for the second, each row told by its value.
    triggers = [10 * cluster + torch.arange(2.0 + cluster)[:, None].expand(-1, 32) for cluster in range(3)]
    return Sinks(norms, 0, causes, 1.0, (), None, tuple(triggers[: 1 + max(unit.cluster for unit in causes)]))
