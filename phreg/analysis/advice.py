"""Says which method a model needs, by what was measured of it.

Artifact means more than a gap in the norms. Sinks can be relocated. Disagreement with moved views beyond the
noise floor can be distilled away. A model that has neither has nothing to gain.
"""

from typing import Literal

from phreg.analysis.consistency import ConsistencyReport
from phreg.analysis.norms import NormReport
from phreg.sinks.locate import Sinks

Advice = Literal["relocate", "denoise"]
"""Name of a method for `phreg distill --method`."""


def recommend(norms: NormReport, sinks: Sinks | None, consistency: ConsistencyReport | None) -> Advice | None:
    """Recommends a method.

    Args:
        norms: Norms of the model's tokens before and after the final norm.
        sinks: Its sinks; None where there are none, or nobody looked for them.
        consistency: Its agreement with moved views; None where that was not measured.

    Returns:
        `relocate` where the norms of any block before the final norm show sinks; otherwise `denoise` where
        the headroom is worth training for and beyond its own spread; otherwise None.
    """
    if sinks is not None or norms.emergence_block is not None:
        return "relocate"
    return "denoise" if consistency is not None and consistency.worthwhile else None
