"""The gap that sets a few norms apart from all others, and how far norms fall into two kinds.

norms of one block's patch tokens ──log──► widest nearly empty stretch ──credible?──► Gap ──► outliers
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from phreg.errors import PhregError

MAX_SHARE = 0.2
"""Largest share of tokens that can be outliers; beyond it a model has two kinds of tokens, not artifacts."""

STRAGGLERS = 0.1
"""Tokens that may lie inside the gap, as a share of the tokens beyond it."""

MIN_WIDTH = 2.5
"""Narrowest credible gap, in standard deviations of the ordinary tokens; see `outlier_threshold`."""

MIN_STD = 0.01
"""Smallest standard deviation of the ordinary tokens, in log norm. Norms that differ by less than a per cent
are the same."""


@dataclass(frozen=True)
class Gap:
    """The nearly empty stretch between ordinary and outlying norms.

    Attributes:
        side: Whether outliers are longer (`high`) or shorter (`low`) than ordinary tokens.
        low: Norm where the stretch begins.
        high: Norm where it ends.
        width: Its width in standard deviations of the ordinary tokens, in log norm.
    """

    side: Literal["high", "low"]
    low: float
    high: float
    width: float

    @property
    def threshold(self) -> float:
        """Norm that separates outliers from ordinary tokens: the middle of the stretch, in log norm."""
        return (self.low * self.high) ** 0.5


def outlier_threshold(norms: Float[Tensor, "*tokens"]) -> Gap | None:
    """Finds the gap that sets a few tokens apart from the rest, if there is one.

    The gap is the widest stretch of log norm with next to no tokens inside and at most `MAX_SHARE` of them
    beyond. Two safeguards tell a gap from a tail:

    * Next to none, not none: given enough images a few tokens lie anywhere, so the widest gap between two
      neighbours closes as images are added. Inside may lie `STRAGGLERS` times as many tokens as beyond. A
      second mode that overlaps the first has no such stretch: there artifacts begin, but cannot be told token
      by token yet.
    * Any tail has gaps far out, where tokens are few. In an exponential tail of log norm (a Pareto tail of
      the norm) spacings are independent and memoryless (Rényi 1953): b tokens lie g scales beyond the next
      with probability exp(-b g). So a gap must be `MIN_WIDTH` * (1 + 5 / b) standard deviations wide. Pareto
      norms then show a false gap about once in 10 000 samples; normal, log-normal, gamma ones almost never.
      A single token has to stand out six times as far as many do.

    The standard deviation is 1.4826 times the median absolute deviation of log norms (exact for a normal
    distribution). A fifth of outliers hardly changes it.

    Args:
        norms: Norms of one block's patch tokens, at least a few dozen, in any shape.

    Returns:
        The gap, on the side where it is the wider, or None where tokens are of one kind.

    Raises:
        PhregError: A norm is not finite.
    """
    logs = _logs(norms)
    if not np.isfinite(logs).all():
        count = int((~np.isfinite(logs)).sum())
        raise PhregError(
            f"gap asked for in the norms of {logs.size} tokens, {count} of which are not finite; "
            "check the model's weights and precision"
        )
    std = max(1.4826 * float(np.median(np.abs(logs - np.median(logs)))), MIN_STD)
    upper, lower = _widest_stretch(np.sort(logs) / std), _widest_stretch(np.sort(-logs) / std)
    (credit, start, end), sign = (upper, 1) if upper >= lower else (lower, -1)
    if credit < MIN_WIDTH:
        return None
    low, high = sorted(np.exp(np.array([start, end]) * sign * std).tolist())
    return Gap("high" if sign == 1 else "low", low, high, end - start)


def outlier_mask(norms: Float[Tensor, "*tokens"], gap: Gap | None) -> Bool[Tensor, "*tokens"]:
    """Marks the tokens beyond a gap; none where there is no gap."""
    if gap is None:
        return torch.zeros_like(norms, dtype=torch.bool)
    return norms > gap.threshold if gap.side == "high" else norms < gap.threshold


def wider_of(norms: Float[Tensor, "*tokens"], own: Gap | None, original: Gap | None) -> Gap | None:
    """Chooses between a changed model's own gap and its original's: the one with more tokens beyond it.

    Where a repair leaves a part of the artifacts, too few or too close for a gap of their own, the original's
    gap still counts them. It is left aside where more than `MAX_SHARE` of the tokens are beyond it: then
    norms have moved as a whole.

    Args:
        norms: Norms of one block's patch tokens in the changed model.
        own: The gap in them.
        original: The gap in the norms of the same block of the original.
    """
    beyond = float(outlier_mask(norms, original).float().mean())
    more = float(outlier_mask(norms, own).float().mean()) < beyond <= MAX_SHARE
    return original if more else own


def bimodality(norms: Float[Tensor, "*tokens"]) -> float:
    """Measures how far log norms fall into two kinds, by Sarle's bimodality coefficient.

    That is (g² + 1) / (k + 3 (n - 1)² / ((n - 2) (n - 3))), with g the skewness and k the excess kurtosis of
    a sample of n (Pfister et al. 2013, Frontiers in Psychology 4:700). It is 1/3 for a normal distribution,
    5/9 for a uniform one and 1 for two points. Above 5/9 two modes are likely, though a long tail counts too.

    Args:
        norms: Norms of one block's patch tokens, in any shape.

    Returns:
        The coefficient; 0 for fewer than four tokens, and where all log norms lie within `MIN_STD`.
    """
    logs, count = _logs(norms), norms.numel()
    if count < 4 or np.ptp(logs) <= MIN_STD:
        return 0.0
    centred = (logs - logs.mean()) / logs.std()
    squares = centred * centred  # many times faster than powers
    skewness = np.mean(squares * centred) * math.sqrt(count * (count - 1)) / (count - 2)
    pairs = (count - 2) * (count - 3)
    excess = (count - 1) / pairs * ((count + 1) * (np.mean(squares * squares) - 3) + 6)
    return float((skewness**2 + 1) / (excess + 3 * (count - 1) ** 2 / pairs))


def _logs(norms: Tensor) -> np.ndarray:
    """Takes logarithms; a norm of zero counts as the smallest float."""
    return np.log(norms.double().cpu().numpy().ravel().clip(min=np.finfo(np.float32).tiny))


def _widest_stretch(values: np.ndarray) -> tuple[float, float, float]:
    """Finds the most credible gap in the upper tail of sorted values.

    Returns:
        The gap's width, discounted where few tokens lie beyond, and the values where it begins and ends;
        zeros where there are too few tokens to hold outliers.
    """
    beyond = np.arange(1, int(MAX_SHARE * values.size) + 1)
    if not beyond.size:
        return 0.0, 0.0, 0.0
    inside = (STRAGGLERS * beyond).astype(int)
    ends = values[values.size - beyond]
    starts = values[values.size - beyond - inside - 1]
    credits = (ends - starts) / (1 + 5 / beyond)
    best = int(np.argmax(credits))
    return float(credits[best]), float(starts[best]), float(ends[best])
