"""The two numbers of examples/evidence/own_samples.py, by hand."""

import numpy as np
import pytest
from paths import load_evidence


@pytest.fixture(scope="module")
def script():
    return load_evidence("own_samples")


GOLD = np.array([[1.0, 2.0, 3.0, 2.0], [0.0, 0.1, 0.0, 0.3]])


def test_the_share_of_the_way_to_the_best_sample(script):
    got, best = script.best_of(np.array([[0, 5, 1, 2], [0, 0, 0, 9]]), GOLD)
    assert got == pytest.approx([0.0, 0.2]) and best == pytest.approx([1.0, 0.2])
    assert script.share(got, best).startswith("16.7 %")


def test_pairs_with_a_gap_are_counted_and_ties_count_half(script):
    right, total = script.ordered(GOLD, GOLD, 0.25)
    assert total.tolist() == [5, 2] and right.tolist() == [5, 2]
    right, total = script.ordered(-GOLD, GOLD, 0.0)
    assert total.tolist() == [5, 5] and right.tolist() == [0, 0]
    right, total = script.ordered(np.zeros_like(GOLD), GOLD, 0.0)
    assert right.tolist() == [2.5, 2.5]


def test_an_interval_over_captions_contains_its_share(script):
    part = np.arange(40) % 2
    share, low, high = (float(word.strip("[],%")) for word in script.share(part, np.ones(40)).split() if word != "%")
    assert low < share == 50 < high
