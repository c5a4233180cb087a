"""Compare training variants of a reward (the arms of an ablation), and noise levels at inference.

The comparisons follow arXiv 2602.11146. Accuracies are pairwise and in per cent; differences are in percentage points.
Each value is a mean over seeds and captions, with an interval (`intervals.seeds_by_captions`). Differences are paired:
the two arms share seeds, captions, pairs and noise.

Scores at several noise levels or with several noise draws are combined in two ways. "tokens" means that the reward head
attends to the backbone tokens of all levels or draws and returns one score. "average" means the mean of single scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dinalrm_align.eval.config import ARMS, BASELINE, Question
from dinalrm_align.eval.report.intervals import Interval, bracket, by_caption, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels, PairScores, level_name

Runs = Mapping[str, Mapping[int, Mapping[str, PairScores]]]
"""Scores of finished runs: arm -> seed -> name of the test set -> scores."""
Measure = Callable[[PairScores], np.ndarray]
"""Function of the scores of N pairs that returns the correctness of each pair, (N,) in [0, 1]; NaN for rater ties."""
ASTERISK = "An asterisk marks intervals that exclude 0."
SINGLE_LEVEL = 0.4  # the paper's noise level; several noise draws are compared at it
COUNTS = (1, 2, 4, 8)  # numbers of draws to compare
ENSEMBLE_DRAWS = 4  # largest number of draws for the variance of the ensemble's score


@dataclass(frozen=True)
class Evidence:
    """Scores of all training variants (arms) on the test sets `sets`. Comparisons of arms use only `ensembles[0]`."""

    runs: Runs
    sets: Sequence[str]
    sigmas: Sequence[float]
    ensembles: Sequence[Sequence[float]]

    def levels(self, arm: str, name: str) -> set[str]:
        """Return the names of the noise levels at which `arm` has scores on the test set `name`."""
        return {*next(iter(self.runs[arm].values()))[name].scores}


def levels_to_evaluate(sigmas: Sequence[float], ensembles: Sequence[Sequence[float]]) -> list[NoiseLevels]:
    """Return all ensembles, and as single levels 0.4, `sigmas`, and the sigmas of the ensembles."""
    single = dict.fromkeys([*sigmas, SINGLE_LEVEL, *(sigma for levels in ensembles for sigma in levels)])
    return [*map(NoiseLevels.at, single), *(NoiseLevels.at(*levels) for levels in ensembles)]


def levels_with_draws(draws: int, ensemble: Sequence[float]) -> list[NoiseLevels]:
    """Return noise levels: sigma 0.4 with each draw and with groups of draws; `ensemble` with each of a few draws."""
    singles = [NoiseLevels.at(SINGLE_LEVEL, draw=draw) for draw in range(draws)]
    joined = [_joined(group) for count in COUNTS if 1 < count < draws for group in draw_groups(count, draws)]
    return [*singles, *joined, *(NoiseLevels.at(*ensemble, draw=draw) for draw in range(min(ENSEMBLE_DRAWS, draws)))]


def draw_groups(count: int, draws: int) -> list[tuple[int, ...]]:
    """Split the noise draws 0, 1, ..., `draws` - 1 into groups of `count`. A smaller last group is dropped."""
    return [tuple(range(start, start + count)) for start in range(0, draws - count + 1, count)]


def _joined(draws: tuple[int, ...]) -> NoiseLevels:
    return NoiseLevels((SINGLE_LEVEL,) * len(draws), draws)


def accuracy_of(*names: str) -> Measure:
    """Return a function that computes correctness (N,) from `PairScores`, by the mean score over the levels `names`."""
    return lambda scores: scores.correct(*names)


def accuracy_at(*sigmas: float) -> Measure:
    """Return a function that computes correctness (N,) from `PairScores`, by the joint score of all `sigmas`."""
    return accuracy_of(NoiseLevels.at(*sigmas).name)


def average_of(sigmas: Sequence[float]) -> Measure:
    return accuracy_of(*(NoiseLevels.at(sigma).name for sigma in sigmas))


def mean_accuracy(sigmas: Sequence[float]) -> Measure:
    """Return a function that maps `PairScores` to (N,): the share of `sigmas` at which a pair is ordered correctly."""
    return lambda scores: np.mean([accuracy_at(sigma)(scores) for sigma in sigmas], axis=0)


def by_seed_and_caption(seeds: Mapping[int, Mapping[str, PairScores]], name: str, measure: Measure) -> np.ndarray:
    """Return accuracies, (seeds, captions), on test set `name`. `measure` maps `PairScores` to correctness (N,)."""
    rows = []
    for sets in seeds.values():
        correct = measure(sets[name])
        kept = ~np.isnan(correct)
        rows.append(by_caption(correct[kept], sets[name].caption[kept]))
    return np.stack(rows)


def arm_accuracy(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    return seeds_by_captions(by_seed_and_caption(evidence.runs[arm], name, measure))


def accuracy_difference(
    evidence: Evidence, better: str, worse: str, name: str, of_better: Measure, of_worse: Measure
) -> Interval:
    """Return the accuracy of training variant `better` minus the accuracy of `worse`, over the seeds that both have.

    name: test set. of_better, of_worse: functions from `PairScores` to correctness. Raises ValueError if the variants
    have no common seed, or were evaluated on different pairs.
    """
    ours, theirs = evidence.runs[better], evidence.runs[worse]
    shared = [seed for seed in ours if seed in theirs]
    if not shared:
        raise ValueError(f"{better} and {worse} share no seed: got {[*ours]} and {[*theirs]}")
    for seed in shared:
        if not ours[seed][name].same_pairs(theirs[seed][name]):
            raise ValueError(f"{better} and {worse} were evaluated on different pairs {name!r}, seed {seed}")
    ours, theirs = ({seed: runs[seed] for seed in shared} for runs in (ours, theirs))
    return seeds_by_captions(by_seed_and_caption(ours, name, of_better) - by_seed_and_caption(theirs, name, of_worse))


def gain_over_single(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    """Return the accuracy that `measure` computes minus the accuracy at sigma 0.4, for `arm` on test set `name`."""
    return accuracy_difference(evidence, arm, arm, name, measure, accuracy_at(SINGLE_LEVEL))


def verdict(interval: Interval) -> str:
    """Return "holds" if the interval lies above 0, "reverses" if it lies below 0, and "is inconclusive" otherwise."""
    return "holds" if interval.low > 0 else "reverses" if interval.high < 0 else "is inconclusive"


def in_points(interval: Interval, *, signed: bool = True) -> str:
    """Format a value and its interval in per cent: "+0.6 [-0.2, +1.4]". `signed`: whether to write a plus sign."""
    sign = "+" if signed else ""
    form = f"{sign}.1f"
    return f"{100 * interval.mean:{form}} {bracket(100 * interval.low, 100 * interval.high, form)}"


def with_asterisk(interval: Interval) -> str:
    return in_points(interval) + " *" * (interval.low > 0 or interval.high < 0)


def summaries(arm: str, evidence: Evidence) -> dict[str, Measure]:
    """Return accuracy functions: "own sigma", "ensemble" (first ensemble), "all levels" (mean over 0 < sigma < 1)."""
    return {
        "own sigma": accuracy_at(ARMS[arm].sigma),
        "ensemble": accuracy_at(*evidence.ensembles[0]),
        "all levels": mean_accuracy([sigma for sigma in evidence.sigmas if 0 < sigma < 1]),
    }


def question_section(question: Question, evidence: Evidence) -> str:
    """Return a Markdown section that compares the variants of `question`, or "" if fewer than two have results."""
    runs, sets = evidence.runs, evidence.sets
    arms = [arm for arm in question.arms if arm in runs]
    if len(arms) < 2:
        return ""

    def compare(better: str, worse: str, name: str) -> dict[str, Interval]:
        of_better, of_worse = (summaries(arm, evidence) for arm in (better, worse))
        gap = partial(accuracy_difference, evidence, better, worse, name)
        return {key: gap(of_better[key], of_worse[key]) for key in of_better}

    def sentence(better: str, worse: str) -> str:
        parts = []
        # "all levels" would read a reward that was trained at one level at levels that it has never seen
        left_out = {"all levels"} if ARMS[better].has_one_level or ARMS[worse].has_one_level else set()
        for name in sets:
            gaps = {key: gap for key, gap in compare(better, worse, name).items() if key not in left_out}
            words = [f"{key} {verdict(gap)} ({in_points(gap)})" for key, gap in gaps.items()]
            parts.append(f"on {name}: {', '.join(words)}")
        one_seed = len(runs[better].keys() & runs[worse].keys()) == 1
        note = " (one seed: variance between seeds unknown)" * one_seed
        return f"- Paper: {better} above {worse}. Here, {'; '.join(parts)}{note}."

    accuracies = []
    for arm in arms:
        measures = [(name, measure) for name in sets for measure in summaries(arm, evidence).values()]
        cells = [in_points(arm_accuracy(evidence, arm, name, measure), signed=False) for name, measure in measures]
        accuracies.append([f"{arm}: {ARMS[arm].title}", len(runs[arm]), *cells])
    differences = []
    for better, worse in dict.fromkeys([*question.paper, *((BASELINE, arm) for arm in arms if arm != BASELINE)]):
        if {better, worse} <= runs.keys():
            gaps = [gap for name in sets for gap in compare(better, worse, name).values()]
            differences.append([f"{better} minus {worse}", *map(with_asterisk, gaps)])
    columns = [f"{name}, {key}" for name in sets for key in summaries(BASELINE, evidence)]
    orderings = [sentence(*pair) for pair in question.paper if set(pair) <= runs.keys()]
    tables = table(["arm", "seeds", *columns], accuracies), table(["paired difference", *columns], differences)
    return "\n\n".join([f"## {question.title}", *tables, ASTERISK, "\n".join(orderings)]).rstrip() + "\n"


def inference_measures(evidence: Evidence, arm: str, name: str) -> dict[str, Measure]:
    """Return a dict: title, such as "sigma 0.4" -> function that computes the accuracy at these noise levels."""
    scored = evidence.levels(arm, name)
    measures: dict[str, Measure] = {f"sigma {sigma:g}": accuracy_at(sigma) for sigma in evidence.sigmas}
    for levels in evidence.ensembles:
        measures[f"{level_name(levels)}, tokens"] = accuracy_at(*levels)
        measures[f"{level_name(levels)}, average"] = average_of(levels)
    for count in COUNTS[1:]:
        names = [NoiseLevels.at(SINGLE_LEVEL, draw=draw).name for draw in range(count)]
        joined = _joined(tuple(range(count))).name
        if joined in scored:
            measures[f"sigma {SINGLE_LEVEL:g}, {count} draws, tokens"] = accuracy_of(joined)
        if scored.issuperset(names):
            measures[f"sigma {SINGLE_LEVEL:g}, {count} draws, average"] = accuracy_of(*names)
    return measures


def inference_section(evidence: Evidence, arm: str) -> str:
    """Return a Markdown section with the accuracy of `arm` at each choice of noise levels, and gains over sigma 0.4."""
    by_set = {name: inference_measures(evidence, arm, name) for name in evidence.sets}

    def cells(name: str, label: str) -> list[str]:
        if label not in by_set[name]:
            return ["", ""]
        measure = by_set[name][label]
        value = in_points(arm_accuracy(evidence, arm, name, measure), signed=False)
        return [value, with_asterisk(gain_over_single(evidence, arm, name, measure))]

    labels = dict.fromkeys(label for measures in by_set.values() for label in measures)
    header = ["noise levels", *(part for name in by_set for part in (name, f"{name}, minus sigma {SINGLE_LEVEL:g}"))]
    rows = [[label, *(cell for name in by_set for cell in cells(name, label))] for label in labels]
    orderings = "\n".join(_paper_orderings(evidence, arm))
    title = f"## Noise levels at inference\n\nRewards: {arm}, {len(evidence.runs[arm])} seeds."
    return "\n\n".join([title, table(header, rows), ASTERISK, f"{orderings}\n"])


def _paper_orderings(evidence: Evidence, arm: str) -> list[str]:
    """Return a line with a `verdict` for each claim of arXiv 2602.11146. Claims without scores are left out."""
    ensemble, scored = evidence.ensembles[0], evidence.levels(arm, evidence.sets[0])
    tokens, single = accuracy_at(*ensemble), accuracy_at(SINGLE_LEVEL)
    claims: list[tuple[str, Measure, Measure, float]] = [
        (f"sigma {SINGLE_LEVEL:g} above sigma 0", single, accuracy_at(0.0), 0.0),
        (f"sigma {SINGLE_LEVEL:g} above sigma 0.8", single, accuracy_at(0.8), 0.8),
        (f"token ensemble above sigma {SINGLE_LEVEL:g}", tokens, single, SINGLE_LEVEL),
        ("token ensemble above the average of the same levels", tokens, average_of(ensemble), SINGLE_LEVEL),
    ]
    lines = []
    for claim, better, worse, level in claims:
        if NoiseLevels.at(level).name in scored:
            gaps = {name: accuracy_difference(evidence, arm, arm, name, better, worse) for name in evidence.sets}
            parts = [f"on {name} it {verdict(gap)} ({in_points(gap)})" for name, gap in gaps.items()]
            lines.append(f"- Paper: {claim}. Here, {', '.join(parts)}.")
    return lines


@dataclass(frozen=True)
class NoiseShare:
    """`share`: variance over noise draws divided by variance over images. `forwards`: backbone passes per score."""

    label: str
    forwards: int
    share: float


def noise_shares(seeds: Sequence[PairScores], draws: int, ensemble: Sequence[float]) -> list[NoiseShare]:
    """Return the score variance over noise draws / over images, for draws at sigma 0.4 and for `ensemble`.

    seeds: scores on one test set, for each training seed. Each share is averaged over the training seeds.
    """

    def share(label: str, forwards: int, repeats: list[list[str]]) -> NoiseShare:
        shares = [_noise_share(np.stack([scores.score(*names) for names in repeats])) for scores in seeds]
        return NoiseShare(label, forwards, float(np.mean(shares)))

    shares = []
    for count in COUNTS:
        groups = draw_groups(count, draws)
        if len(groups) > 1:
            averaged = [[NoiseLevels.at(SINGLE_LEVEL, draw=draw).name for draw in group] for group in groups]
            shares.append(share(f"sigma {SINGLE_LEVEL:g}, draws averaged", count, averaged))
            joined = [[_joined(group).name] for group in groups]
            shares.append(share(f"sigma {SINGLE_LEVEL:g}, draws as tokens", count, joined))
    if draws > 1:
        levels = [[NoiseLevels.at(*ensemble, draw=draw).name] for draw in range(min(ENSEMBLE_DRAWS, draws))]
        shares.append(share(f"{level_name(ensemble)}, tokens, one draw", len(ensemble), levels))
    return shares


def _noise_share(scores: np.ndarray) -> float:
    """Return the ratio of variance over draws to variance over images. `scores`: (R draws, M images)."""
    within = float(scores.var(axis=0, ddof=1).mean())
    between = float(scores.mean(axis=0).var(ddof=1)) - within / len(scores)  # the means vary by within / R
    return within / between


def variance_section(shares: Sequence[NoiseShare]) -> str:
    rows = [[row.label, row.forwards, f"{row.share:.4f}"] for row in shares]
    return (
        "## Variance over noise draws\n\nVariance of an image's score over noise draws, as a share of the variance "
        f"between images.\n\n{table(['noise levels', 'forwards per score', 'share'], rows)}\n"
    )
