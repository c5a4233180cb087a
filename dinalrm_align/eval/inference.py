"""Noise levels at inference: a single level, several levels or several draws (arXiv 2602.11146, section 5).

Tokens: the levels or draws are joined before the head's attention and give one score. Average: the mean of the scores
at each of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinalrm_align.eval.ablation import (
    ASTERISK,
    Evidence,
    Measure,
    accuracy_at,
    accuracy_of,
    arm_accuracy,
    difference,
    in_points,
    verdict,
    with_asterisk,
)
from dinalrm_align.eval.report.intervals import Interval
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels, PairScores, level_name

SINGLE_LEVEL = 0.4
"""The paper's single level, at which several noise draws are compared."""
COUNTS = (1, 2, 4, 8)
"""Numbers of draws to compare."""
ENSEMBLE_DRAWS = 4
"""Most draws of the ensemble's variance."""


def common_levels(sigmas: Sequence[float], ensemble: Sequence[float]) -> list[NoiseLevels]:
    """The noise levels of every arm: single levels, and one ensemble."""
    single = dict.fromkeys([*sigmas, SINGLE_LEVEL, *ensemble])
    return [*(NoiseLevels.at(sigma) for sigma in single), NoiseLevels.at(*ensemble)]


def ensemble_levels(ensembles: Sequence[Sequence[float]]) -> list[NoiseLevels]:
    """Each ensemble as tokens, and its single levels for the average."""
    singles = [NoiseLevels.at(sigma) for sigmas in ensembles for sigma in sigmas]
    return [*singles, *(NoiseLevels.at(*sigmas) for sigmas in ensembles)]


def draw_groups(count: int, draws: int) -> list[tuple[int, ...]]:
    """Disjoint groups of `count` draws out of `draws`: (0, 1), (2, 3), ..."""
    return [tuple(range(start, start + count)) for start in range(0, draws - count + 1, count)]


def levels_with_draws(draws: int, ensemble: Sequence[float]) -> list[NoiseLevels]:
    """Single draws, groups of them joined as tokens, and the ensemble with some draws."""
    singles = [NoiseLevels.at(SINGLE_LEVEL, draw=draw) for draw in range(draws)]
    joined = [_joined(group) for count in COUNTS if 1 < count < draws for group in draw_groups(count, draws)]
    return [*singles, *joined, *(NoiseLevels.at(*ensemble, draw=draw) for draw in range(min(ENSEMBLE_DRAWS, draws)))]


def _joined(draws: tuple[int, ...]) -> NoiseLevels:
    return NoiseLevels((SINGLE_LEVEL,) * len(draws), draws)


def inference_measures(evidence: Evidence, arm: str, name: str) -> dict[str, Measure]:
    """Label -> accuracy, for every choice of noise levels that an arm has scores for on a set."""
    scores = _first(evidence, arm, name)
    measures: dict[str, Measure] = {f"sigma {sigma:g}": accuracy_at(sigma) for sigma in evidence.sigmas}
    for levels in evidence.ensembles:
        label = level_name(levels)
        measures[f"{label}, tokens"] = accuracy_at(*levels)
        measures[f"{label}, average"] = accuracy_of(*(NoiseLevels.at(sigma).name for sigma in levels))
    for count in COUNTS[1:]:
        names = [NoiseLevels.at(SINGLE_LEVEL, draw=draw).name for draw in range(count)]
        joined = _joined(tuple(range(count))).name
        if joined in scores:
            measures[f"sigma {SINGLE_LEVEL:g}, {count} draws, tokens"] = accuracy_of(joined)
        if set(names) <= scores.keys():
            measures[f"sigma {SINGLE_LEVEL:g}, {count} draws, average"] = accuracy_of(*names)
    return measures


def _first(evidence: Evidence, arm: str, name: str) -> dict[str, np.ndarray]:
    """Scores of the first seed, by noise level; all seeds have the same levels."""
    return next(iter(evidence.runs[arm].values()))[name].scores


def inference_section(evidence: Evidence, arm: str) -> str:
    """Markdown: accuracy of one arm for every choice of noise levels, and its paired difference to the single level."""
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
    orderings = "\n".join(paper_orderings(evidence, arm))
    title = f"## Noise levels at inference\n\nRewards: {arm}, {len(evidence.runs[arm])} seeds."
    return "\n\n".join([title, table(header, rows), ASTERISK, f"{orderings}\n"])


def gain_over_single(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    """Paired difference of an accuracy to that at the single level."""
    return difference(evidence, arm, arm, name, measure, accuracy_at(SINGLE_LEVEL))


def paper_orderings(evidence: Evidence, arm: str) -> list[str]:
    """The paper's claims on inference with the verdicts here; claims on levels without scores are left out."""
    ensemble = evidence.ensembles[0]
    average = accuracy_of(*(NoiseLevels.at(sigma).name for sigma in ensemble))
    tokens, single = accuracy_at(*ensemble), accuracy_at(SINGLE_LEVEL)
    claims: list[tuple[str, Measure, Measure, float]] = [
        (f"sigma {SINGLE_LEVEL:g} above sigma 0", single, accuracy_at(0.0), 0.0),
        (f"sigma {SINGLE_LEVEL:g} above sigma 0.8", single, accuracy_at(0.8), 0.8),
        (f"token ensemble above sigma {SINGLE_LEVEL:g}", tokens, single, SINGLE_LEVEL),
        ("token ensemble above the average of the same levels", tokens, average, SINGLE_LEVEL),
    ]
    scored = _first(evidence, arm, evidence.sets[0])
    lines = []
    for claim, better, worse, level in claims:
        if NoiseLevels.at(level).name in scored:
            gaps = {name: difference(evidence, arm, arm, name, better, worse) for name in evidence.sets}
            parts = [f"on {name} it {verdict(gap)} ({in_points(gap)})" for name, gap in gaps.items()]
            lines.append(f"- Paper: {claim}. Here, {', '.join(parts)}.")
    return lines


@dataclass(frozen=True)
class NoiseShare:
    """Variance of a score over noise draws, as a share of its variance over images.

    label: noise levels and draws. forwards: of the backbone, per score. share: mean over seeds.
    """

    label: str
    forwards: int
    share: float


def noise_shares(seeds: Sequence[PairScores], draws: int, ensemble: Sequence[float]) -> list[NoiseShare]:
    """Shares for averaged and for joined draws at the single level, and for the ensemble. seeds: scores on one set."""

    def share(label: str, forwards: int, repeats: list[list[str]]) -> NoiseShare:
        shares = [_noise_share(np.stack([scores.score(*names) for names in repeats])) for scores in seeds]
        return NoiseShare(label, forwards, float(np.mean(shares)))

    shares = []
    for count in COUNTS:
        groups = draw_groups(count, draws)
        if len(groups) < 2:
            continue
        averaged = [[NoiseLevels.at(SINGLE_LEVEL, draw=draw).name for draw in group] for group in groups]
        shares.append(share(f"sigma {SINGLE_LEVEL:g}, draws averaged", count, averaged))
        joined = [[_joined(group).name] for group in groups]
        shares.append(share(f"sigma {SINGLE_LEVEL:g}, draws as tokens", count, joined))
    if draws > 1:
        levels = [[NoiseLevels.at(*ensemble, draw=draw).name] for draw in range(min(ENSEMBLE_DRAWS, draws))]
        shares.append(share(f"{level_name(ensemble)}, tokens, one draw", len(ensemble), levels))
    return shares


def _noise_share(scores: np.ndarray) -> float:
    """scores (R repeats, M images) -> unbiased variance within images over the variance between them.

    The variance of means over R repeats contains 1 / R of the variance within, which is subtracted.
    """
    within = float(scores.var(axis=0, ddof=1).mean())
    between = float(scores.mean(axis=0).var(ddof=1)) - within / len(scores)
    return within / between


def variance_section(shares: Sequence[NoiseShare]) -> str:
    """Markdown: variance over noise draws."""
    rows = [[row.label, row.forwards, f"{row.share:.4f}"] for row in shares]
    return (
        "## Variance over noise draws\n\nVariance of an image's score over noise draws, as a share of the variance "
        f"between images.\n\n{table(['noise levels', 'forwards per score', 'share'], rows)}\n"
    )
