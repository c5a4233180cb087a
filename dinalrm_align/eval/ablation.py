"""Compare training variants of a reward (the arms of an ablation), and noise levels at inference.

The comparisons follow arXiv 2602.11146. Accuracies are pairwise and in per cent, differences in percentage points. Each
value is a mean over seeds and captions, with an interval (`intervals.seeds_by_captions`). Differences are paired: the
two arms share seeds, captions, pairs and noise.

Scores at several noise levels or with several noise draws are combined in two ways. "tokens" means that the reward head
attends to the backbone tokens of all levels or draws and returns one score. "average" means the mean of single scores.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dinalrm_align.eval.config import ARMS, BASELINE, Question
from dinalrm_align.eval.report.intervals import Interval, bracket, by_caption, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels, PairScores, level_name

Runs = Mapping[str, Mapping[int, Mapping[str, PairScores]]]
"""Scores of finished runs: arm -> seed -> name of the test set -> scores."""
Measure = Callable[[PairScores], np.ndarray]
"""Function of the scores of N pairs that returns a value for each pair, (N,), such as its correctness: 0 or 1, and NaN
if raters tie. Pairs with NaN are left out."""
IN_FAMILY_AND_OUTSIDE = ("heldout", "outside")  # test sets by the generators of the training pairs, and by others
ABOUT_DIFFERENCES = (
    "Above, below: the 95 % interval of the paired difference excludes 0. Not separated: it contains 0. The smallest "
    "detectable effect, in tables by noise level the number in parentheses, is the true difference that such a test "
    "(two-sided, 5 %, noncentral t with the standard errors of the interval) finds with a probability of 80 %. Without "
    "a word, there is one common seed: the variance between seeds is unknown. Each interval is for one comparison: of "
    "comparisons without a true difference, one in 20 is above or below by chance."
)
EFFECT = "; smallest detectable effect {} points"
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

    def comparable(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return those `pairs` of arms that have results of a common seed, each once."""
        return [(a, b) for a, b in dict.fromkeys(pairs) if self.runs.get(a, {}).keys() & self.runs.get(b, {}).keys()]

    def levels(self, arm: str, name: str) -> set[str]:
        """Return the names of the noise levels at which `arm` has scores on the test set `name`."""
        return {*next(iter(self.runs[arm].values()))[name].scores}


def main_sets(names: Collection[str]) -> list[str]:
    """Return the test sets with tables and figures by noise level: those of IN_FAMILY_AND_OUTSIDE, or else all."""
    return [name for name in names if name in IN_FAMILY_AND_OUTSIDE] or [*names]


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


def by_seed_and_caption(seeds: Mapping[int, Mapping[str, PairScores]], name: str, measure: Measure) -> np.ndarray:
    """Return means of `measure`, (seeds, captions), on test set `name`."""
    rows = []
    for sets in seeds.values():
        correct = measure(sets[name])
        kept = ~np.isnan(correct)
        rows.append(by_caption(correct[kept], sets[name].caption[kept]))
    return np.stack(rows)


def arm_mean(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    return seeds_by_captions(by_seed_and_caption(evidence.runs[arm], name, measure))


def paired_difference(
    evidence: Evidence, better: str, worse: str, name: str, of_better: Measure, of_worse: Measure
) -> Interval:
    """Return the mean of `of_better` for arm `better` minus that of `of_worse` for `worse`, over their common seeds.

    name: test set. Raises ValueError if the arms have no common seed, or were evaluated on different pairs.
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
    return paired_difference(evidence, arm, arm, name, measure, accuracy_at(SINGLE_LEVEL))


def written(interval: Interval, scale: float = 100, digits: int = 1, *, signed: bool = True) -> str:
    """Format `scale` times a value and its interval: "+0.6 [-0.2, +1.4]". `signed`: whether to write a plus sign."""
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{scale * interval.mean:{form}} {bracket(scale * interval.low, scale * interval.high, form)}"


def verdict(gap: Interval, scale: float = 100, digits: int = 1, effect: str = " ({})") -> str:
    """Format a paired difference and what follows from it: "+0.6 [-0.2, +1.4], not separated (1.2)".

    The number in parentheses is the smallest detectable effect, in the format `effect`. If the interval excludes 0,
    "above" or "below" stands in place of this. With one seed, nothing does.
    """
    text = written(gap, scale, digits)
    if math.isnan(gap.detectable):
        return text
    if gap.low > 0 or gap.high < 0:
        return f"{text}, {'above' if gap.low > 0 else 'below'}"
    return f"{text}, not separated{effect.format(f'{scale * gap.detectable:.{digits}f}')}"


def summaries(arm: str, evidence: Evidence) -> dict[str, Measure]:
    """Return accuracy functions: "own sigma", and "ensemble", the first ensemble."""
    return {"own sigma": accuracy_at(ARMS[arm].sigma), "ensemble": accuracy_at(*evidence.ensembles[0])}


def question_section(question: Question, evidence: Evidence) -> str:
    """Return a Markdown section that compares the arms of `question`, or "" if fewer than two have results.

    The accuracies of all arms are followed by a row for each comparison and test set, with the paper's claim.
    """
    arms, keys = [arm for arm in question.arms if arm in evidence.runs], [*summaries(BASELINE, evidence)]
    if len(arms) < 2:
        return ""
    accuracies, differences = [], []
    for arm in arms:
        measures = [(name, measure) for name in evidence.sets for measure in summaries(arm, evidence).values()]
        cells = [written(arm_mean(evidence, arm, name, measure), signed=False) for name, measure in measures]
        accuracies.append([f"{arm}: {ARMS[arm].title}", len(evidence.runs[arm]), *cells])
    baseline = ((BASELINE, arm) for arm in arms if arm != BASELINE)
    for better, worse in evidence.comparable([*question.paper, *baseline, *question.others]):
        of_better, of_worse = summaries(better, evidence), summaries(worse, evidence)
        for name in evidence.sets:
            gaps = [paired_difference(evidence, better, worse, name, of_better[key], of_worse[key]) for key in keys]
            label = [f"{better} minus {worse}", "above" if (better, worse) in question.paper else "", name]
            differences.append([*label, gaps[0].seeds, *(verdict(gap, effect=EFFECT) for gap in gaps)])
    columns = [f"{name}, {key}" for name in evidence.sets for key in keys]
    tables = table(["arm", "seeds", *columns], accuracies)
    gaps = table(["paired difference", "paper", "test set", "seeds", *keys], differences)
    return f"## {question.title}\n\n{tables}\n\n{gaps}\n"


def tables_by_sigma(
    evidence: Evidence, name: str, measure: Callable[[str, float], Measure], sigmas: Sequence[float], **form: float
) -> str:
    """Return two Markdown tables with a row for each sigma and one for their mean, on test set `name`: `measure(arm,
    sigma)` for each arm, and paired differences between the baseline and the others. `form`: as in `written`.
    """
    pairs = evidence.comparable((BASELINE, arm) for arm in evidence.runs if arm != BASELINE)
    between = [sigma for sigma in sigmas if 0 < sigma < 1]
    rows = {f"{sigma:g}": [sigma] for sigma in sigmas} | ({"mean, 0 < sigma < 1": between} if between else {})

    def of(arm: str, levels: Sequence[float]) -> Measure:
        return lambda scores: np.mean([measure(arm, sigma)(scores) for sigma in levels], axis=0)

    means, gaps = [], []
    for row, levels in rows.items():
        found = [paired_difference(evidence, *pair, name, *(of(arm, levels) for arm in pair)) for pair in pairs]
        gaps.append([row, *(verdict(gap, **form) for gap in found)])
        found = [arm_mean(evidence, arm, name, of(arm, levels)) for arm in evidence.runs]
        means.append([row, *(written(one, **form, signed=False) for one in found)])
    tables = [table(["sigma", *evidence.runs], means)]
    return "\n\n".join(tables + [table(["sigma", *map(" minus ".join, pairs)], gaps)] * bool(pairs))


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
    single = f"sigma {SINGLE_LEVEL:g}"

    def cells(name: str, label: str) -> list[str]:
        if label not in by_set[name]:
            return ["", ""]
        measure = by_set[name][label]
        gain = "" if label == single else verdict(gain_over_single(evidence, arm, name, measure), effect=EFFECT)
        return [written(arm_mean(evidence, arm, name, measure), signed=False), gain]

    labels = dict.fromkeys(label for measures in by_set.values() for label in measures)
    header = ["noise levels", *(part for name in by_set for part in (name, f"{name}, minus {single}"))]
    rows = [[label, *(cell for name in by_set for cell in cells(name, label))] for label in labels]
    orderings = table(["paper", "test set", "here"], _paper_orderings(evidence, arm), "llr")
    title = f"## Noise levels at inference\n\nRewards: {arm}, {len(evidence.runs[arm])} seeds."
    return "\n\n".join([title, table(header, rows), f"{orderings}\n"])


def _paper_orderings(evidence: Evidence, arm: str) -> list[list[str]]:
    """Return rows [claim of arXiv 2602.11146, test set, `verdict`]. Claims without scores are left out."""
    ensemble, scored = evidence.ensembles[0], evidence.levels(arm, evidence.sets[0])
    tokens, single = accuracy_at(*ensemble), accuracy_at(SINGLE_LEVEL)
    claims: list[tuple[str, Measure, Measure, float]] = [
        (f"sigma {SINGLE_LEVEL:g} above sigma 0", single, accuracy_at(0.0), 0.0),
        (f"sigma {SINGLE_LEVEL:g} above sigma 0.8", single, accuracy_at(0.8), 0.8),
        (f"token ensemble above sigma {SINGLE_LEVEL:g}", tokens, single, SINGLE_LEVEL),
        ("token ensemble above the average of the same levels", tokens, average_of(ensemble), SINGLE_LEVEL),
    ]
    return [
        [claim, name, verdict(paired_difference(evidence, arm, arm, name, better, worse), effect=EFFECT)]
        for claim, better, worse, level in claims
        if NoiseLevels.at(level).name in scored
        for name in evidence.sets
    ]


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
