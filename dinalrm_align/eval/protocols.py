"""Accuracy under a named protocol (`test_sets_config.PROTOCOLS`), with a bootstrap interval over prompts.

Under every protocol except tau, accuracy is sum(w u r) / sum(w u), with sums over pairs. For each pair, r in [0, 1] is
the correctness, u is the weight, and w is the number of times that the bootstrap drew the pair's prompt.
"""

from dataclasses import dataclass

import numpy as np

from dinalrm_align.eval.report.intervals import LEVEL, bracket
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets_config import PROTOCOLS

CHUNK = 50  # bootstrap resamples computed at once


@dataclass(frozen=True)
class Accuracy:
    """Accuracy in [0, 1], its 95 % interval, and the numbers of pairs and prompts counted. NaN if no pair counts.

    The bootstrap needs two prompts: with one, low and high are NaN.
    """

    value: float
    low: float
    high: float
    pairs: int
    prompts: int

    def __str__(self) -> str:
        """Format as per cent with the interval: "72.40 [70.10, 74.60]"."""
        if not self.pairs:
            return "no pairs"
        return f"{100 * self.value:.2f} {bracket(100 * self.low, 100 * self.high, '.2f')}"


def accuracy(scores: PairScores, protocol: str, *names: str, draws: int = 1000, seed: int = 0) -> Accuracy:
    """Compute the accuracy under a protocol, for the mean of the scores at the noise levels `names`.

    The interval uses `draws` bootstrap resamples of prompts. Raises ValueError for an unknown protocol or noise level.
    """
    gap, label = scores.gap(*names), scores.label.astype(np.float64)
    _, caption = np.unique(scores.caption, return_inverse=True)
    if protocol == "tau":
        counted = np.ones(len(gap), dtype=bool)
        value = _tau(gap, label, np.ones((1, len(gap))))[0]
    else:
        right, weight = _right_and_weight(scores, protocol, gap, label)
        counted = weight > 0
        if not counted.any():
            return Accuracy(np.nan, np.nan, np.nan, 0, 0)
        value = np.sum(weight * right) / np.sum(weight)
    number, prompts, pairs = int(caption.max()) + 1, len(np.unique(caption[counted])), int(counted.sum())
    if prompts < 2:
        return Accuracy(float(value), np.nan, np.nan, pairs, prompts)
    rng = np.random.default_rng(seed)
    resampled = []
    for start in range(0, draws, CHUNK):
        counts = rng.multinomial(number, np.full(number, 1 / number), size=min(CHUNK, draws - start))
        by_tau = protocol == "tau"
        resampled.append(_tau(gap, label, counts[:, caption]) if by_tau else _ratio(right, weight, caption, counts))
    low, high = np.nanquantile(np.concatenate(resampled), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Accuracy(float(value), float(low), float(high), pairs, prompts)


def _right_and_weight(
    scores: PairScores, protocol: str, gap: np.ndarray, label: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the correctness (N,) and the weight (N,) of each pair under a protocol."""
    preferred = np.sign(label - 0.5)
    untied, agrees = preferred != 0, gap * preferred > 0
    if protocol in ("pooled", "strict", "diff"):
        return agrees.astype(float), untied.astype(float)
    if protocol == "half-ties":
        return agrees + 0.5 * (gap == 0), untied.astype(float)
    if protocol == "three-way":
        return (np.sign(gap) == preferred).astype(float), np.ones(len(gap))
    if protocol == "grouped":
        return agrees.astype(float), _shares(scores, untied)
    if protocol in ("hpsv2", "mps"):
        first = np.where(preferred > 0, scores.chosen < scores.rejected, scores.rejected < scores.chosen)
        equal = (gap == 0) & (first if protocol == "hpsv2" else True)
        return (~untied | agrees | equal).astype(float), _shares(scores, np.ones(len(gap), dtype=bool))
    raise ValueError(f"protocol: got {protocol!r}; known: {', '.join(PROTOCOLS)}")


def _shares(scores: PairScores, counted: np.ndarray) -> np.ndarray:
    """Return weights (N,): 0 for pairs not counted, else 1 / (number of counted pairs in the same list or caption)."""
    _, number = np.unique(scores.caption if scores.group is None else scores.group, return_inverse=True)
    size = np.bincount(number, weights=counted)[number]
    return np.divide(counted, size, out=np.zeros(len(counted)), where=size > 0)


def _ratio(right: np.ndarray, weight: np.ndarray, caption: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the accuracies (B,) of B bootstrap resamples. `counts[b, c]`: how often resample b drew prompt c."""
    above, below = (counts @ np.bincount(caption, weights=values) for values in (weight * right, weight))
    return np.divide(above, below, out=np.full(len(counts), np.nan), where=below > 0)


def _tau(gap: np.ndarray, label: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the tau accuracy (B,) of B bootstrap resamples. `weight`: (B, N) weight of each pair in each resample.

    A pair with |gap| <= eps is predicted as a tie, which is correct if raters tie the pair. For each resample, the
    threshold eps is chosen among 0 and all |gap| so that the accuracy is highest.
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
