"""Accuracy under a named protocol, with a bootstrap interval over prompts.

`config.test_sets.PROTOCOLS` says in words what each name means. Every protocol but tau is a ratio of sums over pairs,
sum w u r / sum w u: r in [0, 1] is how right a pair is, u how much it counts, w how often its prompt was drawn.
"""

from dataclasses import dataclass

import numpy as np

from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets_config import PROTOCOLS

DRAWS = 1000
"""Resamples of prompts behind an interval."""
LEVEL = 0.95
CHUNK = 50
"""Resamples that are worked out at once."""


@dataclass(frozen=True)
class Accuracy:
    """A protocol's number in [0, 1], its 95 % percentile interval over prompts, and the pairs and prompts it rests on.

    NaN everywhere where no pair counts.
    """

    value: float
    low: float
    high: float
    pairs: int
    prompts: int

    def __str__(self) -> str:
        """In per cent: "72.4 [70.1, 74.6]"."""
        if not self.pairs:
            return "no pairs"
        return f"{100 * self.value:.2f} [{100 * self.low:.2f}, {100 * self.high:.2f}]"


def accuracy(judged: PairScores, protocol: str, *names: str, draws: int = DRAWS, seed: int = 0) -> Accuracy:
    """Accuracy of the mean of the readings `names` under a protocol of PROTOCOLS.

    The interval is over prompts: as many as there are, drawn with replacement `draws` times, from (seed) alone.
    ValueError for an unknown protocol or reading.
    """
    gap, label = judged.gap(*names), judged.label.astype(np.float64)
    _, caption = np.unique(judged.caption, return_inverse=True)
    if protocol == "tau":
        counted = np.ones(len(gap), dtype=bool)
        value, resampled = _tau(gap, label, np.ones((1, len(gap))))[0], _Tau(gap, label, caption)
    else:
        right, weight = _right_and_weight(judged, protocol, gap, label)
        counted = weight > 0
        if not counted.any():
            return Accuracy(np.nan, np.nan, np.nan, 0, 0)
        value, resampled = float(np.sum(weight * right) / np.sum(weight)), _Ratio(right, weight, caption)
    number = int(caption.max()) + 1
    rng = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, CHUNK):
        counts = rng.multinomial(number, np.full(number, 1 / number), size=min(CHUNK, draws - start))
        found.append(resampled(counts))
    low, high = np.nanquantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Accuracy(float(value), float(low), float(high), int(counted.sum()), len(np.unique(caption[counted])))


def _right_and_weight(
    judged: PairScores, protocol: str, gap: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) how right each pair is, and (N,) how much it counts."""
    preferred = np.sign(label - 0.5)
    untied, agrees = preferred != 0, gap * preferred > 0
    if protocol in ("pooled", "strict", "diff"):
        return agrees.astype(float), untied.astype(float)
    if protocol == "half-ties":
        return agrees + 0.5 * (gap == 0), untied.astype(float)
    if protocol == "three-way":
        return (np.sign(gap) == preferred).astype(float), np.ones(len(gap))
    if protocol == "grouped":
        return agrees.astype(float), _shares(judged, untied)
    if protocol in ("hpsv2", "mps"):
        first = np.where(preferred > 0, judged.chosen < judged.rejected, judged.rejected < judged.chosen)
        equal = (gap == 0) & (first if protocol == "hpsv2" else True)
        return (~untied | agrees | equal).astype(float), _shares(judged, np.ones(len(gap), dtype=bool))
    raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")


def _shares(judged: PairScores, counted: np.ndarray) -> np.ndarray:
    """1 / (counted pairs of the list) for counted pairs, 0 for the rest. A list is a caption's where none are known."""
    group = judged.caption if judged.group is None else judged.group
    _, place = np.unique(group, return_inverse=True)
    size = np.bincount(place, weights=counted)[place]
    return np.divide(counted, size, out=np.zeros(len(counted)), where=size > 0)


class _Ratio:
    """(B, C) how often each prompt was drawn -> (B,) the ratio."""

    def __init__(self, right: np.ndarray, weight: np.ndarray, caption: np.ndarray) -> None:
        self.above = np.bincount(caption, weights=weight * right)
        self.below = np.bincount(caption, weights=weight)

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        below = counts @ self.below
        return np.divide(counts @ self.above, below, out=np.full(len(counts), np.nan), where=below > 0)


class _Tau:
    """(B, C) how often each prompt was drawn -> (B,) accuracy with ties, eps chosen anew in each resample."""

    def __init__(self, gap: np.ndarray, label: np.ndarray, caption: np.ndarray) -> None:
        self.gap, self.label, self.caption = gap, label, caption

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        return _tau(self.gap, self.label, counts[:, self.caption])


def _tau(gap: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """max over eps of the share of pairs whose verdict is met, |gap| <= eps being a tie. weight (B, N) -> (B,).

    eps goes over 0 and every |gap|. Raising it past a pair turns it into a tie: right if raters tie it, and no longer
    right if it agreed.
    """
    preferred = np.sign(label - 0.5)
    agrees = (preferred != 0) & (gap * preferred > 0)
    size = np.abs(gap)
    order = np.argsort(size, kind="stable")
    change = weight[:, order] * ((preferred == 0).astype(float) - agrees)[order]
    met = np.sum(weight * agrees, axis=1)[:, None] + np.cumsum(change, axis=1)
    last = np.append(np.diff(size[order]) > 0, True)  # pairs of one |gap| become ties together
    best = met[:, last].max(axis=1)
    if size[order][0] > 0:  # at eps 0 nothing is a tie
        best = np.maximum(best, np.sum(weight * agrees, axis=1))
    return best / np.sum(weight, axis=1)
