"""Says which method a model needs, by what was measured of it.

Artifact means more than a gap in the norms. Sinks can be relocated. Disagreement with moved views beyond the
noise floor can be distilled away. A model that has neither has nothing to gain.
"""

from typing import Literal

from phreg.analysis.consistency import ConsistencyReport
from phreg.analysis.norms import NormReport
from phreg.sinks.locate import Sinks

Reason = Literal["outliers", "headroom"]
"""Why to train. outliers: norms of patch tokens with a gap. headroom: averages over moved views agree better
with each other than with the model."""

Advice = Literal["relocate", "denoise"]
"""Name of a method for `phreg distill --method`."""


def reasons_to_train(
    norms: NormReport, sinks: Sinks | None, consistency: ConsistencyReport | None
) -> frozenset[Reason]:
    """Says what a method could repair.

    Args:
        norms: Norms of the model's tokens before and after the final norm.
        sinks: Its sinks; None where there are none, or nobody looked for them.
        consistency: Its agreement with moved views; None where that was not measured.

    Returns:
        `outliers` where the norms of any block before the final norm show sinks; `headroom` where it is worth
        training for and beyond its own spread.
    """
    found: dict[Reason, bool] = {
        "outliers": sinks is not None or norms.emergence_block is not None,
        "headroom": consistency is not None and consistency.worthwhile,
    }
    return frozenset(reason for reason, there in found.items() if there)


def recommend(norms: NormReport, sinks: Sinks | None, consistency: ConsistencyReport | None) -> Advice | None:
    """Recommends a method: `relocate` for outliers, or else `denoise` for headroom, or else None.

    The arguments are those of `reasons_to_train`.
    """
    reasons = reasons_to_train(norms, sinks, consistency)
    if "outliers" in reasons:
        return "relocate"
    return "denoise" if "headroom" in reasons else None
