"""Accuracy under each named protocol, against numbers worked out by hand, and its interval."""

from dataclasses import replace

import numpy as np
import pytest

from dinalrm_align.eval.protocols import accuracy
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets_config import PROTOCOLS, TEST_SETS, check_protocol, default_protocol, protocols_of


def pair_scores(scores, pairs, caption=None, group=None):
    """pairs: (first, second, label of the first)."""
    first, second, label = (np.array(column) for column in zip(*pairs))
    caption = np.zeros(len(pairs), int) if caption is None else np.array(caption)
    group = caption if group is None else np.array(group)
    return PairScores(
        {"s": np.array(scores, np.float32)}, first, second, label.astype(np.float32), caption, group=group
    )


LISTS = pair_scores(
    [3.0, 1, 1, 0, 0.5, 5],
    [(0, 1, 1), (0, 2, 1), (1, 2, 0), (3, 4, 0.5), (3, 5, 1), (4, 5, 1)],
    caption=[0, 0, 0, 1, 1, 1],
)
"""Two ranked lists. Right, right, equal scores with the preferred published last; tied by raters, wrong, wrong."""


@pytest.mark.parametrize(
    ("protocol", "value", "pairs"),
    [
        ("pooled", 2 / 5, 5), ("strict", 2 / 5, 5), ("diff", 2 / 5, 5),
        ("grouped", (2 / 3 + 0 / 2) / 2, 5),
        ("half-ties", (2 + 0.5) / 5, 5),
        ("hpsv2", (2 / 3 + 1 / 3) / 2, 6),
        ("mps", (3 / 3 + 1 / 3) / 2, 6),
        ("three-way", 2 / 6, 6),
        ("tau", 3 / 6, 6),  # at eps 0.5: two right and one tie; at eps 0: two right; at eps 2: the tie and 1 1 alone
    ],
)  # fmt: skip
def test_by_hand(protocol, value, pairs):
    found = accuracy(LISTS, protocol, "s", draws=100)
    assert found.value == pytest.approx(value) and found.pairs == pairs and found.prompts == 2


def test_hpsv2_puts_equal_scores_in_the_order_of_publication():
    """1 inversion of 1 pair, or none: who is published first is ranked first."""
    for rows, expected in (((0, 1), 1.0), ((1, 0), 0.0)):
        one = pair_scores([2.0, 2.0], [(*rows, 1)])
        assert accuracy(one, "hpsv2", "s", draws=100).value == expected
        assert accuracy(one, "mps", "s", draws=100).value == 1.0
        assert accuracy(one, "pooled", "s", draws=100).value == 0.0


def test_who_stands_first_changes_nothing():
    swapped = replace(LISTS, chosen=LISTS.rejected, rejected=LISTS.chosen, label=1 - LISTS.label)
    for protocol in PROTOCOLS:
        assert accuracy(swapped, protocol, "s", draws=100) == accuracy(LISTS, protocol, "s", draws=100)


def test_lists_of_one_prompt_are_lists_of_their_own():
    """Per list 1/1 and 0/3; were they one list, 1/4."""
    one = pair_scores([2.0, 1, 0, 1, 2], [(0, 1, 1), (2, 3, 1), (2, 4, 1), (3, 4, 1)], group=[0, 1, 1, 1])
    assert accuracy(one, "grouped", "s", draws=100).value == pytest.approx(0.5)
    assert accuracy(one, "pooled", "s", draws=100).value == 0.25


def test_tau_moves_all_pairs_of_one_gap_together():
    """Gaps 1 (tied), 1 (right), 2 (right). eps 1 makes both of gap 1 ties: 2 of 3; at eps 0, 2 of 3: never 3 of 3."""
    one = pair_scores([1.0, 0, 2, 0], [(0, 1, 0.5), (0, 1, 1), (2, 3, 1)])
    assert accuracy(one, "tau", "s", draws=100).value == pytest.approx(2 / 3)


def test_the_interval_is_that_of_a_share_where_every_prompt_has_a_pair():
    """sqrt(0.7 * 0.3 / 400) = 0.0229, so 0.7 +- 0.045."""
    right = [1] * 280 + [0] * 120
    one = pair_scores([1.0, 0.0], [(0, 1, label) for label in right], caption=range(400))
    found = accuracy(one, "pooled", "s")
    assert found.value == 0.7
    assert found.low == pytest.approx(0.655, abs=0.006) and found.high == pytest.approx(0.745, abs=0.006)


@pytest.mark.parametrize("protocol", ["pooled", "grouped", "tau"])
def test_pairs_of_a_prompt_that_agree_count_as_one_in_the_interval(protocol):
    labels = [1] * 30 + [0] * 10
    once = pair_scores([1.0, 0.0], [(0, 1, label) for label in labels], caption=range(40))
    nine = pair_scores([1.0, 0.0], [(0, 1, label) for label in np.repeat(labels, 9)], caption=np.repeat(range(40), 9))
    one, many = (accuracy(each, protocol, "s", draws=200) for each in (once, nine))
    assert (one.low, one.high) == pytest.approx((many.low, many.high)) and one.low < one.value < one.high


def test_no_pair_that_counts_is_no_accuracy():
    found = accuracy(pair_scores([1.0, 0.0], [(0, 1, 0.5)]), "pooled", "s")
    assert np.isnan(found.value) and found.pairs == 0 and str(found) == "no pairs"


def test_unknown_protocols_list_the_known_ones():
    with pytest.raises(ValueError, match="^protocol: got 'acc'; known: pooled, strict, diff, grouped"):
        accuracy(LISTS, "acc", "s")
    with pytest.raises(ValueError, match="^protocol.hpdv3: got 'poled'; did you mean 'pooled'.* known: pooled, "):
        check_protocol("hpdv3", "poled")
    with pytest.raises(ValueError, match="^protocol.hpdv3: got 'hpsv2' .it needs ranked lists"):
        check_protocol("hpdv3", "hpsv2")


def test_every_set_is_known_by_a_protocol_it_has():
    assert all(default_protocol(name) in protocols_of(name) for name in [*TEST_SETS, "mine"])


@pytest.mark.parametrize("protocol", [rule for rule in PROTOCOLS])
def test_pairs_of_one_prompt_have_an_accuracy_and_no_interval(protocol):
    """Prompts without a counted pair do not help: here the second one's only pair is tied by raters."""
    pairs = [(0, 1, 1), (1, 2, 1)]
    for scores in (pair_scores([3.0, 1, 2], pairs), pair_scores([3.0, 1, 2, 0], [*pairs, (0, 3, 0.5)], [0, 0, 1])):
        if protocol in ("hpsv2", "mps", "three-way", "tau") and len(scores.label) == 3:
            continue  # they count ties
        found = accuracy(scores, protocol, "s", draws=100)
        assert np.isnan([found.low, found.high]).all() and found.prompts == 1
        assert str(found) == f"{100 * found.value:.2f} (no interval: one prompt)"
