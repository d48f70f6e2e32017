"""Which method is recommended, of models whose truth is planted."""

import dataclasses

import pytest
from looking import moved
from planted import CORNERS, Planted, pictures

from phreg.analysis.advice import reasons_to_train, recommend
from phreg.analysis.consistency import WORTHWHILE
from phreg.analysis.norms import outliers
from phreg.sinks.locate import Sinks

CLEAN = outliers(Planted(), [pictures()])
PLANTED = outliers(Planted({2: (CORNERS, 100.0)}), [pictures()])


@pytest.mark.parametrize("consistency", [None, moved(0.0), moved(0.1)])
def test_sinks_are_to_be_relocated_whatever_views_say(consistency):
    assert recommend(PLANTED, None, consistency) == "relocate"
    sinks = Sinks(PLANTED, 2, (), 0.0, (), None, ())
    assert recommend(PLANTED, sinks, consistency) == "relocate"


def test_sinks_inside_the_model_count_as_well():
    hidden = outliers(Planted({1: ((10, 20), 100.0), 3: ((10, 20), -100.0)}), [pictures()])
    assert hidden.outlier_rate == 0
    assert recommend(hidden, None, moved(0.0)) == "relocate"


def test_headroom_beyond_its_spread_is_to_be_distilled_away():
    assert recommend(CLEAN, None, moved(0.02, 0.004)) == "denoise"


@pytest.mark.parametrize(
    "consistency",
    [None, moved(0.0), moved(-0.01), moved(0.9 * WORTHWHILE, 0.0), moved(0.02, 0.011)],
    ids=["unmeasured", "none", "negative", "too little", "within its spread"],
)
def test_without_either_nothing_is_to_be_gained(consistency):
    assert recommend(CLEAN, None, consistency) is None


def test_tokens_that_stand_apart_only_after_the_final_norm_are_no_sinks():
    normed = dataclasses.replace(CLEAN, normed=PLANTED.normed)
    assert recommend(normed, None, moved(0.0)) is None
    assert recommend(normed, None, moved(0.02)) == "denoise"


def test_outliers_and_headroom_are_two_reasons_to_train():
    assert reasons_to_train(CLEAN, None, moved(0.0)) == set()
    assert reasons_to_train(PLANTED, None, None) == {"outliers"}
    assert reasons_to_train(CLEAN, None, moved(0.02, 0.004)) == {"headroom"}
    assert reasons_to_train(PLANTED, None, moved(0.02, 0.004)) == {"outliers", "headroom"}
