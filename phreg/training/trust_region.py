"""How large a step may be: learning rates from what a step does to the features, not to the weights.

Adam's first step moves each weight by the learning rate, whatever the weight's scale. A rate can be gentle on
one model and ruin another. So a step is measured before training: the gradient's sign, times a rate, is what
Adam's first step will be. Each role gets the rate at which its step alone moves the features by
`max_movement`; then one factor on all rates makes their joint step do so.

    one batch ──loss──► signs of gradients ──┬─ role by role: rate ──► features ──► cosine distance moved
                                             └─ all roles together ──► one factor

The model is left as it was.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from phreg.backbones.base import Features
from phreg.progress import track

TOLERANCE = 1.5
"""A movement within this factor of the one asked for is near enough: a rate is then within a quarter."""

START = 1e-5
"""Rate that is tried first, for the first role."""

TRIALS = 8
"""Most steps tried for one rate."""


@dataclass(frozen=True)
class RoleRate:
    """The learning rate of a role.

    Attributes:
        rate: The rate at which the joint step of all roles moves the features as far as is allowed.
        alone: The rate at which the role's own step does.
    """

    rate: float
    alone: float


def movement(before: Features, after: Features) -> float:
    """Returns how far features moved: the mean cosine distance of patches or pooled outputs, the larger."""
    moved = [
        1 - cosine_similarity(old.double(), new.double(), dim=-1).mean()
        for old, new in zip(before, after, strict=True)
    ]
    return float(torch.stack(moved).max())


@torch.no_grad()
def calibrate(
    roles: Mapping[str, Mapping[str, nn.Parameter]],
    features: Callable[[], Features],
    max_movement: float,
) -> dict[str, RoleRate]:
    """Finds each role's learning rate.

    Args:
        roles: The parameters that train, by role and name; their gradients are those of one batch.
        features: Runs the model as it is on a few images.
        max_movement: Mean cosine distance that the first step may move patch features or pooled outputs by.

    Returns:
        The rate of each role. Roles whose gradient is zero get the largest that was found.
    """
    before = features()

    def moved_by(rates: Mapping[str, float]) -> float:
        with stepped(roles, rates):
            return movement(before, features())

    alone: dict[str, float] = {}
    near = START  # the rate of one role is a good first try for the next
    for role in track("measuring steps", list(roles)):
        alone[role] = _solve(lambda rate, role=role: moved_by({role: rate}), max_movement, near)
        if any(one.grad is not None and one.grad.any() for one in roles[role].values()):
            near = alone[role]
    factor = _solve(
        lambda scale: moved_by({role: scale * rate for role, rate in alone.items()}),
        max_movement,
        1 / math.sqrt(len(alone)),
        largest=1.0,
    )
    return {role: RoleRate(factor * rate, rate) for role, rate in alone.items()}


@contextmanager
def stepped(roles: Mapping[str, Mapping[str, nn.Parameter]], rates: Mapping[str, float]) -> Iterator[None]:
    """Moves parameters against the sign of their gradients for as long as it lasts."""
    moved = [
        (parameter, parameter.detach().clone(), rate)
        for role, rate in rates.items()
        for parameter in roles[role].values()
    ]
    try:
        for parameter, value, rate in moved:
            if parameter.grad is not None:
                parameter.copy_(value - rate * parameter.grad.sign())
        yield
    finally:
        for parameter, value, _ in moved:
            parameter.copy_(value)


def _solve(
    moved_by: Callable[[float], float], wanted: float, rate: float, largest: float = math.inf
) -> float:
    """Finds the rate that moves features by `wanted`; a movement grows about with the square of the rate."""
    for _ in range(TRIALS):
        moved = moved_by(rate)
        if wanted / TOLERANCE <= moved <= wanted * TOLERANCE or (rate >= largest and moved <= wanted):
            break
        # Far below what is wanted, rounding dominates; far beyond, movement saturates: tenfold at most.
        factor = math.sqrt(wanted / moved) if moved > 0 else 10.0
        rate = min(rate * min(max(factor, 0.1), 10.0), largest)
    return rate
