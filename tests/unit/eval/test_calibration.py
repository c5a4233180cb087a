"""Calibration: arithmetic worked by hand, simulated raters, what the fidelity objective converges to, the report."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import ndtr

from dinalrm_align.eval.calibration import (
    best_scale,
    calibrate,
    calibration_interval,
    calibration_section,
    fidelity_rater,
    likelihood_at,
    negative_log_likelihood,
    pair_nll,
    predict,
    reliability,
)
from dinalrm_align.eval.plots import plot_reliability
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss

BRADLEY_TERRY = LossConfig(likelihood="bradley_terry")
THURSTONE = LossConfig()


def raters(pairs, *, sigma=0.4, scale=1.0, seed=0, per_caption=6):
    """Gaps, and labels of raters of the likelihood's own variance who feel `scale` times the gap."""
    rng = np.random.default_rng(seed)
    gap = rng.standard_normal(pairs)
    label = (rng.random(pairs) < predict(scale * gap, sigma, THURSTONE)).astype(np.float64)
    return gap, label, np.arange(pairs) // per_caption


# ----------------------------------------------------------------------------------------------------- reliability


def test_reliability_by_hand():
    """Two bins, [0.5, 0.75) and [0.75, 1]. 0.3 with label 1 is 0.7 with 0; 0.1 with label 0 is 0.9 with 1.

    First bin: 0.6 and 0.7, labels 1 and 0: predicted 0.65, observed 1/2. Second: 0.9, 0.8, 1.0, labels 1, 0, 1:
    predicted 0.9, observed 2/3. Error: (2 * 0.15 + 3 * 0.2333) / 5 = 0.2.
    """
    found = reliability([0.6, 0.3, 0.1, 0.8, 1.0], [1, 1, 0, 0, 1], bins=2)
    assert found.count.tolist() == [2, 3]
    assert found.predicted == pytest.approx([0.65, 0.9])
    assert found.observed == pytest.approx([0.5, 2 / 3])
    assert found.error == pytest.approx(0.2)


def test_each_pair_counts_once_whichever_image_is_first():
    p, label = np.array([0.6, 0.3, 0.9, 0.5]), np.array([1.0, 0.0, 0.25, 1.0])
    one, other = reliability(p, label), reliability(1 - p, 1 - label)
    assert one.count.sum() == other.count.sum() == 4
    for name in ("predicted", "observed"):
        np.testing.assert_allclose(vars(one)[name], vars(other)[name])


def test_an_even_prediction_favours_no_image():
    """Data sets list the preferred image first: p = 1/2 with label 1, every time, must not count as correct."""
    found = reliability([0.5] * 8, [1.0] * 8)
    assert found.count.tolist() == [8] + [0] * 9
    assert found.observed[0] == 0.5
    assert found.error == 0


def test_edges_belong_to_the_bin_above_and_empty_bins_are_nan():
    found = reliability([0.5, 0.75, 1.0], [1, 1, 1], bins=4)
    assert found.count.tolist() == [1, 0, 1, 1]
    assert np.isnan(found.observed[1]) and np.isnan(found.predicted[1]) and np.isnan(found.standard_error[1])
    assert math.isfinite(found.error) and math.isfinite(found.by_chance)


def test_standard_errors_by_hand():
    """Independent pairs, labels 1, 1, 1, 0: over pairs the deviation is 1/2, over sqrt 4: 0.25. Beta(4, 2) has the
    deviation sqrt(8 / (36 * 7)) = 0.178, which is less. Labels 1, 1, 1, 1: Beta(5, 1), sqrt(5 / (36 * 7)) = 0.141.
    """
    assert reliability([0.9] * 4, [1, 1, 1, 0], bins=1).standard_error == pytest.approx([0.25])
    assert reliability([0.9] * 4, [1, 1, 1, 1], bins=1).standard_error == pytest.approx([math.sqrt(5 / 252)])


def test_standard_errors_are_over_captions():
    """Captions whose four pairs agree: means 1 and 0, deviation 0.7071, over sqrt 2: 0.5. Eight pairs alone: 0.189."""
    labels = [1, 1, 1, 1, 0, 0, 0, 0]
    together = reliability([0.9] * 8, labels, bins=1, captions=["a"] * 4 + ["b"] * 4)
    assert together.standard_error == pytest.approx([0.5])
    assert reliability([0.9] * 8, labels, bins=1).standard_error == pytest.approx([math.sqrt(0.25 / 7)])


def test_labels_that_are_shares_of_raters_are_less_uncertain():
    """0.75 four times, then 0 and 1: mean 4 / 6, variance (4 * 0.5625 + 1) / 6 - 0.4444 = 0.0972, over 7: 0.1179 ** 2.

    One rater who prefers the first image in three pairs of four has a standard error of 0.25.
    """
    found = reliability([0.75] * 4, [0.75] * 4, bins=1)
    assert found.error == 0 and found.standard_error == pytest.approx([math.sqrt((3.25 / 6 - 4 / 9) / 7)])
    halves = reliability([0.75, 0.25], [0.5, 0.5], bins=1)  # ties of raters count from either side
    assert halves.observed == pytest.approx([0.5]) and halves.error == pytest.approx(0.25)


def test_shares_of_raters_have_the_likelihood_of_their_raters():
    """Bradley-Terry, gap 2: two raters of three prefer the first image. A tie at gap 0 has log 2."""
    one = pair_nll([2.0, 2.0, 2.0], [1, 1, 0], sigma=0.0, config=BRADLEY_TERRY).mean()
    assert pair_nll([2.0], [2 / 3], sigma=0.0, config=BRADLEY_TERRY) == pytest.approx([one], rel=1e-6)
    assert pair_nll([0.0, 1.0], [0.5, 0.5], sigma=0.4, config=THURSTONE)[0] == pytest.approx(math.log(2))
    pooled = best_scale([2.0], [2 / 3], sigma=0.0, config=BRADLEY_TERRY)
    assert pooled == pytest.approx(best_scale([2.0] * 3, [1, 1, 0], sigma=0.0, config=BRADLEY_TERRY), rel=1e-3)


def test_likelihood_at_is_the_likelihood_of_the_scores():
    pairs = PairScores({"0.4": np.array([2.0, 0, 1, 0])}, np.array([0, 2]), np.array([1, 3]), np.ones(2), np.arange(2))
    found = likelihood_at(0.4, BRADLEY_TERRY)(pairs)
    assert found == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(-1))], rel=1e-6)


@pytest.mark.parametrize("label", [0.6, 0.8, 1.0])
def test_fidelity_of_a_share_of_raters_falls_until_certainty(label):
    probability = torch.linspace(0.5, 0.999, 20)
    gap = torch.special.ndtri(probability) * math.sqrt(2 * 0.33)  # Thurstone at sigma 0.4
    sigma, labels = torch.full((20,), 0.4), torch.full((20,), label)
    loss = preference_loss(gap, torch.zeros(20), sigma, labels, config=LossConfig(objective="fidelity"))
    assert (loss.diff() < 0).all()


def test_error_by_chance_by_hand():
    """One bin, standard error 0.25: sqrt(2 / pi) / 4."""
    found = reliability([0.9] * 4, [1, 1, 1, 0], bins=1)
    assert found.by_chance == pytest.approx(0.25 * math.sqrt(2 / math.pi))


def test_exact_predictions_show_the_error_of_chance_and_twice_the_gap_shows_more():
    gap, label, caption = raters(6000)
    exact = reliability(predict(gap, 0.4, THURSTONE), label, captions=caption)
    sure = reliability(predict(2 * gap, 0.4, THURSTONE), label, captions=caption)
    assert exact.error < 2 * exact.by_chance
    assert sure.error > 6 * sure.by_chance
    assert (sure.predicted - sure.observed)[sure.count > 0].mean() > 0.03  # overconfident, not the reverse


# ------------------------------------------------------------------------------------------------------- interval


def test_the_interval_resamples_captions_whole():
    """As many pairs in a tenth of the captions, whose pairs agree, carry less information; RNG: the generator only."""
    p = np.full(600, 0.8)
    label = np.repeat(np.random.default_rng(0).random(60) < 0.6, 10).astype(float)

    def width(captions):
        low, high = calibration_interval(p, label, captions, rng=np.random.default_rng(1))
        assert 0 <= low < high <= 1
        return high - low

    assert width(np.arange(600) // 10) > 2 * width(np.arange(600))
    again = [calibration_interval(p, label, np.arange(600), rng=np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Raters who feel three quarters of the predicted gap; the true error is that of 500 000 pairs. 55 of 60 hold it;
    of plain bootstrap quantiles, 33."""
    gap, label, _ = raters(500_000, scale=0.75, seed=9)
    truth = reliability(predict(gap, 0.4, THURSTONE), label).error
    held = 0
    for seed in range(60):
        gap, label, caption = raters(900, scale=0.75, seed=seed)
        p = predict(gap, 0.4, THURSTONE)
        low, high = calibration_interval(p, label, caption, rng=np.random.default_rng(seed), draws=300)
        held += low <= truth <= high
    assert held >= 51


# ----------------------------------------------------------------------------------------- likelihood, Brier, scale


def test_negative_log_likelihood_and_brier_by_hand():
    """Bradley-Terry, gaps 2 and -1, the first preferred: log(1 + e^-2) = 0.126928, log(1 + e) = 1.313262, mean
    0.720095. p = 0.880797 and 0.268941: squared errors 0.014209 and 0.534447, mean 0.274328.
    """
    gap = [2.0, -1.0]
    assert negative_log_likelihood(gap, [1, 1], sigma=0.0, config=BRADLEY_TERRY) == pytest.approx(0.720095, abs=1e-6)
    found = calibrate(gap, [1, 1], [0, 1], sigma=0.0, config=BRADLEY_TERRY, rng=np.random.default_rng(0))
    assert found.brier == pytest.approx(0.274328, abs=1e-6)


def test_a_coin_has_log_two():
    assert negative_log_likelihood([0.0], [1], sigma=0.3, config=THURSTONE) == pytest.approx(math.log(2))


def test_likelihood_stays_finite_where_the_probability_underflows():
    """Phi(-50 / 0.1414) = 0 in float32; -log of it is (353.55^2 / 2) + log(353.55 sqrt(2 pi)) = 62506.8."""
    assert predict([-50.0], 0.0, THURSTONE)[0] == 0
    found = negative_log_likelihood([-50.0], [1], sigma=0.0, config=THURSTONE)
    assert found == pytest.approx(62506.8, rel=1e-5)


def test_best_scale_by_hand():
    """Bradley-Terry, gap 2 four times, the first preferred in three: sigmoid(2 s) = 3/4, s = log(3) / 2 = 0.5493."""
    found = best_scale([2.0] * 4, [1, 1, 1, 0], sigma=0.0, config=BRADLEY_TERRY)
    assert found == pytest.approx(math.log(3) / 2, rel=1e-3)


@pytest.mark.parametrize("felt", [0.25, 1.0, 3.0])
def test_best_scale_finds_what_raters_feel_at_every_level(felt):
    for sigma in (0.05, 0.7):
        gap, label, _ = raters(20_000, sigma=sigma, scale=felt)
        assert best_scale(gap, label, sigma=sigma, config=THURSTONE) == pytest.approx(felt, rel=0.1)


@pytest.mark.parametrize(("gap", "label", "expected"), [
    ([1.0, -2.0], [1, 0], math.inf),
    ([1.0, -2.0], [0, 1], 0.0),
    ([1.0, 1.0], [1, 0], 0.0),
    ([0.0, 0.0], [1, 1], math.nan),
])  # fmt: skip
def test_best_scale_at_its_ends(gap, label, expected):
    assert best_scale(gap, label, sigma=0.4, config=THURSTONE) == pytest.approx(expected, nan_ok=True)


def test_calibrate_puts_it_together():
    gap, label, caption = raters(3000, scale=0.5)
    found = calibrate(gap, label, caption, sigma=0.4, config=THURSTONE, rng=np.random.default_rng(0))
    assert found.reliability.count.sum() == 3000
    assert found.low < found.reliability.error < found.high
    assert found.reliability.by_chance < found.reliability.error
    assert found.scale == pytest.approx(0.5, rel=0.15)
    assert found.scaled_nll < found.nll
    assert found.scaled_nll == pytest.approx(
        negative_log_likelihood(found.scale * gap, label, sigma=0.4, config=THURSTONE)
    )
    certain = calibrate([1.0, 2.0], [1, 1], [0, 1], sigma=0.4, config=THURSTONE, rng=np.random.default_rng(0))
    assert certain.scale == math.inf and certain.scaled_nll == 0


# -------------------------------------------------------------------------------------------------------- fidelity


@pytest.mark.parametrize("q", [0.02, 0.3, 0.5, 0.6, 0.75, 0.99])
def test_fidelity_drives_a_probability_to_its_fixed_point(q):
    """q (1 - sqrt p) + (1 - q)(1 - sqrt(1 - p)) is smallest there; 0.75 gives 0.5625 / 0.625 = 0.9."""

    def expected_loss(p):
        return q * (1 - math.sqrt(p)) + (1 - q) * (1 - math.sqrt(1 - p))

    found = minimize_scalar(expected_loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x
    assert found == pytest.approx(q**2 / (q**2 + (1 - q) ** 2), abs=1e-6)
    assert fidelity_rater(found) == pytest.approx(q, abs=1e-5)


def test_training_by_fidelity_ends_on_the_curve_and_by_likelihood_on_the_diagonal():
    """One gap, learned from three raters of four: Thurstone's p goes to 0.9 under fidelity, to 0.75 under nll."""
    label = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for objective, expected in (("fidelity", 0.9), ("nll", 0.75)):
        config = LossConfig(objective=objective)

        def loss(gap, config=config):
            chosen, sigma = torch.full((4,), gap), torch.full((4,), 0.3)
            return preference_loss(chosen, torch.zeros(4), sigma, label, config=config).mean().item()

        gap = minimize_scalar(loss, bounds=(-2, 3), method="bounded").x
        assert predict([gap], 0.3, config)[0] == pytest.approx(expected, abs=0.005)


# ---------------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def curves():
    def one(sigma, scale):
        gap, label, caption = raters(600, sigma=sigma, scale=scale)
        return calibrate(gap, label, caption, sigma=sigma, config=THURSTONE, rng=np.random.default_rng(0))

    return {
        "calibrated": {sigma: one(sigma, 1.0) for sigma in (0.05, 0.7)},
        "fixed": {sigma: one(sigma, 0.2 if sigma == 0.05 else 1.0) for sigma in (0.05, 0.7)},
    }


def test_the_table_has_a_row_per_arm_and_level(curves):
    section = calibration_section(curves, "heldout")
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith(("| calibrated", "| fixed"))]
    assert [(row[0].strip("| "), row[1], row[2]) for row in rows] == [
        ("calibrated", "0.05", "600"), ("calibrated", "0.7", "600"), ("fixed", "0.05", "600"), ("fixed", "0.7", "600"),
    ]  # fmt: skip
    assert section.startswith("## Calibration on heldout\n") and float(rows[2][7]) < 0.5 < float(rows[3][7])


def test_the_figure_is_written(curves, tmp_path):
    plot_reliability(curves, tmp_path / "new" / "reliability.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["reliability.png"]
    assert (tmp_path / "new" / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_the_likelihood_is_thurstones():
    """Phi(0.5 / sqrt(2 (2 * 0.16 + 0.01))) at gap 0.5, sigma 0.4."""
    assert predict([0.5], 0.4, THURSTONE)[0] == pytest.approx(ndtr(0.5 / math.sqrt(2 * 0.33)), abs=1e-6)
