"""Runs of a few steps on tiny models, and what they leave."""

import json

SHORT = {
    "batch_size": 4,
    "steps": 3,
    "views": {"count": 2, "max_shift": 0.25},
    "measure": {"images": 0},
    "data": {"workers": 0},
    "device": "cpu",
    "registers": 2,
    "force": True,
}
"""Settings of such a run."""


def logged(output):
    """The steps of a run, as its log has them."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(model):
    """Copies of a model's parameters, by name."""
    return {name: one.detach().clone() for name, one in model.named_parameters()}
