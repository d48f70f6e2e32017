"""Schedules of heads: learning rate and first beta of AdamW at each step, as the published code has them.

All are shares of the highest learning rate, pure functions of the step, which counts from 0.

    poly, cosine     mmcv's: a decay over all steps, times a linear warm-up
    dinov3           DINOv3's WarmupOneCycleLR, which goes one step behind at most
    momentum         torch's and mmcv's OneCycle: down while the rate would rise, and up again
"""

import math
from typing import Literal

from phreg.config import Fraction

Schedule = Literal["poly", "cosine", "dinov3"]

PEAK = 0.3
"""Share of the steps after which a one-cycle momentum is least, in torch and mmcv."""

INITIAL_DIVISOR = 25.0
"""What DINOv3's final rate is divided by beside the final divisor, as in torch's OneCycle."""


def decay(step: int, steps: int, power: float | None) -> float:
    """Falls from 1 to 0, as a polynomial of that power, or as a cosine where there is none."""
    share = step / steps
    return (1 + math.cos(math.pi * share)) / 2 if power is None else (1 - share) ** power


def warm_up(step: int, warmup: int, start: Fraction | None) -> float:
    """Rises to 1 in so many steps: from `start` at step 0, as mmcv does, or from one step's share."""
    if step >= warmup:
        return 1.0
    if start is None:
        return (step + 1) / warmup
    return start + (1 - start) * step / warmup


def dinov3_rate(step: int, steps: int, warmup: int, start: Fraction | None, final: float) -> float:
    """Computes the rate of DINOv3's WarmupOneCycleLR.

    Args:
        step: Steps of the schedule that are done.
        steps: Of all.
        warmup: Steps in which it rises.
        start: Share at step 0, from which it rises against a linear decay; None adds a rise against a cosine
            to `final`.
        final: The inverse of its `final_div_factor`.
    """
    if step >= warmup:
        least = final / INITIAL_DIVISOR
        return least + (1 - least) * (1 + math.cos(math.pi * (step + 1) / steps)) / 2
    if start is None:
        return final + decay(step, steps, None) * step / warmup
    return warm_up(step, warmup, start) * (1 - step / steps)


def dinov3_beta(step: int, steps: int, warmup: int, least: float, most: float) -> float:
    """Computes the first beta of DINOv3's WarmupOneCycleLR, which is 0 until it is warm."""
    if step < warmup:
        return 0.0
    return _anneal(least, most, (step - warmup) / (steps - warmup))


def one_cycle_beta(step: int, steps: int, least: float, most: float) -> float:
    """Computes the first beta of OneCycle: from `most` to `least` at `PEAK`, and back."""
    peak, last = PEAK * steps - 1, steps - 1
    if step <= peak:
        return _anneal(most, least, step / peak)
    return _anneal(least, most, (step - peak) / (last - peak))


def _anneal(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
