import math

import numpy as np
import pytest
from scipy.special import ndtr

from dinalrm_align.eval.report.intervals import by_caption, seeds_by_captions


def test_two_seeds_and_two_captions_by_hand():
    """Seed means 1.5 and 5.5: variance 8, over S = 2: 4. Caption means 2 and 5: variance 4.5, over C = 2: 2.25. The
    residuals are 1, -1, -1, 1: mean square 4 / 1, over S C = 4: 1. Terms 2.25 and 4 - 1: error sqrt 5.25.

    Both have one degree of freedom, t = 12.7062: reach 12.7062 sqrt 5.25. Power 80 %: noncentrality 16.3340.
    """
    found = seeds_by_captions(np.array([[1.0, 2.0], [3.0, 8.0]]))
    assert found.mean == 3.5
    assert found.standard_error == pytest.approx(math.sqrt(5.25))
    assert found.high == pytest.approx(3.5 + 12.7062047 * math.sqrt(5.25), rel=1e-6)
    assert found.low == pytest.approx(3.5 - 12.7062047 * math.sqrt(5.25), rel=1e-6)
    assert found.detectable == pytest.approx(16.3340 * math.sqrt(5.25), rel=1e-4)
    assert (found.seeds, found.captions) == (2, 2)


def test_seeds_and_captions_have_a_t_of_their_own():
    """Rows 0, 2 plus columns 0, 1, 2, without residual: a = 2 / 2 with t(1) = 12.7062, b = 1 / 3 with t(2) = 4.30265.

    Noncentralities with a power of 80 %: 16.3340 and 5.65349.
    """
    found = seeds_by_captions(np.add.outer([0.0, 2.0], [0.0, 1.0, 2.0]))
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(math.sqrt(12.7062047**2 + 4.3026527**2 / 3), rel=1e-6)
    assert found.detectable == pytest.approx(math.sqrt(16.3340**2 + 5.65349**2 / 3), rel=1e-4)


def test_the_residual_counts_once():
    """Tables of noise alone: each of the two terms has the mean 1 / (S C), and so has the variance of the mean."""
    rng = np.random.default_rng(0)
    for shape in ((4, 50), (50, 4)):
        squares = [seeds_by_captions(rng.standard_normal(shape)).standard_error ** 2 for _ in range(400)]
        assert np.mean(squares) == pytest.approx(1 / 200, rel=0.2)


def test_one_seed_is_a_plain_t_interval_over_captions():
    """1, 2, 3: mean 2, error 1 / sqrt 3, t(0.975, 2) = 4.30265."""
    found = seeds_by_captions(np.array([[1.0, 2.0, 3.0]]))
    assert found.seeds == 1 and math.isnan(found.detectable)
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)


def test_where_nothing_varies_the_interval_is_the_mean():
    found = seeds_by_captions(np.full((3, 4), 0.25))
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_one_caption_has_a_mean_and_no_interval():
    found = seeds_by_captions(np.array([[1.0], [3.0]]))
    assert found.mean == 2 and np.isnan([found.low, found.high, found.standard_error, found.detectable]).all()
    assert found.brief == "+2.000 (no interval: one prompt)"


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((0, 4)), np.zeros((2, 0)), np.array([[0.0, np.nan]])])
def test_refuses_what_is_no_table_of_numbers(wrong):
    with pytest.raises(ValueError, match="differences: got"):
        seeds_by_captions(wrong)


def test_a_caption_is_the_mean_of_its_samples():
    assert by_caption([1.0, 5.0, 3.0, 7.0], ["b", "a", "b", "a"]).tolist() == [6.0, 2.0]


def test_captions_weigh_by_their_number_of_samples():
    """a: 0, 0, 3 (mean 1); b: 9. Mean of all 3, mean count 2: a = 3 + 3/2 (1 - 3) = 0, b = 3 + 1/2 (9 - 3) = 6."""
    found = by_caption([0.0, 9.0, 0.0, 3.0], ["a", "b", "a", "a"])
    assert found.tolist() == [0.0, 6.0]
    assert found.mean() == 3.0


def test_unequal_counts_add_no_spread_of_their_own():
    """Samples of one value have none, however many each caption has."""
    assert by_caption([7.0] * 4, ["a", "a", "a", "b"]).tolist() == [7.0, 7.0]


def test_by_caption_refuses_lengths_that_differ():
    with pytest.raises(ValueError, match="one caption per value"):
        by_caption([1.0, 2.0], ["a"])


# ------------------------------------------------------------------------------- coverage and power, by simulation

PAIRS = 3  # per caption
RATIOS = [0.0, 0.2, 1.0]  # standard deviation over seeds, in units of that over captions


def correct(rng, number, seeds, captions, *, arms, ratio):
    """Correctness (arms, number, seeds, captions) of `number` simulated experiments, averaged over pairs, and its truth
    by arm. A pair is ordered correctly if the arm's mean plus effects of the seed (of each arm), of the caption, of the
    pair, and of the pair in this training, is above 0: the probability is Phi(mean / (all standard deviations)).
    """
    of_caption, of_pair, own = 0.4, 0.5, 1.0
    draw = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    shared = of_caption * draw(number, 1, captions, 1) + of_pair * draw(number, 1, captions, PAIRS)
    tables = []
    for mean in arms:
        of_seed = ratio * of_caption * draw(number, seeds, 1, 1)
        latent = mean + shared + of_seed + own * draw(number, seeds, captions, PAIRS)
        tables.append((latent > 0).mean(axis=-1))
    deviation = math.sqrt((1 + ratio**2) * of_caption**2 + of_pair**2 + own**2)
    return np.stack(tables), ndtr(np.array(arms) / deviation)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("captions", [50, 200])
@pytest.mark.parametrize("ratio", RATIOS)
def test_ninety_five_per_cent_intervals_contain_the_truth_that_often(seeds, captions, ratio):
    """Of an accuracy of 0.74, and of a paired difference of 0.07: 1500 experiments."""
    rng = np.random.default_rng((seeds, captions, int(10 * ratio)))
    tables, truths = correct(rng, 1500, seeds, captions, arms=(0.8, 0.55), ratio=ratio)
    for values, truth in ((tables[0], truths[0]), (tables[0] - tables[1], truths[0] - truths[1])):
        intervals = [seeds_by_captions(table) for table in values]
        share = np.mean([one.low <= truth <= one.high for one in intervals])
        print(f"{seeds} seeds, {captions} captions, ratio {ratio}: {share:.3f}")
        assert 0.93 <= share <= 0.985


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_smallest_detectable_effect_is_detected_in_four_of_five_experiments(seeds, ratio):
    """The root mean square of the estimates of 2000 experiments without a difference, added to their differences."""
    rng = np.random.default_rng((seeds, int(10 * ratio)))
    tables, _ = correct(rng, 2000, seeds, 100, arms=(0.6, 0.6), ratio=ratio)
    intervals = [seeds_by_captions(table) for table in tables[0] - tables[1]]
    effect = math.sqrt(np.mean([one.detectable**2 for one in intervals]))
    share = np.mean([one.low + effect > 0 for one in intervals])
    print(f"{seeds} seeds, ratio {ratio}: effect {effect:.4f}, power {share:.3f}")
    assert 0.76 <= share <= 0.85
