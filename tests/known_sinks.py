"""Sinks whose causes and triggers a test chooses."""

import torch
from planted import Planted, pictures

from phreg.analysis.norms import outliers
from phreg.sinks.directions import SinkDirection
from phreg.sinks.locate import Sinks, Unit


def sinks(*held):
    """Sinks that hold some channels (block, channel, level[, cluster]), and their triggers.

    Hidden units of the same numbers are their causes. Nothing is ordinary: other patches hold 0.
    """
    known = [(block, channel, level, *(cluster or [0])) for block, channel, level, *cluster in held]
    causes = tuple(Unit(block, index, level, 0.0, 1.0, cluster) for block, index, level, cluster in known)
    directions = tuple(
        SinkDirection(block, cluster, torch.eye(32)[channel], 0.0, level, 0.0, 1.0)
        for block, channel, level, cluster in known
    )
    norms = outliers(Planted(), [pictures()])
    # Triggers of 2 positions for the first cluster, 3 for the second, each row told by its value.
    triggers = [10 * cluster + torch.arange(2.0 + cluster)[:, None].expand(-1, 32) for cluster in range(3)]
    return Sinks(
        norms,
        0,
        causes,
        1.0,
        (),
        None,
        tuple(triggers[: 1 + max(unit.cluster for unit in causes)]),
        directions,
    )
