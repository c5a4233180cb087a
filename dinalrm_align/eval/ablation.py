"""Comparisons between the arms of an ablation: accuracies and paired differences, with intervals.

Values are means over seeds and captions with intervals over both (`intervals.seeds_by_captions`), in per cent or points
of pairwise accuracy. Differences are paired: both arms share seeds, captions, pairs and noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinalrm_align.eval.ablation_config import ARMS, BASELINE, Question
from dinalrm_align.eval.report.intervals import Interval, by_caption, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels, PairScores

Runs = Mapping[str, Mapping[int, Mapping[str, PairScores]]]
"""arm -> seed -> name of the test set -> scores."""
Measure = Callable[[PairScores], np.ndarray]
"""PairScores -> (N,) correctness of each pair in [0, 1]; NaN where raters tie."""


@dataclass(frozen=True)
class Evidence:
    """Scores of finished runs, and what is reported of them.

    Args:
        runs: the scores.
        sets: names of the test sets.
        sigmas: single noise levels, ascending.
        ensembles: noise levels joined as tokens; all arms are compared at the first.
    """

    runs: Runs
    sets: Sequence[str]
    sigmas: Sequence[float]
    ensembles: Sequence[Sequence[float]]


ASTERISK = "An asterisk marks intervals that exclude 0."


def accuracy_of(*names: str) -> Measure:
    """Accuracy of the mean of the scores at these noise levels, by `NoiseLevels.name`."""
    return lambda scores: scores.correct(*names)


def accuracy_at(*sigmas: float) -> Measure:
    """Accuracy at one level, or of the token ensemble of several, with noise draw 0."""
    return accuracy_of(NoiseLevels.at(*sigmas).name)


def mean_accuracy(sigmas: Sequence[float]) -> Measure:
    """Accuracy at single levels, averaged over the levels."""
    return lambda scores: np.mean([accuracy_at(sigma)(scores) for sigma in sigmas], axis=0)


def by_seed_and_caption(seeds: Mapping[int, Mapping[str, PairScores]], name: str, measure: Measure) -> np.ndarray:
    """(S, C) accuracy on the set `name`, seeds in the given order; pairs that raters tie are left out."""
    rows = []
    for sets in seeds.values():
        correct = measure(sets[name])
        kept = ~np.isnan(correct)
        rows.append(by_caption(correct[kept], sets[name].caption[kept]))
    return np.stack(rows)


def arm_accuracy(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    """Mean accuracy of an arm on a set, in [0, 1]."""
    return seeds_by_captions(by_seed_and_caption(evidence.runs[arm], name, measure))


def difference(
    evidence: Evidence, better: str, worse: str, name: str, of_better: Measure, of_worse: Measure
) -> Interval:
    """Paired difference of the accuracies of two arms over their common seeds.

    Raises ValueError when there is no common seed, or the pairs differ.
    """
    ours, theirs = evidence.runs[better], evidence.runs[worse]
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        raise ValueError(f"{better} and {worse} share no seed: got {[*ours]} and {[*theirs]}")
    first, second = ({seed: runs[seed] for seed in shared} for runs in (ours, theirs))
    for seed in shared:
        if not first[seed][name].same_pairs(second[seed][name]):
            raise ValueError(f"{better} and {worse} were evaluated on different pairs {name!r}, seed {seed}")
    return seeds_by_captions(by_seed_and_caption(first, name, of_better) - by_seed_and_caption(second, name, of_worse))


def verdict(interval: Interval) -> str:
    """Whether a positive difference holds, reverses, or is inconclusive because the interval includes 0."""
    return "holds" if interval.low > 0 else "reverses" if interval.high < 0 else "is inconclusive"


def in_points(interval: Interval, *, signed: bool = True) -> str:
    """ "+0.6 [-0.2, +1.4]": a fraction in per cent, or a difference of fractions in points."""
    sign = "+" if signed else ""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def with_asterisk(interval: Interval) -> str:
    """A difference in points, marked where the interval excludes 0."""
    return in_points(interval) + " *" * (interval.low > 0 or interval.high < 0)


def summaries(arm: str, evidence: Evidence) -> dict[str, Measure]:
    """The three accuracies by which every arm is compared."""
    return {
        "own sigma": accuracy_at(ARMS[arm].sigma),
        "ensemble": accuracy_at(*evidence.ensembles[0]),
        "all levels": mean_accuracy([sigma for sigma in evidence.sigmas if 0 < sigma < 1]),
    }


def question_section(question: Question, evidence: Evidence) -> str:
    """Markdown: accuracies of the arms, paired differences to the baseline, and the paper's orderings.

    Arms without results are left out; "" if there are fewer than two.
    """
    runs, sets = evidence.runs, evidence.sets
    arms = [arm for arm in question.arms if arm in runs]
    if len(arms) < 2:
        return ""

    def compare(better: str, worse: str, name: str) -> dict[str, Interval]:
        of_better, of_worse = (summaries(arm, evidence) for arm in (better, worse))
        return {key: difference(evidence, better, worse, name, of_better[key], of_worse[key]) for key in of_better}

    def sentence(better: str, worse: str) -> str:
        parts = []
        for name in sets:
            words = [f"{key} {verdict(gap)} ({in_points(gap)})" for key, gap in compare(better, worse, name).items()]
            parts.append(f"on {name}: {', '.join(words)}")
        seeds = len(runs[better].keys() & runs[worse].keys())
        note = " (one seed: variance between seeds unknown)" if seeds == 1 else ""
        return f"- Paper: {better} above {worse}. Here, {'; '.join(parts)}{note}."

    accuracies = []
    for arm in arms:
        measures = [(name, measure) for name in sets for measure in summaries(arm, evidence).values()]
        cells = [in_points(arm_accuracy(evidence, arm, name, measure), signed=False) for name, measure in measures]
        accuracies.append([f"{arm}: {ARMS[arm].title}", len(runs[arm]), *cells])
    pairs = dict.fromkeys([*question.paper, *((BASELINE, arm) for arm in arms if arm != BASELINE)])
    pairs = [pair for pair in pairs if set(pair) <= runs.keys()]
    differences = [
        [f"{better} minus {worse}"]
        + [with_asterisk(gap) for name in sets for gap in compare(better, worse, name).values()]
        for better, worse in pairs
    ]
    columns = [f"{name}, {key}" for name in sets for key in summaries(BASELINE, evidence)]
    orderings = [sentence(*pair) for pair in question.paper if set(pair) <= runs.keys()]
    tables = table(["arm", "seeds", *columns], accuracies), table(["paired difference", *columns], differences)
    return "\n\n".join([f"## {question.title}", *tables, ASTERISK, "\n".join(orderings)]).rstrip() + "\n"
