"""Estimates that the comparisons of runs share: gains at equal drift, the choice of settings, and ratios of gains."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.special import stdtrit

from dinalrm_align.eval.report.intervals import LEVEL

Setting = TypeVar("Setting", bound=Hashable)


def at_drift(drifts: Sequence[float], values: np.ndarray, drift: float) -> np.ndarray:
    """Return the values (...) where a curve first reaches `drift`, linearly interpolated between its points.

    drifts (T,) and values (T, ...): the points of the curve, in the order of updates. Drift may fall between updates;
    the first crossing counts. Raises ValueError for a drift that the curve does not reach: nothing is extrapolated.
    """
    points, table = np.asarray(drifts, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(points) != len(table) or not len(points):
        raise ValueError(f"one drift per value: got {len(points)} drifts, {len(table)} values")
    reached = np.flatnonzero(points >= drift)
    if drift < points[0] or not len(reached):
        raise ValueError(f"drift: got {drift:g}; expected one on the curve, {points[0]:g} to {points.max():g}")
    after = int(reached[0])
    if after == 0:
        return table[0]
    share = (drift - points[after - 1]) / (points[after] - points[after - 1])
    return table[after - 1] + share * (table[after] - table[after - 1])


def common_drift(curves: Sequence[Sequence[float]]) -> float:
    """Return the largest drift that every curve reaches."""
    return min(max(curve) for curve in curves)


def best_of(gains: Mapping[Setting, float | None]) -> Setting | None:
    """Return the setting with the largest gain; None stands for a run that failed. The first of equal ones counts."""
    found = {setting: gain for setting, gain in gains.items() if gain is not None and math.isfinite(gain)}
    return max(found, key=found.__getitem__) if found else None


@dataclass(frozen=True)
class Ratio:
    """A ratio of two mean gains, with its interval [low, high]; infinite limits if the divisor may be 0."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.value:.2f} (no interval: the divisor is not separated from 0)"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio_interval(above: np.ndarray, below: np.ndarray) -> Ratio:
    """Return mean(above) / mean(below) with Fieller's 95 % interval; both tables are (S seeds, C captions), paired.

    Fieller (1954): the interval holds every r for which the mean of above - r below is not separated from 0, here by
    the interval of `seeds_by_captions`, in which seeds and captions are crossed random effects. Both sides of

        mean(above - r below)^2 <= t_{S-1}^2 Var(seed means) / S + t_{C-1}^2 Var(caption means) / C,

    where the residual variance counts once, as in `seeds_by_captions`, are quadratic in r. If the divisor itself is not
    separated from 0, the interval is unbounded.
    """
    tables = [np.asarray(table, dtype=np.float64) for table in (above, below)]
    if tables[0].ndim != 2 or tables[0].shape != tables[1].shape or tables[0].shape[1] < 2:
        shapes = " and ".join(str(table.shape) for table in tables)
        raise ValueError(f"tables: got {shapes}; expected two of (seeds, captions), at least (1, 2)")
    means = np.array([table.mean() for table in tables])
    both = np.stack(tables)
    over_seeds, over_captions = both.mean(axis=1), both.mean(axis=2)  # (2, C), (2, S)
    levels = [rows for rows in (over_captions, over_seeds) if rows.shape[1] > 1]
    terms = [(rows.shape[1] - 1, np.cov(rows) / rows.shape[1]) for rows in levels]
    if len(terms) == 2:  # both contain the residual's covariance; the term with more levels gives it up
        rest = both - over_captions[:, :, None] - over_seeds[:, None, :] + means[:, None, None]
        (fewer, first), (more, second) = sorted(terms, key=lambda term: term[0])
        residual = np.einsum("isc,jsc->ij", rest, rest) / (fewer * more * tables[0].size)
        terms = [(fewer, first), (more, second - residual)]
    variances = sum(matrix * float(stdtrit(free, (1 + LEVEL) / 2)) ** 2 for free, matrix in terms)
    squares = np.outer(means, means) - variances
    value = float(means[0] / means[1]) if means[1] else math.nan
    if squares[1, 1] <= 0:
        return Ratio(value, -math.inf, math.inf)
    centre = squares[0, 1] / squares[1, 1]
    reach = math.sqrt(max(0.0, centre**2 - squares[0, 0] / squares[1, 1]))
    return Ratio(value, centre - reach, centre + reach)
