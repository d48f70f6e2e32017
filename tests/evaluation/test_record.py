import dataclasses
import math

import pytest
import torch

from phreg.errors import PhregError
from phreg.evaluation.record import Metrics, MetricSpec, hardware, summarise
from phreg.evaluation.results import Results
from phreg.evaluation.tasks.table import TASKS, find_task

LOWER = {
    "linear-depth": {"rmse", "abs_rel", "log10", "artifact_rmse"},
    "object-discovery": {"artifact_seeds"},
    "consistency": {"outlier_rate"},
    "quantised": {"lost_top1", "lost_miou"},
}
"""What should be low: errors, artifacts, and what is lost."""

NO_SHARES = {
    "linear-depth": {"rmse", "abs_rel", "log10", "artifact_rmse"},
    "zero-shot-segmentation": {"pearson"},
    "quantised": {"pearson"},
}
"""What has no largest value of 1, or may be negative."""


def measured(declared, *runs, model="a"):
    return summarise(
        runs,
        declared,
        task="a-task",
        model=model,
        sha256="0",
        registers=0,
        data="somewhere",
        settings={},
        seeds=tuple(range(len(runs))),
        hardware=hardware(torch.device("cpu"), bf16=False),
        seconds=1.0,
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_task_says_of_its_metrics_which_way_is_better_and_which_are_no_shares(name):
    declared = find_task(name).METRICS
    assert {spec.name for spec in declared if spec.better == "lower"} == LOWER.get(name, set())
    assert {spec.name for spec in declared if spec.unit != "share"} == NO_SHARES.get(name, set())
    assert len({spec.name for spec in declared}) == len({*declared}), "no name has two meanings"


@pytest.mark.parametrize(
    ("spec", "mean", "spread", "sign", "text"),
    [
        (MetricSpec("miou"), 0.1234, None, "", "12.34"),
        (MetricSpec("miou"), 0.1234, 0.01, "+", "+12.34 ± 1.00"),
        (MetricSpec("rmse", "m"), 1.5, 0.25, "", "1.5000 ± 0.2500"),
        (MetricSpec("rmse", "m"), -0.5, None, "+", "-0.5000"),
        (MetricSpec("rmse", "m"), math.nan, None, "", "-"),
    ],
)
def test_shares_are_written_in_per_cent_and_all_else_as_it_is(spec, mean, spread, sign, text):
    assert spec.text(mean, spread, sign) == text


@pytest.mark.parametrize(("better", "drop"), [("higher", -0.25), ("lower", 0.25)])
def test_a_drop_is_a_change_for_the_worse(better, drop):
    assert MetricSpec("any", better=better).drop(0.25) == drop


def test_a_label_heads_the_column_and_the_name_stays_in_the_record():
    found = measured([MetricSpec("miou", label="mean IoU")], Metrics({"miou": 0.5}))
    assert Results((found,)).rows() == (["model", "mean IoU"], [["a", "50.00"]])
    assert list(found.to_json()["figures"]) == ["miou"]
    assert "metrics" not in found.to_json()


@pytest.mark.parametrize(
    ("metrics", "named"),
    [
        (Metrics({"miou": 0.5, "iou": 0.5}), "measured iou, and declares miou, f1"),
        (Metrics({"miou": 0.5}, {"groups": {"f1": 0.5, "road": 0.5}}), "measured road, and"),
    ],
)
def test_what_a_task_does_not_declare_is_refused(metrics, named):
    with pytest.raises(PhregError, match=named):
        measured([MetricSpec("miou"), MetricSpec("f1")], metrics)


def test_detail_is_in_the_unit_of_its_kind_or_else_of_each_part():
    declared = [MetricSpec("iou"), MetricSpec("pearson", "correlation")]
    found = measured(
        declared, Metrics({"iou": 0.5}, {"iou": {"pearson": 0.5}, "full": {"pearson": 0.5, "iou": 0.5}})
    )
    assert found.detail_text("iou", "pearson") == "50.00", "a class of that name"
    assert found.detail_text("full", "pearson") == "0.5000"
    assert found.detail_text("full", "iou") == "50.00"


def test_a_record_without_a_figure_shows_a_dash():
    declared = [MetricSpec("miou"), MetricSpec("pearson", "correlation")]
    found = measured(declared, Metrics({"miou": 0.5}))
    assert found.text("pearson") == "-"
    assert dataclasses.replace(found, model="b").text("miou") == "50.00"
