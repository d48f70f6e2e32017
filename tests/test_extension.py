"""What it takes to add a loss term and a method: one class, and one object in the table of methods.

A task of evaluation is added in `lengths_task`, an export format in `plain_format`.
"""

import json

import pytest

import phreg
from phreg import methods
from phreg.methods.base import Method
from phreg.registers import add_registers
from phreg.training.losses import LossTerm


class Loudness(LossTerm):
    """Mean norm of the student's patch features."""

    name = "loudness"

    def __call__(self, outputs):
        """Computes the term."""
        return outputs.student.patches.float().norm(dim=-1).mean()


def add(student, _sinks, _batches, config):
    """Adds random registers, and the term."""
    add_registers(student, config.registers, "randn", config.seed)
    return [Loudness(0.5)]


HUSH = Method(
    name="hush",
    summary="make patch features small",
    add=add,
    settings={"loss.cosine": 0.0, "loss.mse": 0.0, "loss.pooled": 0.0, "unlock.roles": ("norm",)},
    needs_sinks=False,
)


def test_a_method_is_one_object_in_the_table_and_a_loss_term_one_class(tiny, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, HUSH.name, HUSH)
    result = phreg.distill(
        tiny(), photos, tmp_path / "run", method="hush", steps=4, batch_size=4, registers=2, force=True,
        optim={"lr": 1e-2}, views={"count": 1}, measure={"images": 0}, data={"workers": 0}, device="cpu",
    )  # fmt: skip
    assert result.model.num_prefix_tokens == 3
    steps = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert steps[0]["terms"].keys() == {"loudness"}
    assert all(step["loss"] == pytest.approx(0.5 * step["terms"]["loudness"]) for step in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
