"""How a finished reward is best read: at which noise level, at several, with several draws (arXiv 2602.11146, sec. 5).

Tokens: the levels (or draws) are joined before the head's attention and give one score. Average: each gives a score of
its own, and those are averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dinalrm_align.eval.ablation import (
    WORDS,
    Evidence,
    Measure,
    accuracy,
    accuracy_at,
    accuracy_of_mean,
    difference,
    in_points,
    verdict,
)
from dinalrm_align.eval.report.intervals import Interval
from dinalrm_align.eval.scores import NoiseLevels, PairScores

DRAWN_AT = 0.4
"""The level at which several noise draws are compared: the paper's single level."""
COUNTS = (1, 2, 4, 8)
"""Numbers of draws that are compared, as far as there are that many."""


def common_readings(sigmas: Sequence[float], ensemble: Sequence[float]) -> list[NoiseLevels]:
    """What every arm is read at: single levels, and one ensemble."""
    return [
        *(NoiseLevels.at(sigma) for sigma in dict.fromkeys([*sigmas, DRAWN_AT, *ensemble])),
        NoiseLevels.at(*ensemble),
    ]


def ensemble_readings(ensembles: Sequence[Sequence[float]]) -> list[NoiseLevels]:
    """Each ensemble as tokens, and its levels one by one for their average."""
    singles = [NoiseLevels.at(sigma) for levels in ensembles for sigma in levels]
    return [*singles, *(NoiseLevels.at(*levels) for levels in ensembles)]


def draw_groups(count: int, draws: int) -> list[tuple[int, ...]]:
    """Disjoint groups of `count` draws out of `draws`: (0, 1), (2, 3), ..."""
    return [tuple(range(start, start + count)) for start in range(0, draws - count + 1, count)]


def draw_readings(draws: int, ensemble: Sequence[float]) -> list[NoiseLevels]:
    """Single draws, groups of them joined as tokens, and the ensemble of levels with some draws of its own."""
    singles = [NoiseLevels.at(DRAWN_AT, draw=draw) for draw in range(draws)]
    joined = [
        NoiseLevels((DRAWN_AT,) * count, group)
        for count in COUNTS
        if 1 < count < draws
        for group in draw_groups(count, draws)
    ]
    return [*singles, *joined, *(NoiseLevels.at(*ensemble, draw=draw) for draw in range(min(4, draws)))]


def ways(sigmas: Sequence[float], ensembles: Sequence[Sequence[float]], judged: PairScores) -> dict[str, Measure]:
    """Label -> accuracy measure of every way of reading that was taken of this set."""
    found: dict[str, Measure] = {f"sigma {sigma:g}": accuracy_at(sigma) for sigma in sigmas}
    for levels in ensembles:
        label = "+".join(f"{sigma:g}" for sigma in levels)
        found[f"{label}, tokens"] = accuracy_at(*levels)
        found[f"{label}, average"] = accuracy_of_mean(*(NoiseLevels.at(sigma).name for sigma in levels))
    for count in COUNTS[1:]:
        group = tuple(range(count))
        names = [NoiseLevels.at(DRAWN_AT, draw=draw).name for draw in group]
        joined = NoiseLevels((DRAWN_AT,) * count, group).name
        if joined in judged.scores:
            found[f"sigma {DRAWN_AT:g}, {count} draws, tokens"] = accuracy_of_mean(joined)
        if set(names) <= judged.scores.keys():
            found[f"sigma {DRAWN_AT:g}, {count} draws, average"] = accuracy_of_mean(*names)
    return found


def inference_section(
    evidence: Evidence, arm: str, sets: Sequence[str], sigmas: Sequence[float], ensembles: Sequence[Sequence[float]]
) -> str:
    """Markdown: accuracy of every way of reading one arm's rewards, and its paired difference to the single level."""
    seeds = evidence[arm]
    by_set = {name: ways(sigmas, ensembles, next(iter(seeds.values()))[name]) for name in sets}
    labels = list(dict.fromkeys(label for found in by_set.values() for label in found))
    head = [part for name in sets for part in (name, f"{name}, less sigma {DRAWN_AT:g}")]
    lines = ["## Reading a finished reward", "", f"Rewards: {arm}, {len(seeds)} seeds.", ""]
    lines += [f"| read at | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    for label in labels:
        cells = []
        for name in sets:
            measure = by_set[name].get(label)
            if measure is None:
                cells += ["", ""]
                continue
            gain = gain_over_single(evidence, arm, name, measure)
            mark = "" if verdict(gain) == "open" else " *"
            cells += [in_points(accuracy(evidence, arm, name, measure), signed=False), in_points(gain) + mark]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += ["", "An asterisk: the interval leaves out 0.", "", *orderings(evidence, arm, sets, ensembles[0])]
    return "\n".join(lines) + "\n"


def gain_over_single(evidence: Evidence, arm: str, name: str, measure: Measure) -> Interval:
    """Paired difference of a way of reading to the single level."""
    return difference(evidence, arm, arm, name, measure, accuracy_at(DRAWN_AT))


def orderings(evidence: Evidence, arm: str, sets: Sequence[str], ensemble: Sequence[float]) -> list[str]:
    """The paper's claims on reading, each with what becomes of it here; without those whose levels were not taken."""
    average = accuracy_of_mean(*(NoiseLevels.at(sigma).name for sigma in ensemble))
    tokens, single = accuracy_at(*ensemble), accuracy_at(DRAWN_AT)
    claims: list[tuple[str, Measure, Measure, float]] = [
        (f"sigma {DRAWN_AT:g} above sigma 0", single, accuracy_at(0.0), 0.0),
        (f"sigma {DRAWN_AT:g} above sigma 0.8", single, accuracy_at(0.8), 0.8),
        (f"token ensemble above sigma {DRAWN_AT:g}", tokens, single, DRAWN_AT),
        ("token ensemble above the average of the same levels", tokens, average, DRAWN_AT),
    ]
    taken = next(iter(evidence[arm].values()))[sets[0]].scores
    claims = [claim for claim in claims if NoiseLevels.at(claim[-1]).name in taken]
    lines = []
    for claim, better, worse, _ in claims:
        found = {name: difference(evidence, arm, arm, name, better, worse) for name in sets}
        parts = [f"on {name} it {WORDS[verdict(gap)]} ({in_points(gap)})" for name, gap in found.items()]
        lines.append(f"- Paper: {claim}. Here, {', '.join(parts)}.")
    return lines


@dataclass(frozen=True)
class NoiseShare:
    """Variance of a score over noise draws as a share of its variance over pictures, for one way and number of draws.

    forwards: of the backbone, per score. share: mean over seeds.
    """

    way: str
    forwards: int
    share: float


def noise_shares(seeds: Sequence[PairScores], draws: int, ensemble: Sequence[float]) -> list[NoiseShare]:
    """Shares for averaged and for joined draws at one level, and for the ensemble of levels; seeds: one set's files."""
    found = []
    for count in COUNTS:
        groups = draw_groups(count, draws)
        if len(groups) < 2:
            continue
        averaged = [[NoiseLevels.at(DRAWN_AT, draw=draw).name for draw in group] for group in groups]
        found.append(NoiseShare(f"sigma {DRAWN_AT:g}, draws averaged", count, _mean_share(seeds, averaged)))
        joined = [[NoiseLevels((DRAWN_AT,) * count, group).name] for group in groups]
        found.append(NoiseShare(f"sigma {DRAWN_AT:g}, draws as tokens", count, _mean_share(seeds, joined)))
    if draws > 1:
        levels = [[NoiseLevels.at(*ensemble, draw=draw).name] for draw in range(min(4, draws))]
        label = "+".join(f"{sigma:g}" for sigma in ensemble)
        found.append(NoiseShare(f"{label}, tokens, one draw", len(ensemble), _mean_share(seeds, levels)))
    return found


def _mean_share(seeds: Sequence[PairScores], repeats: list[list[str]]) -> float:
    return float(np.mean([_share(np.stack([judged.score(*names) for names in repeats])) for judged in seeds]))


def _share(scores: np.ndarray) -> float:
    """scores (R repeats, M pictures) -> unbiased variance within pictures over the variance between them.

    The variance of the means over R repeats holds 1 / R of that within, which is taken out.
    """
    within = float(scores.var(axis=0, ddof=1).mean())
    between = float(scores.mean(axis=0).var(ddof=1)) - within / len(scores)
    return within / between


def variance_section(shares: Sequence[NoiseShare]) -> str:
    """Markdown: how far a score moves with its noise."""
    lines = [
        "## Variance over noise draws",
        "",
        "Variance of a picture's score over noise draws, as a share of the variance between pictures.",
        "",
        "| way | forwards a score | share |",
        "|---|---:|---:|",
        *(f"| {row.way} | {row.forwards} | {row.share:.4f} |" for row in shares),
    ]
    return "\n".join(lines) + "\n"
