"""Calibration of predicted preference probabilities: reliability, expected calibration error, NLL, Brier score, scale.

`losses.preference_probability` predicts the label of a pair from its score gap at noise level sigma. The likelihood
assumes that one scale of the gap fits every sigma, since its variance already grows with sigma.

The fidelity objective is not calibrated. For a rater who prefers the first image with probability q, the expectation of
1 - sqrt(probability of the preferred image) is minimal at p = q^2 / (q^2 + (1 - q)^2) and not at q: a reward trained to
its optimum is overconfident (`fidelity_fixed_point`).
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from dinalrm_align.eval.report.intervals import LEVEL, by_caption
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss, preference_probability

DRAWS = 2000
"""Bootstrap resamples of captions."""
SCALES = (1e-3, 1e3)
"""Bounds of the search for the best scale."""


@dataclass(frozen=True)
class Reliability:
    """Pairs by confidence, in bins of equal width on [0.5, 1]; NaN in bins without pairs.

    Every pair counts once, with the more probable image first: p below 1/2 becomes 1 - p, and its label 1 - label. At
    p = 1/2 the label counts as 1/2.

    edges: (bins + 1,); the rest: (bins,). predicted, observed: mean prediction and mean label. standard_error: of
    `observed`, over captions; at least that of independent pairs under a flat prior, so it is positive in a bin where
    all labels agree.
    """

    edges: np.ndarray
    count: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    standard_error: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """Calibration at one noise level.

    Args:
        reliability: of the predictions.
        error, low, high: expected calibration error and its 95 % interval over captions (`calibration_interval`).
        by_chance: the error expected of exact predictions.
        nll, brier: mean negative log-likelihood and squared error of the predictions.
        scale, scaled_nll: the factor on the gap that minimises the negative log-likelihood, and that minimum.
    """

    reliability: Reliability
    error: float
    low: float
    high: float
    by_chance: float
    nll: float
    brier: float
    scale: float
    scaled_nll: float


def calibrate(
    gap: ArrayLike,
    label: ArrayLike,
    captions: ArrayLike,
    *,
    sigma: float,
    config: LossConfig,
    rng: np.random.Generator,
    bins: int = 10,
) -> Calibration:
    """Calibration of N pairs at noise level sigma.

    gap: raw score of the first image minus that of the second. label: share of raters who prefer the first, in [0, 1].
    captions: pairs of one caption are not independent. config: the likelihood. rng: for the interval.
    """
    probability = predict(gap, sigma, config)
    curve = reliability(probability, label, bins, captions)
    low, high = calibration_interval(probability, label, captions, rng=rng, bins=bins)
    scale = best_scale(gap, label, sigma=sigma, config=config)
    scaled = scale * np.asarray(gap, dtype=np.float64) if math.isfinite(scale) else gap
    return Calibration(
        reliability=curve,
        error=expected_calibration_error(curve),
        low=low,
        high=high,
        by_chance=error_by_chance(curve),
        nll=negative_log_likelihood(gap, label, sigma=sigma, config=config),
        brier=brier_score(probability, label),
        scale=scale,
        scaled_nll=0.0 if scale == math.inf else negative_log_likelihood(scaled, label, sigma=sigma, config=config),
    )


def predict(gap: ArrayLike, sigma: float, config: LossConfig) -> np.ndarray:
    """P(first preferred), (N,) float64, for gaps (N,) of raw scores at one noise level."""
    delta = _float32(gap)
    return preference_probability(delta, torch.full_like(delta, sigma), config).double().numpy()


def reliability(
    probability: ArrayLike, observed: ArrayLike, bins: int = 10, captions: ArrayLike | None = None
) -> Reliability:
    """Bin predictions (N,) and labels (N,), both in [0, 1]. captions: (N,); None if pairs are independent.

    Raises ValueError for other shapes, values out of range and fewer than one bin.
    """
    p, o = _folded(probability, observed)
    names = np.arange(len(p)) if captions is None else _checked_captions(captions, p)
    edges, indices = _binned(p, bins)
    count = np.bincount(indices, minlength=bins)
    predicted, frequency, error = (np.full(bins, np.nan) for _ in range(3))
    for index in np.flatnonzero(count):
        here = indices == index
        predicted[index], frequency[index] = p[here].mean(), o[here].mean()
        error[index] = _standard_error(o[here], names[here])
    return Reliability(edges, count, predicted, frequency, error)


def expected_calibration_error(reliability: Reliability) -> float:
    """Mean |predicted - observed| over bins, weighted by their pairs. Positive by chance, see `error_by_chance`."""
    return _weighted(reliability, np.abs(reliability.predicted - reliability.observed))


def error_by_chance(reliability: Reliability) -> float:
    """The expected calibration error of exact predictions: E|N(0, s^2)| = s sqrt(2 / pi), s a bin's standard error."""
    return _weighted(reliability, math.sqrt(2 / math.pi) * reliability.standard_error)


def calibration_interval(
    probability: ArrayLike,
    observed: ArrayLike,
    captions: ArrayLike,
    *,
    rng: np.random.Generator,
    bins: int = 10,
    draws: int = DRAWS,
) -> tuple[float, float]:
    """95 % interval (low, high) of the expected calibration error, from resampled captions.

    The basic bootstrap, 2 e - (quantiles of the resampled errors): resampling adds the bias of sampling once more, so
    plain quantiles are too high by twice that bias. The interval is unreliable where the error is close to
    `error_by_chance`.
    """
    p, o = _folded(probability, observed)
    _, caption = np.unique(_checked_captions(captions, p), return_inverse=True)
    _, index = _binned(p, bins)
    number = int(caption.max()) + 1
    cell = caption * bins + index
    weights = (np.ones_like(p), p, o)
    sums = [np.bincount(cell, weights=w, minlength=number * bins).reshape(number, bins) for w in weights]
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=draws)

    def error(weights: np.ndarray) -> np.ndarray:
        count, predicted, frequency = (weights @ table for table in sums)
        return np.abs(predicted - frequency).sum(axis=-1) / count.sum(axis=-1)

    whole = float(error(np.ones((1, number)))[0])
    tail = (1 - LEVEL) / 2
    lower, upper = np.quantile(error(drawn), [tail, 1 - tail])
    return max(0.0, 2 * whole - float(upper)), min(1.0, 2 * whole - float(lower))


def negative_log_likelihood(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """Mean of -(y log p + (1 - y) log(1 - p)) over gaps and labels (N,), in nats; finite where p underflows to 0."""
    delta = _float32(gap)
    losses = preference_loss(
        delta,
        torch.zeros_like(delta),
        torch.full_like(delta, sigma),
        _float32(label),
        config=dataclasses.replace(config, objective="nll"),
    )
    return float(losses.double().mean())


def brier_score(probability: ArrayLike, observed: ArrayLike) -> float:
    """Mean squared difference of predictions (N,) and labels (N,)."""
    return float(np.mean((_column(probability) - _column(observed)) ** 2))


def best_scale(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """The s >= 0 that minimises the negative log-likelihood of the labels (N,) given s * gap.

    1: calibrated; below 1: overconfident. The likelihood is log-concave in s, so the optimum is unique: 0 where gaps
    and labels do not correlate positively, inf where no label contradicts its gap, NaN where all gaps are 0.
    """
    gaps, preferred = _column(gap), 2 * _column(label) - 1
    if not gaps.any():
        return math.nan
    if np.dot(gaps, preferred) <= 0:
        return 0.0
    if np.all((gaps * preferred > 0) & (np.abs(preferred) == 1)):
        return math.inf
    optimum = minimize_scalar(
        lambda log_scale: negative_log_likelihood(math.exp(log_scale) * gaps, label, sigma=sigma, config=config),
        bounds=(math.log(SCALES[0]), math.log(SCALES[1])),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return math.exp(optimum.x)


def fidelity_fixed_point(q: ArrayLike) -> np.ndarray:
    """The optimal p under fidelity for a rater who prefers with probability q: q^2 / (q^2 + (1 - q)^2)."""
    q = np.asarray(q, dtype=np.float64)
    return q**2 / (q**2 + (1 - q) ** 2)


def fidelity_rater(p: ArrayLike) -> np.ndarray:
    """The inverse of `fidelity_fixed_point`: sqrt p / (sqrt p + sqrt(1 - p)), the frequency where p is predicted."""
    p = np.asarray(p, dtype=np.float64)
    return np.sqrt(p) / (np.sqrt(p) + np.sqrt(1 - p))


def _folded(probability: ArrayLike, observed: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and labels with the more probable image first."""
    p, o = _column(probability), _column(observed)
    if p.shape != o.shape or not all(((x >= 0) & (x <= 1)).all() for x in (p, o)):
        raise ValueError(
            f"one label per prediction, each in [0, 1]: got predictions {p.shape} in [{p.min():.4g}, {p.max():.4g}], "
            f"labels {o.shape} in [{o.min():.4g}, {o.max():.4g}]"
        )
    return np.maximum(p, 1 - p), np.where(p > 0.5, o, np.where(p < 0.5, 1 - o, 0.5))


def _binned(p: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Edges (bins + 1,) and the bin (N,) of each p in [0.5, 1]; an edge belongs to the bin above it, 1 to the last."""
    if bins < 1:
        raise ValueError(f"bins: got {bins}; expected at least 1")
    edges = np.linspace(0.5, 1.0, bins + 1)
    return edges, np.searchsorted(edges[1:-1], p, side="right")


def _standard_error(values: np.ndarray, captions: np.ndarray) -> float:
    """Standard error over captions of the mean of values (n,) in [0, 1]; at least the standard deviation of
    Beta(k + 1, n - k + 1), where k is the sum of the values.
    """
    mean = (values.sum() + 1) / (len(values) + 2)
    independent = math.sqrt(mean * (1 - mean) / (len(values) + 3))
    per_caption = by_caption(values, captions)
    if len(per_caption) < 2:
        return independent
    return max(independent, float(per_caption.std(ddof=1)) / math.sqrt(len(per_caption)))


def _weighted(reliability: Reliability, values: np.ndarray) -> float:
    filled = reliability.count > 0
    return float(np.average(values[filled], weights=reliability.count[filled]))


def _checked_captions(captions: ArrayLike, p: np.ndarray) -> np.ndarray:
    names = np.asarray(captions)
    if names.shape != p.shape:
        raise ValueError(f"one caption per pair: got {p.shape} pairs, {names.shape} captions")
    return names


def _column(values: ArrayLike) -> np.ndarray:
    """(N,) float64, N at least 1, finite; ValueError otherwise."""
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not len(column) or not np.isfinite(column).all():
        raise ValueError(f"got shape {column.shape}, finite: {np.isfinite(column).all()}; expected finite numbers (N,)")
    return column


def _float32(values: ArrayLike) -> torch.Tensor:
    return torch.from_numpy(_column(values).astype(np.float32))
