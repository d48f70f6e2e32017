"""Which charts are drawn of which models."""

import dataclasses

import pytest
import torch
from families import FAMILIES
from looking import looked_at, noise
from matplotlib.figure import Figure

from phreg.backbones.resolve import adapt
from phreg.report.figures import by_kind, figures, focus_blocks, relative_error


@pytest.fixture(scope="module")
def other():
    backbone = adapt(FAMILIES["open_clip/siglip"]())
    return looked_at(backbone, "other", noise(backbone, 8))


@pytest.fixture(scope="module")
def charts(alone):
    return drawn(alone)


def drawn(*models):
    return {chart.name: chart for chart in figures(models)}


def one(name, *models):
    """Draws no more than it must to get at a chart."""
    return next((chart for chart in figures(models) if chart.name == name), None)


def written(figure):
    return " ".join(artist.get_text() for artist in figure.findobj(lambda part: hasattr(part, "get_text")))


def test_a_model_seen_from_all_sides_has_every_chart_and_no_series(charts):
    assert list(charts) == [
        "norms", "norms-after-norm", "norm-histograms-log", "norm-histograms-linear",
        "positions", "resampled-positions-1", "agreement", "frame-fixed",
        "attention-focus", "attention-share", "neighbours", "sinks",
        "probe-position", "probe-pixels", "probe-class", "cost",
    ]  # fmt: skip
    for chart in charts.values():
        assert isinstance(chart.figure, Figure)
        assert len(chart.alt) > 10
        assert chart.caption.endswith(".")


def test_models_side_by_side_are_named_and_what_one_lacks_is_not_compared(alone, other):
    every = list(figures([alone, other]))
    charts = {chart.name: chart for chart in every}
    assert len(charts) == len(every), "no file overwrites another"
    assert "norm-series" in charts
    assert "probe-class" not in charts, "one of them was shown no classes"
    for name in ("norms", "positions", "norm-series", "probe-position", "cost"):
        text = written(charts[name].figure)
        assert "sinking" in text, name
        assert "other" in text, name
    assert "CLS or patches" in written(charts["attention-share"].figure)
    assert "sinks-1" in charts
    assert "sinks-2" not in charts


def test_where_nothing_is_known_nothing_is_drawn(other):
    bare = dataclasses.replace(
        other,
        survey=dataclasses.replace(other.survey, attention=None),
        position=None,
        reconstruction=None,
        consistency=None,
        costs=(),
        latency=(),
    )
    assert list(drawn(bare)) == [
        "norms", "norms-after-norm", "norm-histograms-log", "norm-histograms-linear",
        "positions", "neighbours",
    ]  # fmt: skip


def test_what_is_fixed_to_the_frame_is_not_drawn_of_one_image(other):
    assert "frame-fixed" in drawn(other)
    single = dataclasses.replace(other.consistency, maps=other.consistency.maps[:1])
    found = drawn(dataclasses.replace(other, consistency=single))
    assert "agreement" in found
    assert "frame-fixed" not in found


def test_a_model_whose_views_cannot_be_moved_leaves_the_others_agreement(alone, other):
    unmoved = dataclasses.replace(other, consistency=None)
    text = written(one("agreement", alone, unmoved).figure)
    assert "sinking" in text
    assert "other" not in text


def test_attention_of_a_model_without_outliers_falls_on_none(other):
    found = drawn(other)
    assert "attention-focus" in found
    assert "attention-share" not in found


def test_a_model_that_cannot_be_captured_leaves_the_others_attention(alone, other):
    uncaptured = dataclasses.replace(other, survey=dataclasses.replace(other.survey, attention=None))
    text = written(one("attention-focus", alone, uncaptured).figure)
    assert "sinking" in text
    assert "other" not in text


def test_latency_is_told_where_it_was_measured(alone, charts):
    measured, counted = charts["cost"], one("cost", dataclasses.replace(alone, latency=()))
    assert "latency" in measured.caption
    assert "latency" in written(measured.figure)
    assert "latency" not in counted.caption
    assert "latency" not in written(counted.figure)


def test_blocks_are_named_with_their_model_where_they_differ(alone, other):
    assert focus_blocks([alone]) == focus_blocks([alone, other]) == "block 2"
    report = other.norms
    blocks = tuple(dataclasses.replace(block, block=block.block + 9) for block in report.blocks)
    deeper = dataclasses.replace(
        other, survey=dataclasses.replace(other.survey, norms=dataclasses.replace(report, blocks=blocks))
    )
    assert focus_blocks([alone, deeper]) == "block 2 (sinking), block 11 (other)"


def test_kinds_of_tokens_without_figures_are_left_out(alone, other):
    assert list(by_kind(alone.position)) == ["ordinary", "outliers"]
    assert list(by_kind(other.position)) == ["ordinary"]
    assert by_kind(None) == {}


def test_the_error_of_pixels_is_relative_to_guessing(alone):
    figures_of_ordinary = alone.reconstruction.ordinary
    assert relative_error(figures_of_ordinary) == pytest.approx(
        figures_of_ordinary.error / figures_of_ordinary.chance
    )
    # Where all patches are alike there is nothing to guess.
    assert relative_error(dataclasses.replace(figures_of_ordinary, error=0.0, chance=0.0)) == 0
    assert torch.isfinite(torch.tensor(relative_error(figures_of_ordinary)))
