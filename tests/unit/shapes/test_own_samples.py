"""The two numbers of examples/evidence/own_samples.py, by hand."""

import re

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
    assert script.share(got, best).mean() == pytest.approx(100 * 0.2 / 1.2)


def test_pairs_with_a_gap_are_counted_and_ties_count_half(script):
    right, total = script.ordered(GOLD, GOLD, 0.25)
    assert total.tolist() == [5, 2] and right.tolist() == [5, 2]
    right, total = script.ordered(-GOLD, GOLD, 0.0)
    assert total.tolist() == [5, 5] and right.tolist() == [0, 0]
    right, total = script.ordered(np.zeros_like(GOLD), GOLD, 0.0)
    assert right.tolist() == [2.5, 2.5]


def test_the_standard_error_of_a_share_is_that_of_the_ratio(script):
    rng = np.random.default_rng(0)
    draws = rng.gamma(2.0, size=(4000, 100))
    parts = draws * rng.uniform(0, 0.6, size=draws.shape)
    ratios = 100 * parts.sum(1) / draws.sum(1)
    errors = [script.share(part, whole).std(ddof=1) / 10 for part, whole in zip(parts[:200], draws[:200])]
    assert np.mean(errors) == pytest.approx(ratios.std(), rel=0.05)


def test_rewards_are_compared_by_sample_and_position(script):
    rng = np.random.default_rng(0)
    gold = rng.standard_normal((50, 4))
    noisy = [gold + rng.standard_normal(gold.shape) for _ in range(3)]
    text = script.report({"first": noisy, "alike": [1 + 2 * one for one in noisy], "oracle": [gold]}, gold)
    assert f"| alike less first |{' +0.0 [+0.0, +0.0] (0.0) |' * 3}\n" in text
    assert f"| oracle |{' 100.0 [100.0, 100.0] |' * 3}\n" in text
    own = np.mean([script.measures(one, gold)["best of 4"].mean() for one in noisy])
    assert f"| first | {own:.1f} [" in text and f"| oracle less first | {100 - own:+.1f} [" in text
    with pytest.raises(ValueError, match="shorter|longer"):
        script.report({"first": noisy, "two": noisy[:2]}, gold)


def test_a_number_that_nothing_bears_on_is_none(script):
    text = script.report({"a": [np.eye(4)], "b": [1 - np.eye(4)]}, np.tile([0.0, 0.1, 0.2, 0.1], (4, 1)))
    assert [line.split("|")[3].strip() for line in text.splitlines() if line.startswith(("| a", "| b"))] == ["none"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "lora"], "groups of \\[0, 1\\] rewards"),
        (["--group", "a", "dinalrm", "pixel", "--group", "b", "x", "y", "z"], "groups of \\[1, 2, 3\\] rewards"),
        (["--rewards", "pixel", "--group", "pixel", "dinalrm"], "expected different names"),
    ],
)
def test_groups_are_checked_first(script, monkeypatch, capsys, options, message):
    monkeypatch.setattr("sys.argv", ["own_samples.py", *options])
    with pytest.raises(SystemExit):
        script.main()
    assert re.search(message, capsys.readouterr().err)
