import dataclasses
import json
import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phreg.errors import PhregError
from phreg.evaluation.bootstrap import PerPicture, resample
from phreg.evaluation.record import Metrics, MetricSpec, Summary, hardware, summarise
from phreg.evaluation.results import Results

DECLARED = (
    *(MetricSpec(name) for name in ("miou", "iou", "top1", "cls_top1", "top5", "artifact_accuracy")),
    MetricSpec("rmse", "m", better="lower"),
)


OF_RUNS = (
    *("figures", "guarded", "detail", "notes", "versions", "counts", "metrics"),
    *("pictures", "resampled"),
)
"""Fields of a record that are made of what was measured."""


def record(model, values, figure="miou", detail=None):
    runs = [Metrics({figure: value}, {"iou": detail or {"road": value}}) for value in values]
    return summarise(
        runs,
        DECLARED,
        task="linear-segmentation",
        model=model,
        sha256="0",
        registers=0,
        data="camvid",
        settings={"steps": 1},
        seeds=tuple(range(len(values))),
        hardware=hardware(torch.device("cpu"), bf16=False),
        seconds=1.0,
    )


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_several_seeds_give_mean_and_standard_deviation(values):
    summary = record("a", values).figures["miou"]
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert summary.std == pytest.approx(statistics.stdev(values))
    assert summary.values == tuple(values)


def test_a_single_seed_has_no_spread_and_nothing_is_said_to_exceed_it():
    results = Results((record("b", [0.6]),), record("a", [0.5]))
    found = results.differences(results.records[0])["miou"]
    assert record("a", [0.5]).figures["miou"].std is None
    assert (found.change, found.better, found.beyond_std) == (pytest.approx(0.1), True, None)


@pytest.mark.parametrize(("values", "beyond"), [([0.41, 0.56, 0.52], False), ([0.42, 0.62, 0.52], True)])
def test_a_difference_is_taken_seed_by_seed(values, beyond):
    results = Results((record("b", values),), record("a", [0.4, 0.6, 0.5]))
    found = results.differences(results.records[0])["miou"]
    each = [ours - theirs for ours, theirs in zip(values, [0.4, 0.6, 0.5], strict=True)]
    assert found.change == pytest.approx(statistics.fmean(each))
    assert found.std == pytest.approx(statistics.stdev(each))
    assert found.beyond_std is beyond
    assert ("~" in results.to_markdown().split("\n")[3]) is not beyond


def test_the_file_keeps_the_keys_of_version_0_1(tmp_path):
    Results((record("b", [0.5, 0.9]),), record("a", [0.25, 0.75])).write(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    of_two = pytest.approx(0.4 / 2**0.5)  # the standard deviation of two numbers 0.4 apart, by n - 1
    summary = {"mean": pytest.approx(0.7), "spread": of_two, "values": [0.5, 0.9]}
    assert written["models"][0]["figures"] == {"miou": summary}
    assert written["models"][0]["detail"] == {"iou": {"road": summary}}
    changes = {"change": pytest.approx(0.2), "spread": pytest.approx(0.1 / 2**0.5)}
    assert written["differences"] == [{"miou": changes | {"better": True, "beyond_spread": True}}]


def test_only_seeds_that_both_have_are_compared():
    results = Results((record("b", [0.6]),), record("a", [0.5, 0.1, 0.1]))
    assert results.differences(results.records[0])["miou"].change == pytest.approx(0.1)
    strangers = Results((dataclasses.replace(record("b", [0.6]), seeds=(7,)),), record("a", [0.5]))
    assert strangers.differences(strangers.records[0]) == {}


def test_of_an_error_less_is_better():
    results = Results((record("b", [0.3], "rmse"),), record("a", [0.4], "rmse"))
    assert results.differences(results.records[0])["rmse"].better


def test_results_have_the_first_models_figures_at_the_top(tmp_path):
    results = Results((record("b", [0.6, 0.7]), record("c", [0.1, 0.1])), record("a", [0.5, 0.5]))
    results.write(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["miou"] == results["miou"] == pytest.approx(0.65)
    assert [model["model"] for model in written["models"]] == ["b", "c"]
    assert written["baseline"]["figures"]["miou"]["mean"] == 0.5
    assert written["differences"][1]["miou"]["change"] == pytest.approx(-0.4)
    assert written["models"][0]["versions"]["torch"]
    table = (tmp_path / "results.md").read_text().splitlines()
    assert table[2] == "| a (baseline) | 50.00 ± 0.00 |"
    assert table[3] == "| b | 65.00 ± 7.07 (+15.00 ± 7.07) |"


def test_a_baseline_that_is_also_measured_is_shown_once():
    base = record("a", [0.5])
    assert Results((base, record("b", [0.6])), base).to_markdown().count("| a (baseline)") == 1


def test_where_nothing_is_drawn_the_table_says_so():
    drawn = record("a", [0.5])
    assert "1 seed." in Results((drawn,)).legend()
    assert (
        "one run, which stands for every seed" in Results((dataclasses.replace(drawn, drawn=False),)).legend()
    )


def test_what_has_no_value_is_null_in_json_and_a_dash_in_the_table(tmp_path):
    results = Results((record("a", [0.5], detail={"road": math.nan, "car": 0.5}),))
    results.write(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["models"][0]["detail"]["iou"]["road"]["mean"] is None
    assert "| road | - |" in (tmp_path / "results.md").read_text()


def test_the_gate_lets_a_small_drop_pass_and_stops_a_larger_one():
    results = Results((record("b", [0.48]),), record("a", [0.5]))
    results.check_max_drop(0.03)
    with pytest.raises(PhregError, match=r"b: miou 0\.4800, the baseline's is 0\.5000"):
        results.check_max_drop(0.01)


def test_the_gate_guards_what_the_task_names_beside_the_headline():
    def measured(model, **figures):
        facts = dataclasses.asdict(record(model, [0.5]))
        for own in OF_RUNS:
            del facts[own]
        return summarise([Metrics({"top1": 0.5, **figures}, guarded=("top1", "cls_top1"))], DECLARED, **facts)

    base = measured("a", cls_top1=0.9, top5=1.0)
    assert base.guarded == ("top1", "cls_top1")
    Results((measured("b", cls_top1=0.9, top5=0.1),), base).check_max_drop(0.05)
    with pytest.raises(PhregError, match=r"found 1 larger: b: cls_top1 0\.1000, the baseline's is 0\.9000"):
        Results((measured("b", cls_top1=0.1, top5=1.0),), base).check_max_drop(0.05)


def test_read_outs_other_than_plain_are_told_under_the_table():
    plain = record("a", [0.5])
    trained = dataclasses.replace(plain, model="b", notes=({"readout": "value-only"},))
    assert "last block: a plain, b value-only." in Results((trained,), plain).to_markdown()
    assert "last block" not in Results((plain,)).to_markdown()


def test_the_gate_knows_that_a_larger_error_is_worse():
    worse = Results((record("b", [0.5], "rmse"),), record("a", [0.4], "rmse"))
    with pytest.raises(PhregError, match="max_drop"):
        worse.check_max_drop(0.05)
    Results((record("b", [0.2], "rmse"),), record("a", [0.4], "rmse")).check_max_drop(0.0)


def test_a_figure_without_value_does_not_pass_the_gate():
    with pytest.raises(PhregError, match="max_drop"):
        Results((record("b", [math.nan]),), record("a", [0.4])).check_max_drop(1.0)


def test_a_gate_needs_a_baseline():
    with pytest.raises(PhregError, match="--baseline"):
        Results((record("b", [0.5]),)).check_max_drop(0.1)


def counted(model, *counts):
    """A record of `miou` and `rmse`, a run for each of what they were computed over."""
    runs = [Metrics({"miou": 0.5, "rmse": 0.5}, counts=count) for count in counts]
    facts = dataclasses.asdict(record(model, [0.5] * len(counts)))
    for own in OF_RUNS:
        del facts[own]
    return summarise(runs, DECLARED, **facts)


def over(classes, images=2):
    return {
        "miou": {"pixels": 12345, "images": images, "classes": classes},
        "rmse": {"pixels": 12345, "images": images, "classes": classes},
    }


def test_what_figures_were_computed_over_is_in_the_results_and_under_the_table(tmp_path):
    results = Results((counted("a", over(3)),))
    results.write(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["counts"] == written["models"][0]["counts"][0] == over(3)
    assert "Computed over 12,345 pixels, 2 images, 3 classes." in (tmp_path / "results.md").read_text()


def test_figures_over_different_amounts_are_told_apart_and_amounts_that_differ_are_a_range():
    mixed = over(3) | {"rmse": {"images": 1, "boxes": 1}}
    more = over(5) | {"rmse": {"images": 1, "boxes": 1}}
    legend = Results((counted("a", mixed, more),), counted("b", mixed)).legend()
    assert "miou over 12,345 pixels, 2 images, 3 to 5 classes; rmse over 1 image, 1 box." in legend


def test_figures_that_were_left_out_are_told_under_the_table():
    without = dataclasses.replace(record("a", [0.5]), notes=({"left_out": {"pearson": "no pair"}},))
    assert "Left out: pearson (no pair)." in Results((without,)).to_markdown()
    assert "Left out" not in Results((record("a", [0.5]),)).to_markdown()


@pytest.mark.parametrize(
    "counts", [{"miou": {"pixels": 0, "images": 2}}, {"miou": {}}, {"rmse": {"pixels": 1}}]
)
def test_a_figure_over_nothing_is_an_error(counts):
    with pytest.raises(PhregError, match="miou"):
        Metrics({"miou": 1.0}, counts=counts)


def test_a_summary_of_one_value_is_that_value():
    assert Summary.of([0.25]) == Summary(0.25, None, (0.25,))


def test_a_figure_without_a_value_is_a_dash_with_any_number_of_seeds():
    patched, raw = (record(name, [math.nan, math.nan], "artifact_accuracy") for name in ("patched", "raw"))
    assert math.isnan(patched.figures["artifact_accuracy"].std)
    assert "| patched | - |" in Results((patched,), raw).to_markdown()


def sampled(model, values, seeds=1, pictures="same", names=("miou",)):
    """A record of a figure that is the mean of one value a picture."""
    shares = {name: PerPicture.mean(values) for name in names}
    told = resample([f"{pictures}{number}" for number in range(len(values))], shares)
    runs = [Metrics(dict.fromkeys(names, statistics.fmean(values)), **told) for _ in range(seeds)]
    return summarise(
        runs, DECLARED, task="t", model=model, sha256="", registers=0, data="", settings={},
        seeds=tuple(range(seeds)), hardware={}, seconds=0.0,
    )  # fmt: skip


def test_a_difference_on_the_same_pictures_has_an_interval_of_its_own():
    before = np.random.default_rng(0).random(40)
    results = Results((sampled("after", before + 0.25, seeds=2),), sampled("before", before, seeds=2))
    found = results.differences(results.records[0])["miou"]
    assert found.interval == pytest.approx((0.25, 0.25)), "each picture gained as much"
    low, high = results.baseline.figures["miou"].interval
    assert low < before.mean() < high
    text = results.to_markdown()
    assert f"| before (baseline) | {100 * low:.2f} to {100 * high:.2f} |" in text
    assert "(+25.00 to +25.00)" in text
    assert "Intervals hold 95 % of 1,000 bootstrap samples of the pictures" in text
    written = results.to_json()
    assert written["differences"][0]["miou"]["interval"] == list(found.interval)
    own = results.records[0].figures["miou"].interval
    assert written["models"][0]["figures"]["miou"]["interval"] == list(own)
    assert written["bootstrap"]["resamples"] == 1000
    json.dumps(written)


def test_a_difference_on_other_pictures_has_no_interval():
    results = Results((sampled("a", [0.0, 1.0, 1.0]),), sampled("b", [0.0, 1.0, 1.0], pictures="other"))
    assert results.differences(results.records[0])["miou"].interval is None


def test_seeds_that_were_tested_on_other_pictures_have_no_interval():
    runs = [
        Metrics({"miou": 0.5}, **resample([f"{seed}a", f"{seed}b"], {"miou": PerPicture.mean([0.0, 1.0])}))
        for seed in range(2)
    ]
    facts = {"model": "m", "sha256": "", "registers": 0, "data": "", "settings": {}, "hardware": {}}
    found = summarise(runs, DECLARED, task="t", seeds=(0, 1), seconds=0.0, **facts)
    assert found.figures["miou"].interval is None
    assert Results((found,)).interval_rows()[1] == []
    assert "bootstrap" not in Results((found,)).to_markdown()
