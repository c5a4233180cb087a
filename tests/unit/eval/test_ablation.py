"""Ablations: paired differences and what follows from them, noise levels, variance over noise draws."""

import numpy as np
import pytest

from dinalrm_align.eval.ablation import (
    Evidence,
    accuracy_at,
    arm_mean,
    draw_groups,
    inference_section,
    levels_with_draws,
    noise_shares,
    paired_difference,
    question_section,
    tables_by_sigma,
    variance_section,
    verdict,
    written,
)
from dinalrm_align.eval.config import ARMS, BASELINE, QUESTIONS, AblateRun
from dinalrm_align.eval.report.intervals import Interval
from dinalrm_align.eval.scores import NoiseLevels, PairScores
from dinalrm_align.reward.config import RewardConfig

SIGMAS = [0.0, 0.2, 0.4, 0.8]
ENSEMBLE = [0.2, 0.4]
PAIRS = 400


def scores_of(rate, seed, *, names=None, spread=1.0):
    """400 pairs of as many captions; each noise level is right for about `rate` of them."""
    rng = np.random.default_rng(seed)
    names = names or [NoiseLevels.at(sigma).name for sigma in SIGMAS] + [NoiseLevels.at(*ENSEMBLE).name]
    scores = {}
    for name in names:
        gap = np.where(rng.random(PAIRS) < rate, 1.0, -1.0) * spread
        scores[name] = np.stack([gap, np.zeros(PAIRS)], axis=1).flatten()
    rows = np.arange(PAIRS)
    return PairScores(scores, 2 * rows, 2 * rows + 1, np.ones(PAIRS, np.float32), rows)


def evidence(**rates):
    return evidence_of(
        {
            arm: {seed: {"set": scores_of(rate, 10 * index + seed)} for seed in range(3)}
            for index, (arm, rate) in enumerate(rates.items())
        }
    )


def evidence_of(runs):
    return Evidence(runs, ["set"], SIGMAS, [ENSEMBLE])


def test_accuracy_is_the_mean_over_seeds_and_captions():
    found = evidence(calibrated=0.8)
    expected = np.mean([found.runs["calibrated"][seed]["set"].correct("0.4").mean() for seed in range(3)])
    interval = arm_mean(found, "calibrated", "set", accuracy_at(0.4))
    assert interval.mean == pytest.approx(expected) and (interval.seeds, interval.captions) == (3, PAIRS)
    assert interval.low < interval.mean < interval.high


@pytest.mark.parametrize(("better", "worse", "expected"), [(0.9, 0.6, "above"), (0.6, 0.9, "below")])
def test_a_large_difference_has_a_direction(better, worse, expected):
    found = evidence(calibrated=better, fixed=worse)
    gap = paired_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    assert gap.mean == pytest.approx(better - worse, abs=0.05) and verdict(gap) == f"{written(gap)}, {expected}"


def test_an_interval_with_0_has_no_direction_and_its_smallest_detectable_effect():
    found = evidence(calibrated=0.8, fixed=0.8)
    gap = paired_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    assert gap.low < 0 < gap.high and gap.detectable > gap.standard_error > 0
    size = f"{100 * gap.detectable:.1f}"
    assert verdict(gap) == f"{written(gap)}, not separated ({size})"
    assert verdict(gap, effect="; smallest {} points") == f"{written(gap)}, not separated; smallest {size} points"
    nats = f"{written(gap, 1, 3)}, not separated ({gap.detectable:.3f})"
    assert verdict(gap, scale=1, digits=3) == nats


def test_one_seed_shows_nothing_however_large_the_difference():
    runs = {arm: {0: by_seed[0]} for arm, by_seed in evidence(calibrated=0.9, fixed=0.6).runs.items()}
    found = evidence_of(runs)
    gap = paired_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    assert gap.low > 0 and verdict(gap) == written(gap)
    text = question_section(QUESTIONS["likelihood"], found)
    text += tables_by_sigma(found, "set", lambda _, sigma: accuracy_at(sigma), SIGMAS)
    row = next(line for line in text.splitlines() if line.startswith("| calibrated minus fixed | above | set | 1 |"))
    for word in ("above", "below", "separated", "detectable"):
        assert word not in text.replace(row[:40], "")


def test_differences_are_paired_over_shared_seeds_and_equal_pairs():
    found = evidence(calibrated=0.8, fixed=0.7)
    del found.runs["fixed"][2]
    assert paired_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4)).seeds == 2
    other = found.runs["fixed"][0]["set"]
    found.runs["fixed"][0]["set"] = PairScores(other.scores, other.rejected, other.chosen, other.label, other.caption)
    with pytest.raises(ValueError, match="different pairs 'set', seed 0"):
        paired_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    found.runs["fixed"] = {7: found.runs["fixed"][1]}
    with pytest.raises(ValueError, match="share no seed"):
        paired_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))


def test_raters_that_tie_are_left_out():
    found = evidence(calibrated=0.8)
    for sets in found.runs["calibrated"].values():
        sets["set"].label[:100] = 0.5
    assert arm_mean(found, "calibrated", "set", accuracy_at(0.4)).captions == PAIRS - 100


def test_points():
    assert written(Interval(0.006, -0.002, 0.014, 0.004, 3, 9)) == "+0.6 [-0.2, +1.4]"
    assert written(Interval(0.894, 0.88, 0.91, 0.01, 3, 9), signed=False) == "89.4 [88.0, 91.0]"


def test_a_section_has_a_row_per_comparison_with_the_papers_claim():
    found = evidence(calibrated=0.9, fixed=0.6, nll=0.9, bradley_terry=0.9)
    text = question_section(QUESTIONS["likelihood"], found)
    assert "| fixed: fixed variance | 3 |" in text
    row = next(line for line in text.splitlines() if "| calibrated minus fixed |" in line)
    assert row.startswith("| calibrated minus fixed | above | set | 3 | +") and row.count(", above") == 2
    for pair in ("calibrated minus bradley_terry", "nll minus bradley_terry"):
        row = next(line for line in text.splitlines() if f"| {pair} |" in line)
        assert row.startswith(f"| {pair} |  | set | 3 |")
        assert row.count("], not separated; smallest detectable effect ") == row.count(" points") == 2
    text = question_section(QUESTIONS["likelihood"], evidence(calibrated=0.6, fixed=0.9))
    assert text.count(", below |") == 2 and "nll" not in text
    assert question_section(QUESTIONS["likelihood"], evidence(calibrated=0.8)) == ""


def test_arms_without_a_common_seed_are_not_compared():
    found = evidence(calibrated=0.9, fixed=0.6)
    found.runs["fixed"] = {7: found.runs["fixed"][1]}
    text = question_section(QUESTIONS["likelihood"], found)
    assert "| fixed: fixed variance | 1 |" in text and "calibrated minus fixed" not in text
    assert "minus" not in tables_by_sigma(found, "set", lambda _, sigma: accuracy_at(sigma), SIGMAS)


def test_tables_by_sigma_by_hand():
    """Arm a is right on both pairs at 0.2 and on the first at 0.4; arm b the reverse. Captions: 1, 1 and 1, 0."""

    def scores(first, second):
        found = {"0.2": np.array([1.0, 0, *first]), "0.4": np.array([1.0, 0, *second])}
        return PairScores(found, np.array([0, 2]), np.array([1, 3]), np.ones(2, np.float32), np.arange(2))

    runs = {"calibrated": scores((1, 0), (0, 1)), "fixed": scores((0, 1), (1, 0))}
    found = evidence_of({arm: {seed: {"set": one} for seed in (0, 1)} for arm, one in runs.items()})
    text = tables_by_sigma(found, "set", lambda _, sigma: accuracy_at(sigma), [0.2, 0.4])
    lines = text.splitlines()
    assert lines[0] == "| sigma | calibrated | fixed |" and lines[6] == "| sigma | calibrated minus fixed |"
    assert lines[2].startswith("| 0.2 | 100.0 [100.0, 100.0] | 50.0 [")
    assert lines[3].startswith("| 0.4 | 50.0 [") and lines[3].endswith("| 100.0 [100.0, 100.0] |")
    assert lines[4].startswith("| mean, 0 < sigma < 1 | 75.0 [") and lines[4].count(" 75.0 [") == 2
    assert lines[8].startswith("| 0.2 | +50.0 [") and lines[9].startswith("| 0.4 | -50.0 [")
    assert lines[10].startswith("| mean, 0 < sigma < 1 | +0.0 [")


def test_labels_that_are_shares_of_raters_count_by_their_majority():
    """Three of four raters and two of three prefer the first image; two of four tie; one of four prefer the second."""
    gaps, labels = np.array([1.0, -1, 1, -1]), np.array([3 / 4, 2 / 3, 2 / 4, 1 / 4], np.float32)
    scores = {"0.4": np.stack([gaps, np.zeros(4)], axis=1).flatten()}
    pairs = PairScores(scores, 2 * np.arange(4), 2 * np.arange(4) + 1, labels, np.array([0, 0, 0, 1]))
    assert np.array_equal(pairs.correct("0.4"), [1, 0, np.nan, 1], equal_nan=True)
    found = arm_mean(
        evidence_of({BASELINE: {seed: {"set": pairs} for seed in (0, 1)}}), BASELINE, "set", accuracy_at(0.4)
    )
    assert found.mean == pytest.approx(2 / 3) and found.captions == 2


def test_the_table_lists_every_scored_choice_of_noise_levels():
    levels = [NoiseLevels.at(sigma) for sigma in SIGMAS] + [NoiseLevels.at(*ENSEMBLE)] + levels_with_draws(4, ENSEMBLE)
    names = [level.name for level in dict.fromkeys(levels)]
    found = evidence_of({BASELINE: {seed: {"set": scores_of(0.8, seed, names=names)} for seed in range(2)}})
    text = inference_section(found, BASELINE)
    for label in ("sigma 0.8", "0.2+0.4, tokens", "0.2+0.4, average", "sigma 0.4, 2 draws, average",
                  "sigma 0.4, 2 draws, tokens", "sigma 0.4, 4 draws, average"):  # fmt: skip
        assert f"| {label} |" in text
    assert "8 draws" not in text and "| token ensemble above sigma 0.4 | set | " in text
    assert "| sigma 0.4 above sigma 0 | set | " in text and "above sigma 0.8" in text and "above sigma 0.95" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| sigma 0.4 | ")]
    assert row.endswith("|  |"), "sigma 0.4 is not compared with itself"


def test_draws_are_grouped_without_overlap():
    assert draw_groups(2, 5) == [(0, 1), (2, 3)] and draw_groups(4, 3) == []
    assert NoiseLevels((0.4, 0.4), (2, 3)) in levels_with_draws(4, ENSEMBLE)


def test_noise_share_is_one_over_k_for_independent_draws():
    """Scores: image's own (variance 4) plus noise (variance 1): the share is 1/4 for one draw, 1/16 for four."""
    rng = np.random.default_rng(0)
    own = 2 * rng.standard_normal(20_000)
    scores = {NoiseLevels.at(0.4, draw=draw).name: own + rng.standard_normal(own.size) for draw in range(8)}
    for level in levels_with_draws(8, ENSEMBLE):
        scores.setdefault(level.name, own + rng.standard_normal(own.size))
    rows = np.arange(2)
    pairs = PairScores(scores, rows, rows + 1, np.ones(2, np.float32), rows)
    shares = {(row.label, row.forwards): row.share for row in noise_shares([pairs], 8, ENSEMBLE)}
    for count in (1, 2, 4):
        assert shares["sigma 0.4, draws averaged", count] == pytest.approx(1 / 4 / count, rel=0.05)
    assert "| sigma 0.4, draws averaged | 4 | 0.06" in variance_section(noise_shares([pairs], 8, ENSEMBLE))


def test_arms_move_blocks_and_taps_with_the_model():
    reward = RewardConfig()  # 12 blocks, taps 4, 8, 12
    assert ARMS["half_depth"].options(reward) == {
        "reward.num_layers": 6, "reward.visual_taps": [2, 4, 6], "reward.text_taps": [2, 4, 6],
    }  # fmt: skip
    assert ARMS["more_depth"].options(reward)["reward.visual_taps"] == [6, 12, 18]
    assert ARMS["last_tap"].options(reward)["reward.text_taps"] == [12]
    assert ARMS["calibrated"].options(reward) == {}


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions_name_known_arms_and_compare_with_the_baseline(question):
    assert set(question.arms) <= ARMS.keys() and question.arms[0] == BASELINE
    assert {arm for pair in question.paper for arm in pair} <= set(question.arms)


def test_unknown_arms_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="^arms: got 'bradly_terry'; did you mean 'bradley_terry'"):
        AblateRun(arms=["bradly_terry"])
    with pytest.raises(ValueError, match="^seeds: got .1, 1.; expected at least one, each once"):
        AblateRun(seeds=[1, 1])
