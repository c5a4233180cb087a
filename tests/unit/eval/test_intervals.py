import math

import numpy as np
import pytest

from dinalrm_align.eval.report.intervals import by_caption, seeds_by_captions


def test_two_seeds_and_two_captions_by_hand():
    """Seed means 1.5 and 5.5: variance 8, over S = 2: 4. Caption means 2 and 5: variance 4.5, over C = 2: 2.25.

    Error sqrt 6.25 = 2.5. Both have one degree of freedom, t = 12.7062: reach 12.7062 * 2.5.
    """
    found = seeds_by_captions(np.array([[1.0, 2.0], [3.0, 8.0]]))
    assert found.mean == 3.5
    assert found.standard_error == pytest.approx(2.5)
    assert found.high == pytest.approx(3.5 + 12.7062047 * 2.5, rel=1e-6)
    assert found.low == pytest.approx(3.5 - 12.7062047 * 2.5, rel=1e-6)
    assert (found.seeds, found.captions) == (2, 2)


def test_seeds_and_captions_have_a_t_of_their_own():
    """Rows 0, 2 plus columns 0, 1, 2: a = 2 / 2 with t(1) = 12.7062, b = 1 / 3 with t(2) = 4.30265."""
    found = seeds_by_captions(np.add.outer([0.0, 2.0], [0.0, 1.0, 2.0]))
    assert found.mean == 2
    assert found.high - 2 == pytest.approx(math.sqrt(12.7062047**2 + 4.3026527**2 / 3), rel=1e-6)


def test_one_seed_is_a_plain_t_interval_over_captions_and_says_so():
    """1, 2, 3: mean 2, error 1 / sqrt 3, t(0.975, 2) = 4.30265."""
    found = seeds_by_captions(np.array([[1.0, 2.0, 3.0]]))
    assert found.seeds == 1
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), rel=1e-6)
    assert "one seed" in str(found)
    assert "one seed" not in str(seeds_by_captions(np.array([[1.0, 2.0], [2.0, 3.0]])))


def test_where_nothing_varies_the_interval_is_the_mean():
    found = seeds_by_captions(np.full((3, 4), 0.25))
    assert (found.low, found.mean, found.high) == (0.25, 0.25, 0.25)


def test_one_caption_has_a_mean_and_no_interval():
    found = seeds_by_captions(np.array([[1.0], [3.0]]))
    assert found.mean == 2 and np.isnan([found.low, found.high, found.standard_error]).all()
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


@pytest.mark.parametrize("seeds", [3, 4, 5])
@pytest.mark.parametrize("deviations", [(1.0, 1.0, 1.0), (0.05, 1.0, 1.0), (1.0, 0.3, 1.0)])
def test_ninety_five_per_cent_intervals_hold_the_truth_that_often(seeds, deviations):
    """400 tables of 50 captions with random effects of seed, caption and cell around a mean of 0.3."""
    rng = np.random.default_rng(seeds)
    of_seed, of_caption, of_cell = deviations
    held = 0
    for _ in range(400):
        table = 0.3 + of_seed * rng.standard_normal((seeds, 1)) + of_caption * rng.standard_normal((1, 50))
        found = seeds_by_captions(table + of_cell * rng.standard_normal((seeds, 50)))
        held += found.low <= 0.3 <= found.high
    assert held / 400 >= 0.93
