import numpy as np
import pytest
from scipy import stats

from phreg.evaluation.bootstrap import LEVEL, RESAMPLES, PerPicture, interval, resample

ENDS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def names(count):
    return [f"{number}.png" for number in range(count)]


def drawn(figure):
    """The figure in each sample of the pictures."""
    return np.array(resample(names(len(figure.reached)), {"figure": figure})["resampled"]["figure"])


def test_samples_of_hits_and_misses_have_the_binomial_distribution():
    # Of 40 pictures 30 are right, so the number right in a sample is binomial: its percentiles are known.
    samples = drawn(PerPicture.mean([1.0] * 30 + [0.0] * 10))
    assert len(samples) == RESAMPLES
    exact = stats.binom(40, 0.75)
    assert samples.mean() == pytest.approx(0.75, abs=4 * exact.std() / 40 / RESAMPLES**0.5)
    assert samples.std() == pytest.approx(exact.std() / 40, rel=4 / (2 * RESAMPLES) ** 0.5)
    # One picture more or less: 1000 samples tell a percentile of a discrete figure no better.
    assert interval(samples) == pytest.approx(exact.ppf(ENDS) / 40, abs=1 / 40)


def test_the_interval_of_a_mean_over_classes_is_that_of_scipy():
    generator = np.random.default_rng(1)
    reached = generator.integers(0, 50, (30, 4)).astype(float)
    there = reached + generator.integers(0, 50, (30, 4))
    there[:, 3] = reached[:, 3] = 0.0  # a class that occurs nowhere
    there[1:, 2] = reached[1:, 2] = 0.0  # one of a single picture, which some samples lack

    def miou(chosen):
        chosen = chosen.astype(int)
        with np.errstate(invalid="ignore"):
            return np.nanmean(reached[chosen].sum(0) / there[chosen].sum(0))

    theirs = stats.bootstrap(
        (np.arange(30),),
        miou,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        confidence_level=LEVEL,
        rng=np.random.default_rng(2),
    )
    found = interval(drawn(PerPicture(reached, there)))
    low, high = theirs.confidence_interval
    assert found == pytest.approx((low, high), abs=0.1 * (high - low)), "both are drawn"


def test_samples_are_the_same_for_every_model_so_that_a_constant_gain_has_no_width():
    before = np.random.default_rng(0).random(50)
    gain = drawn(PerPicture.mean(before + 0.1)) - drawn(PerPicture.mean(before))
    assert interval(gain) == pytest.approx((0.1, 0.1))
    assert interval(drawn(PerPicture.mean(before)))[1] - interval(drawn(PerPicture.mean(before)))[0] > 0.1


def test_samples_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    figure = PerPicture.mean(np.random.default_rng(0).random(50))
    whole = drawn(figure)
    monkeypatch.setattr("phreg.evaluation.bootstrap.AT_ONCE", 1000)  # 20 samples at a time
    np.testing.assert_array_equal(drawn(figure), whole)


def test_a_sample_without_anything_to_compute_a_figure_over_is_left_out_of_the_interval():
    figure = PerPicture(np.array([[0.5], [0.0], [0.0]]), np.array([[1.0], [0.0], [0.0]]))
    samples = drawn(figure)
    # Two pictures of three say nothing, so (2/3)³ of the samples have no figure.
    share = (2 / 3) ** 3
    assert np.isnan(samples).mean() == pytest.approx(share, abs=4 * (share * (1 - share) / RESAMPLES) ** 0.5)
    assert interval(samples) == (0.5, 0.5)
    assert interval(np.full(3, np.nan)) is None


def test_pictures_are_told_apart_by_name_and_order_and_one_alone_has_no_interval():
    figure = PerPicture.mean([0.0, 1.0])
    first, again, turned = (
        resample(order, {"figure": figure})["pictures"] for order in (["a", "b"], ["a", "b"], ["b", "a"])
    )
    assert first == again != turned
    assert resample(["a"], {"figure": PerPicture.mean([1.0])}) == {}
