"""Are predicted preference probabilities true? Reliability, expected calibration error, scores of the forecast, scale.

A pair of gap delta at level sigma is predicted by `losses.preference_probability`; a rater's label says what came. The
likelihood's own claim is that one scale of the gap fits every sigma, since its variance already grows with sigma.

The fidelity objective claims less. Over a rater who prefers the first picture with probability q, the expectation of
1 - sqrt(probability of what was preferred) is smallest at p = q^2 / (q^2 + (1 - q)^2), and not at q: a reward that is
trained perfectly by it is overconfident, and lies on that curve (`fidelity_fixed_point`).
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from dinalrm_align.eval.report.intervals import LEVEL, by_caption
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.reward.losses import preference_loss, preference_probability

DRAWS = 2000
"""Resamples of captions behind an interval."""
SCALES = (1e-3, 1e3)
"""Where the best scale is looked for."""


@dataclass(frozen=True)
class Reliability:
    """Pairs by how sure the prediction was, in bins of equal width on [0.5, 1]; NaN in bins without pairs.

    Every pair counts once, with the picture that was predicted to be preferred as its first: p below 1/2 becomes 1 - p,
    and its label 1 - label. At p = 1/2 exactly no picture is first, and the label counts as 1/2.

    edges: (bins + 1,). count: (bins,). predicted, observed: (bins,), mean prediction and mean label. standard_error:
    (bins,), of observed: over captions where they are known, and never less than independent pairs would have under a
    flat prior, so that a bin in which all agree is not taken for certain.
    """

    edges: np.ndarray
    count: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    standard_error: np.ndarray


@dataclass(frozen=True)
class Calibration:
    """How well the predictions at one noise level are calibrated.

    error, low, high: expected calibration error and its 95 % interval over captions (`calibration_interval`).
    by_chance: the error expected of exact predictions. nll, brier: mean negative log-likelihood and squared error of
    the predictions. scale: of the gap, the one of the smallest negative log-likelihood; scaled_nll: that.
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
    """Everything about the pairs of one noise level.

    gap: (N,) raw scores' differences, first less second. label: (N,) in [0, 1], the share of raters who prefer the
    first. captions: (N,), which pairs are not independent. rng: for the interval.
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
    """P(first preferred), (N,) float64, of gaps (N,) of raw scores at one level."""
    delta = _float32(gap)
    return preference_probability(delta, torch.full_like(delta, sigma), config).double().numpy()


def reliability(
    probability: ArrayLike, observed: ArrayLike, bins: int = 10, captions: ArrayLike | None = None
) -> Reliability:
    """Bin predictions (N,) with what was observed (N,), both in [0, 1]; captions: (N,), or None where pairs are
    independent. Raises ValueError for other shapes, values out of range and fewer than one bin.
    """
    p, o = _folded(probability, observed)
    names = np.arange(len(p)) if captions is None else _checked_captions(captions, p)
    edges, place = _binned(p, bins)
    count = np.bincount(place, minlength=bins)
    predicted, frequency, error = (np.full(bins, np.nan) for _ in range(3))
    for index in np.flatnonzero(count):
        here = place == index
        predicted[index], frequency[index] = p[here].mean(), o[here].mean()
        error[index] = _standard_error(o[here], names[here])
    return Reliability(edges, count, predicted, frequency, error)


def expected_calibration_error(reliability: Reliability) -> float:
    """Mean |predicted - observed| over bins, weighted by their pairs. Chance alone makes it positive, see below."""
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
    """95 % interval (low, high) of the expected calibration error for other captions, which are resampled whole.

    The basic bootstrap, 2 e - (quantiles of the resampled errors): resampling adds to an error the bias that sampling
    had added, so that the plain quantiles lie too high by twice of it. Where the error is hardly above
    `error_by_chance`, no interval can be trusted to hold the truth.
    """
    p, o = _folded(probability, observed)
    _, caption = np.unique(_checked_captions(captions, p), return_inverse=True)
    _, place = _binned(p, bins)
    number = int(caption.max()) + 1
    cell = caption * bins + place
    sums = [
        np.bincount(cell, weights=w, minlength=number * bins).reshape(number, bins) for w in (np.ones_like(p), p, o)
    ]
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=draws)

    def error(weights: np.ndarray) -> np.ndarray:
        count, predicted, frequency = (weights @ table for table in sums)
        return np.abs(predicted - frequency).sum(axis=-1) / count.sum(axis=-1)

    found = float(error(np.ones((1, number)))[0])
    tail = (1 - LEVEL) / 2
    lower, upper = np.quantile(error(drawn), [tail, 1 - tail])
    return max(0.0, 2 * found - float(upper)), min(1.0, 2 * found - float(lower))


def negative_log_likelihood(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """Mean of -(y log p + (1 - y) log q) over gaps and labels (N,), in nats; finite where p underflows to 0."""
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
    """Mean squared difference of predictions and labels (N,)."""
    return float(np.mean((_column(probability) - _column(observed)) ** 2))


def best_scale(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """The s >= 0 for which s gap predicts the labels (N,) with the smallest negative log-likelihood.

    1: the gaps have the scale that the likelihood takes them to have; below 1: overconfident. The likelihood of s is
    log-concave, so there is one: 0 where larger gaps do not go with the labels, inf where no pair contradicts its gap,
    NaN where no gap differs from 0.
    """
    gaps, preferred = _column(gap), 2 * _column(label) - 1
    if not gaps.any():
        return math.nan
    if np.dot(gaps, preferred) <= 0:
        return 0.0
    if np.all((gaps * preferred > 0) & (np.abs(preferred) == 1)):
        return math.inf
    found = minimize_scalar(
        lambda log_scale: negative_log_likelihood(math.exp(log_scale) * gaps, label, sigma=sigma, config=config),
        bounds=(math.log(SCALES[0]), math.log(SCALES[1])),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return math.exp(found.x)


def fidelity_fixed_point(q: ArrayLike) -> np.ndarray:
    """What the fidelity objective drives p to for a rater who prefers with probability q: q^2 / (q^2 + (1 - q)^2)."""
    q = np.asarray(q, dtype=np.float64)
    return q**2 / (q**2 + (1 - q) ** 2)


def fidelity_rater(p: ArrayLike) -> np.ndarray:
    """The inverse of `fidelity_fixed_point`: sqrt p / (sqrt p + sqrt(1 - p)), what is observed where p is predicted."""
    p = np.asarray(p, dtype=np.float64)
    return np.sqrt(p) / (np.sqrt(p) + np.sqrt(1 - p))


def _folded(probability: ArrayLike, observed: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both with the more probable picture as the first of its pair."""
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
    """Of the mean of values (n,) in [0, 1], over captions, but not below that of n independent pairs: the standard
    deviation of Beta(k + 1, n - k + 1), k the sum of the values.
    """
    mean = (values.sum() + 1) / (len(values) + 2)
    alone = math.sqrt(mean * (1 - mean) / (len(values) + 3))
    per_caption = by_caption(values, captions)
    if len(per_caption) < 2:
        return alone
    return max(alone, float(per_caption.std(ddof=1)) / math.sqrt(len(per_caption)))


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
