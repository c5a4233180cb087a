"""Estimates of examples/evidence: gains at equal drift, the smallest detectable effect, choices, ratios of gains."""

import math

import numpy as np
import pytest
from _estimates import at_drift, best_of, common_drift, ratio_interval

from dinalrm_align.eval.report.intervals import seeds_by_captions

DRIFTS = [0.0, 0.2, 0.1, 0.4]
GAINS = np.array([[0.0, 0.0], [0.4, 1.0], [0.3, 0.8], [0.9, 2.0]])  # two captions


@pytest.mark.parametrize(
    ("drift", "expected"),
    [
        (0.0, [0.0, 0.0]),
        (0.05, [0.1, 0.25]),  # a quarter of the way to the first evaluation
        (0.15, [0.3, 0.75]),  # crossed three times: the first time counts
        (0.2, [0.4, 1.0]),
        (0.3, [0.7, 1.6]),  # two thirds from 0.1 to 0.4: 0.3 + 2/3 * 0.6, 0.8 + 2/3 * 1.2
        (0.4, [0.9, 2.0]),
    ],
)
def test_a_gain_is_read_where_a_curve_first_reaches_the_drift(drift, expected):
    np.testing.assert_allclose(at_drift(DRIFTS, GAINS, drift), expected)


@pytest.mark.parametrize("drift", [0.41, -0.01])
def test_nothing_is_extrapolated(drift):
    with pytest.raises(ValueError, match=f"drift: got {drift}; expected one on the curve, 0 to 0.4"):
        at_drift(DRIFTS, GAINS, drift)
    with pytest.raises(ValueError, match="got 3 drifts, 4 values"):
        at_drift(DRIFTS[:3], GAINS, 0.1)


def test_the_common_drift_is_one_that_every_curve_reaches():
    """The second curve has been at 0.3, though it ends at 0.2."""
    assert common_drift([DRIFTS, [0.0, 0.3, 0.2], [0.0, 0.5]]) == 0.3


def test_the_best_setting_is_that_of_the_largest_gain_and_failed_ones_do_not_count():
    assert best_of({"a": 0.1, "b": None, "c": 0.3, "d": math.nan, "e": 0.3}) == "c"
    assert best_of({"a": None}) is None


def crossed(rng, mean, seeds=4, captions=30):
    """A table (S, C) with variance between seeds, between captions, and of both."""
    return (
        mean + 0.2 * rng.normal(size=(seeds, 1)) + 0.2 * rng.normal(size=(1, captions))
        + 0.2 * rng.normal(size=(seeds, captions))
    )  # fmt: skip


@pytest.mark.parametrize("seeds", [1, 4])
def test_the_ends_of_a_ratio_are_the_ratios_that_are_just_not_separated(seeds):
    rng = np.random.default_rng(1)
    above, below = crossed(rng, 0.5, seeds), crossed(rng, 1.2, seeds)
    ratio = ratio_interval(above, below)
    assert ratio.value == pytest.approx(above.mean() / below.mean()) and ratio.low < ratio.value < ratio.high
    low, high = (seeds_by_captions(above - end * below) for end in (ratio.low, ratio.high))
    assert low.low == pytest.approx(0, abs=1e-9) and high.high == pytest.approx(0, abs=1e-9)


def test_a_ratio_to_a_gain_that_may_be_zero_has_no_interval():
    rng = np.random.default_rng(2)
    ratio = ratio_interval(crossed(rng, 0.5), crossed(rng, 0.05))
    assert math.isinf(ratio.low) and math.isinf(ratio.high) and "not separated from 0" in str(ratio)


def test_a_proportional_gain_has_an_exact_ratio():
    below = crossed(np.random.default_rng(3), 2.0)
    ratio = ratio_interval(below / 4, below)
    np.testing.assert_allclose([ratio.low, ratio.value, ratio.high], 0.25)
    assert str(ratio) == "0.25 [0.25, 0.25]"
    with pytest.raises(ValueError, match=r"got \(4, 30\) and \(3, 30\)"):
        ratio_interval(below, below[:3])


def test_a_ratios_interval_covers_the_true_ratio():
    """250 repetitions of 4 seeds and 30 captions; the interval is conservative, as that of a mean is."""
    rng = np.random.default_rng(4)
    found = [ratio_interval(crossed(rng, 0.6), crossed(rng, 1.5)) for _ in range(250)]
    assert 0.94 < np.mean([one.low <= 0.4 <= one.high for one in found]) <= 1.0
    assert np.median([one.high - one.low for one in found]) < 0.7
