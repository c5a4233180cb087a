"""What the arms of an ablation show: accuracies and paired differences with intervals, and words for each ordering.

Every number is a mean over seeds and captions, its interval over both (`intervals.seeds_by_captions`), in per cent or
points of pairwise accuracy. Differences are paired: the same seeds, captions, pairs and noise.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dinalrm_align.eval.ablation_config import ARMS, BASELINE, Question
from dinalrm_align.eval.report.intervals import Interval, by_caption, seeds_by_captions
from dinalrm_align.eval.scores import NoiseLevels, PairScores

Evidence = Mapping[str, Mapping[int, Mapping[str, PairScores]]]
"""arm -> seed -> name of the judged set -> scores."""
Measure = Callable[[PairScores], np.ndarray]
"""PairScores -> (N,) in [0, 1], how right each pair is; NaN: raters tie."""

WORDS = {"holds": "holds", "reverses": "reverses", "open": "is not separated"}
ONE_SEED = "one seed"


def accuracy_at(*sigmas: float) -> Measure:
    """Accuracy at one level, or of the token ensemble of several, with noise draw 0."""
    name = NoiseLevels.at(*sigmas).name
    return lambda judged: judged.correct(name)


def accuracy_over(sigmas: Sequence[float]) -> Measure:
    """Accuracy at a single level, averaged over these levels."""
    names = [NoiseLevels.at(sigma).name for sigma in sigmas]
    return lambda judged: np.mean([judged.correct(name) for name in names], axis=0)


def accuracy_of_mean(*names: str) -> Measure:
    """Accuracy of the mean of the scores of these readings."""
    return lambda judged: judged.correct(*names)


def table(seeds: Mapping[int, Mapping[str, PairScores]], name: str, measure: Measure) -> np.ndarray:
    """(S, C): seeds in the order given, captions of the set `name`; a pair on which raters tie is left out."""
    rows = []
    for sets in seeds.values():
        right = measure(sets[name])
        kept = ~np.isnan(right)
        rows.append(by_caption(right[kept], sets[name].caption[kept]))
    return np.stack(rows)


def accuracy(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    """Mean accuracy of an arm on a set, in [0, 1]."""
    return seeds_by_captions(table(evidence[arm], name, measure))


def difference(
    evidence: Evidence, better: str, worse: str, name: str, of_better: Measure, of_worse: Measure
) -> Interval:
    """Accuracy of one arm less that of another over the seeds they share, paired; ValueError where pairs differ."""
    shared = [seed for seed in evidence[better] if seed in evidence[worse]]
    if not shared:
        raise ValueError(f"{better} and {worse} share no seed: got {[*evidence[better]]} and {[*evidence[worse]]}")
    first, second = ({seed: evidence[arm][seed] for seed in shared} for arm in (better, worse))
    for seed in shared:
        if not first[seed][name].same_pairs(second[seed][name]):
            raise ValueError(f"{better} and {worse} were judged on different pairs {name!r}, seed {seed}")
    return seeds_by_captions(table(first, name, of_better) - table(second, name, of_worse))


def verdict(interval: Interval) -> str:
    """holds, reverses, or open: where the whole interval of (better less worse) lies, or that it holds 0."""
    return "holds" if interval.low > 0 else "reverses" if interval.high < 0 else "open"


def in_points(interval: Interval, *, signed: bool = True) -> str:
    """ "+0.6 [-0.2, +1.4]": a fraction as per cent, or a difference of fractions as points."""
    sign = "+" if signed else ""
    mean, low, high = (f"{100 * value:{sign}.1f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} [{low}, {high}]"


def measures_of(arm: str, sigmas: Sequence[float], ensemble: Sequence[float]) -> dict[str, Measure]:
    """The three summaries every arm is compared by."""
    return {
        "own sigma": accuracy_at(ARMS[arm].sigma),
        "ensemble": accuracy_at(*ensemble),
        "all levels": accuracy_over([sigma for sigma in sigmas if 0 < sigma < 1]),
    }


def question_section(
    question: Question, evidence: Evidence, sets: Sequence[str], sigmas: Sequence[float], ensemble: Sequence[float]
) -> str:
    """Markdown: accuracies of the arms, paired differences to the baseline, and what becomes of the paper's orderings.

    Arms that were not run are left out; "" when nothing is there to compare.
    """
    arms = [arm for arm in question.arms if arm in evidence]
    if len(arms) < 2:
        return ""
    summaries = list(measures_of(BASELINE, sigmas, ensemble))
    head = [f"{name}, {summary}" for name in sets for summary in summaries]
    lines = [f"## {question.title}", "", f"| arm | seeds | {' | '.join(head)} |", f"|---|---:|{'---:|' * len(head)}"]
    for arm in arms:
        cells = [
            in_points(accuracy(evidence, arm, name, measure), signed=False)
            for name in sets
            for measure in measures_of(arm, sigmas, ensemble).values()
        ]
        lines.append(f"| {arm}: {ARMS[arm].title} | {len(evidence[arm])} | {' | '.join(cells)} |")
    lines += ["", f"| paired difference | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    pairs = list(dict.fromkeys([*question.paper, *((BASELINE, arm) for arm in arms if arm != BASELINE)]))
    pairs = [pair for pair in pairs if set(pair) <= evidence.keys()]
    for better, worse in pairs:
        cells = [
            in_points(interval) + ("" if verdict(interval) == "open" else " *")
            for name in sets
            for interval in compared(evidence, better, worse, name, sigmas, ensemble).values()
        ]
        lines.append(f"| {better} less {worse} | {' | '.join(cells)} |")
    lines += ["", "An asterisk: the interval leaves out 0.", ""]
    lines += [
        f"- {sentence(evidence, better, worse, sets, sigmas, ensemble)}"
        for better, worse in question.paper
        if {better, worse} <= evidence.keys()
    ]
    return "\n".join(lines) + "\n"


def compared(
    evidence: Evidence, better: str, worse: str, name: str, sigmas: Sequence[float], ensemble: Sequence[float]
) -> dict[str, Interval]:
    """The paired difference of two arms on one set by each of the three summaries."""
    of_better, of_worse = (measures_of(arm, sigmas, ensemble) for arm in (better, worse))
    return {key: difference(evidence, better, worse, name, of_better[key], of_worse[key]) for key in of_better}


def sentence(
    evidence: Evidence, better: str, worse: str, sets: Sequence[str], sigmas: Sequence[float], ensemble: Sequence[float]
) -> str:
    """What becomes of one of the paper's orderings here, set by set, in words."""
    parts = []
    for name in sets:
        found = compared(evidence, better, worse, name, sigmas, ensemble)
        words = [f"{key} {WORDS[verdict(interval)]} ({in_points(interval)})" for key, interval in found.items()]
        parts.append(f"on {name}: {', '.join(words)}")
    seeds = len(evidence[better].keys() & evidence[worse].keys())
    note = f" ({ONE_SEED}: variance between seeds unknown)" if seeds == 1 else ""
    return f"Paper: {better} above {worse}. Here, {'; '.join(parts)}{note}."
