"""Confidence intervals of a mean over seeds and captions.

Every seed judges the same captions, so a table of differences (or gains) has one row per seed and one column per
caption: two crossed random effects. Samples of one caption are not independent of each other, runs of one seed neither;
an interval over all S x C cells as if they were would be far too narrow.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval [low, high].

    seeds, captions: what it rests on. With seeds = 1 the variance between seeds is unknown, and the interval is for
    other captions of that one seed alone. standard_error: of the mean; the interval is wider than twice that where
    seeds are few.
    """

    mean: float
    low: float
    high: float
    standard_error: float
    seeds: int
    captions: int

    def __str__(self) -> str:
        text = f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return text if self.seeds > 1 else f"{text} (one seed: variance between seeds unknown)"


def seeds_by_captions(differences: np.ndarray) -> Interval:
    """The mean of differences (S, C), seeds by captions, with its 95 % confidence interval.

    Seeds and captions are crossed random effects; the variance of the grand mean is taken as a + b, with
    a = Var(seed means) / S and b = Var(caption means) / C (sample variances). Each holds the residual's share
    Var / (S C), so that the sum counts it twice. The interval reaches sqrt(t_{S-1}^2 a + t_{C-1}^2 b) to either side,
    t being Student's (Banerjee, Sankhya 22, 1960): it holds the truth at least 95 % of the time whatever the share of
    the two. Satterthwaite's degrees of freedom give narrower intervals that do not: 92.5 % at three seeds, 87 % at two,
    where seeds differ as much as captions. S = 1: the captions' term alone.
    ValueError for fewer than one seed or two captions, or a value that is not finite.
    """
    table = np.asarray(differences, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise ValueError(f"differences: got shape {table.shape}; expected (seeds, captions), at least (1, 2)")
    if not np.isfinite(table).all():
        raise ValueError(f"differences: got {int((~np.isfinite(table)).sum())} values that are not finite")
    seeds, captions = table.shape
    mean = float(table.mean())
    terms = [(float(table.mean(axis=0).var(ddof=1)) / captions, captions - 1)]
    if seeds > 1:
        terms.append((float(table.mean(axis=1).var(ddof=1)) / seeds, seeds - 1))
    error = math.sqrt(sum(variance for variance, _ in terms))
    reach = math.sqrt(sum(variance * float(stdtrit(free, (1 + LEVEL) / 2)) ** 2 for variance, free in terms))
    return Interval(mean, mean - reach, mean + reach, error, seeds, captions)


def by_caption(values: Sequence[float] | np.ndarray, captions: Sequence[str] | np.ndarray) -> np.ndarray:
    """Values (N,) of samples with their captions (N,) -> one value per caption (C,), captions in sorted order.

    Where every caption has as many samples, its value is the mean of its samples. Otherwise a caption weighs by its
    count n_c: it gets m + (n_c / mean n)(m_c - m), m the mean of all samples and m_c of its own. Then the mean of the
    result is the mean of the samples, and its standard error over captions that of a ratio estimator (linearised; the
    cluster-robust one). ValueError when the lengths differ or nothing is there.
    """
    samples, names = np.asarray(values, dtype=np.float64), np.asarray(captions)
    if samples.ndim != 1 or samples.shape != names.shape or not len(samples):
        raise ValueError(f"one caption per value: got values {samples.shape}, captions {names.shape}")
    _, place, counts = np.unique(names, return_inverse=True, return_counts=True)
    mean = samples.mean()
    return mean + np.bincount(place, weights=samples - mean) / counts.mean()
