"""The default: does what the model needs.

sinks ──────────────────────────────────► as `relocate` does
none, but views agree better ───────────► as `denoise` does
neither ────────────────────────────────► the model is returned as it is
"""

from phreg.methods import denoise, relocate
from phreg.methods.base import Method

METHOD = Method(
    name="auto",
    summary="relocate where the model has sinks; denoise where its moved views agree better than it does",
    add=relocate.add,
    settings=denoise.SETTINGS,
    reasons=("outliers", "headroom"),
)
