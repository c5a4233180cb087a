"""Ablations: paired differences, verdicts, noise levels at inference, variance over noise draws."""

import numpy as np
import pytest

from dinalrm_align.eval.ablation import (
    Evidence,
    accuracy_at,
    accuracy_difference,
    arm_accuracy,
    draw_groups,
    in_points,
    inference_section,
    levels_with_draws,
    mean_accuracy,
    noise_shares,
    question_section,
    variance_section,
    verdict,
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
    interval = arm_accuracy(found, "calibrated", "set", accuracy_at(0.4))
    assert interval.mean == pytest.approx(expected) and (interval.seeds, interval.captions) == (3, PAIRS)
    assert interval.low < interval.mean < interval.high


def test_accuracy_over_levels_is_the_mean_of_the_levels():
    """Two pairs: right at 0.2 are both, at 0.4 the first: (1 + 0.5) / 2."""
    scores = {"0.2": np.array([1.0, 0, 1, 0]), "0.4": np.array([1.0, 0, 0, 1])}
    pairs = PairScores(scores, np.array([0, 2]), np.array([1, 3]), np.ones(2, np.float32), np.arange(2))
    assert mean_accuracy([0.2, 0.4])(pairs).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(("better", "worse", "expected"), [(0.9, 0.6, "holds"), (0.6, 0.9, "reverses")])
def test_a_large_difference_has_a_verdict(better, worse, expected):
    found = evidence(calibrated=better, fixed=worse)
    gap = accuracy_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    assert gap.mean == pytest.approx(better - worse, abs=0.05) and verdict(gap) == expected


def test_no_difference_has_none():
    found = evidence(calibrated=0.8, fixed=0.8)
    gap = accuracy_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    assert verdict(gap) == "is inconclusive" and gap.low < 0 < gap.high


def test_differences_are_paired_over_shared_seeds_and_equal_pairs():
    found = evidence(calibrated=0.8, fixed=0.7)
    del found.runs["fixed"][2]
    assert accuracy_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4)).seeds == 2
    other = found.runs["fixed"][0]["set"]
    found.runs["fixed"][0]["set"] = PairScores(other.scores, other.rejected, other.chosen, other.label, other.caption)
    with pytest.raises(ValueError, match="different pairs 'set', seed 0"):
        accuracy_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))
    found.runs["fixed"] = {7: found.runs["fixed"][1]}
    with pytest.raises(ValueError, match="share no seed"):
        accuracy_difference(found, "calibrated", "fixed", "set", accuracy_at(0.4), accuracy_at(0.4))


def test_raters_that_tie_are_left_out():
    found = evidence(calibrated=0.8)
    for sets in found.runs["calibrated"].values():
        sets["set"].label[:100] = 0.5
    assert arm_accuracy(found, "calibrated", "set", accuracy_at(0.4)).captions == PAIRS - 100


def test_points():
    assert in_points(Interval(0.006, -0.002, 0.014, 0.004, 3, 9)) == "+0.6 [-0.2, +1.4]"
    assert in_points(Interval(0.894, 0.88, 0.91, 0.01, 3, 9), signed=False) == "89.4 [88.0, 91.0]"


def test_a_section_says_what_becomes_of_the_papers_ordering():
    text = question_section(QUESTIONS["likelihood"], evidence(calibrated=0.9, fixed=0.6))
    assert "Paper: calibrated above fixed. Here, on set: own sigma holds (+" in text
    assert "| fixed: fixed variance |" in text
    text = question_section(QUESTIONS["likelihood"], evidence(calibrated=0.6, fixed=0.9))
    assert "own sigma reverses (-" in text
    text = question_section(QUESTIONS["likelihood"], evidence(calibrated=0.8, fixed=0.8))
    assert "own sigma is inconclusive" in text
    assert question_section(QUESTIONS["likelihood"], evidence(calibrated=0.8)) == ""


def test_one_seed_is_marked():
    found = evidence_of({arm: {0: runs[0]} for arm, runs in evidence(calibrated=0.9, fixed=0.6).runs.items()})
    assert "one seed: variance between seeds unknown" in question_section(QUESTIONS["likelihood"], found)


def test_the_table_lists_every_scored_choice_of_noise_levels():
    levels = [NoiseLevels.at(sigma) for sigma in SIGMAS] + [NoiseLevels.at(*ENSEMBLE)] + levels_with_draws(4, ENSEMBLE)
    names = [level.name for level in dict.fromkeys(levels)]
    found = evidence_of({BASELINE: {seed: {"set": scores_of(0.8, seed, names=names)} for seed in range(2)}})
    text = inference_section(found, BASELINE)
    for label in ("sigma 0.8", "0.2+0.4, tokens", "0.2+0.4, average", "sigma 0.4, 2 draws, average",
                  "sigma 0.4, 2 draws, tokens", "sigma 0.4, 4 draws, average"):  # fmt: skip
        assert f"| {label} |" in text
    assert "8 draws" not in text and "Paper: token ensemble above sigma 0.4." in text


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
