"""Calibration of predicted preference probabilities: reliability, expected calibration error, NLL, and Brier score.

`losses.preference_probability` predicts a pair's label from the score gap at noise level sigma. The variance of the
likelihood grows with sigma, so one factor on the score gap should fit all noise levels.

The fidelity objective does not give calibrated probabilities. Let a rater prefer the first image with probability q,
and let the model predict p. The expected loss, 1 - q sqrt(p) - (1 - q) sqrt(1 - p), is minimal at p = q^2 / (q^2 + (1 -
q)^2) instead of p = q, so a reward trained to the optimum is overconfident. With labels y that are shares of several
raters, it is more so: for y > 1/2, the loss 1 - sqrt(y p + (1 - y) (1 - p)) falls until p = 1.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from dinalrm_align.eval.ablation import Measure, Runs
from dinalrm_align.eval.report.intervals import LEVEL, bracket, by_caption
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss, preference_probability

BINS = 10
SCALES = (1e-3, 1e3)  # bounds of the search for the best scale
SECTION = (
    "## Calibration on {name}\n\nEach arm by the likelihood it was trained with, pairs of all seeds. ECE: expected "
    "calibration error in points, with its 95 % interval over captions for these very rewards; by chance: the ECE of "
    "exact predictions. NLL in nats (0.693 for p = 1/2). Best scale: the factor on the gaps that minimises the NLL; 1 "
    "is calibrated, below 1 overconfident. A reward trained to the optimum of fidelity is overconfident: it predicts "
    "q^2 / (q^2 + (1 - q)^2) where a rater prefers with probability q (dashed in the figure), and more if labels are "
    "shares of several raters."
)


@dataclass(frozen=True)
class Reliability:
    """Predicted and observed preference frequencies, in equal bins of the predicted probability p over [0.5, 1].

    Every pair is counted with the more probable image first: if p < 1/2, then 1 - p replaces p, and 1 - label replaces
    the label. If p = 1/2, then 1/2 replaces the label. All arrays have shape (bins,). In bins without pairs, `count` is
    0 and the other arrays are NaN.

    count: number of pairs. predicted: mean of p. observed: mean label. standard_error: standard error of `observed`
    over captions. It is at least the standard error of independent pairs under a flat prior, so it is never 0.
    """

    count: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    standard_error: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error (ECE): the mean over pairs of |predicted - observed| of the pair's bin."""
        return self._mean(np.abs(self.predicted - self.observed))

    @property
    def by_chance(self) -> float:
        """Mean ECE that sampling noise alone would give a perfectly calibrated model.

        A bin whose observed frequency has standard error s contributes E|N(0, s^2)| = s sqrt(2 / pi).
        """
        return self._mean(math.sqrt(2 / math.pi) * self.standard_error)

    def _mean(self, values: np.ndarray) -> float:
        filled = self.count > 0
        return float(np.average(values[filled], weights=self.count[filled]))


@dataclass(frozen=True)
class Calibration:
    """Calibration at one noise level.

    low, high: 95 % interval of the expected calibration error. nll: mean negative log-likelihood. brier: mean squared
    error of the probabilities. scale: factor on the score gaps that minimises the NLL. scaled_nll: NLL of the scaled
    score gaps.
    """

    reliability: Reliability
    low: float
    high: float
    nll: float
    brier: float
    scale: float
    scaled_nll: float


def calibrate(
    gap: ArrayLike, label: ArrayLike, captions: ArrayLike, *, sigma: float, config: LossConfig, rng: np.random.Generator
) -> Calibration:
    """Measure the calibration of the labels predicted for N pairs at noise level sigma.

    gap: (N,) raw score of the first image minus raw score of the second. label: (N,) share of raters who prefer the
    first image. captions: (N,) caption of each pair; pairs of one caption are not independent. rng: generator for the
    bootstrap.
    """
    gap, label = np.asarray(gap, dtype=np.float64), np.asarray(label, dtype=np.float64)
    probability = predict(gap, sigma, config)
    scale = best_scale(gap, label, sigma=sigma, config=config)
    scaled = scale * gap if math.isfinite(scale) else gap
    low, high = calibration_interval(probability, label, captions, rng=rng)
    return Calibration(
        reliability=reliability(probability, label, captions=captions),
        low=low,
        high=high,
        nll=negative_log_likelihood(gap, label, sigma=sigma, config=config),
        brier=float(np.mean((probability - label) ** 2)),
        scale=scale,
        scaled_nll=0.0 if scale == math.inf else negative_log_likelihood(scaled, label, sigma=sigma, config=config),
    )


def predict(gap: ArrayLike, sigma: float, config: LossConfig) -> np.ndarray:
    """Return probabilities (N,), float64, that the first image is preferred, for score gaps (N,) at sigma."""
    delta = torch.tensor(gap, dtype=torch.float32)
    return preference_probability(delta, torch.full_like(delta, sigma), config).double().numpy()


def reliability(
    probability: ArrayLike, observed: ArrayLike, bins: int = BINS, captions: ArrayLike | None = None
) -> Reliability:
    """Compare predicted probabilities (N,) with observed labels (N,) in bins.

    captions: (N,) caption of each pair, over which standard errors are computed; None if pairs are independent.
    """
    p, o, indices = _binned(probability, observed, bins)
    names = np.arange(len(p)) if captions is None else np.asarray(captions)
    count = np.bincount(indices, minlength=bins)
    predicted, frequency, error = (np.full(bins, np.nan) for _ in range(3))
    for index in np.flatnonzero(count):
        here = indices == index
        predicted[index], frequency[index] = p[here].mean(), o[here].mean()
        error[index] = _standard_error(o[here], names[here])
    return Reliability(count, predicted, frequency, error)


def calibration_interval(
    probability: ArrayLike, observed: ArrayLike, captions: ArrayLike, *, rng: np.random.Generator, draws: int = 2000
) -> tuple[float, float]:
    """Return the 95 % interval (low, high) of the expected calibration error (ECE), from a bootstrap over captions.

    It is a basic bootstrap interval: 2 ECE - (quantiles of the resampled ECE). The quantiles alone would be too high,
    because resampling adds the sampling bias a second time. The interval is unreliable if the ECE is close to
    `Reliability.by_chance`, the ECE of a calibrated model. With one caption both limits are NaN.
    """
    p, o, index = _binned(probability, observed, BINS)
    _, caption = np.unique(captions, return_inverse=True)
    number = int(caption.max()) + 1
    if number < 2:
        return math.nan, math.nan
    cell = caption * BINS + index
    weights = (np.ones_like(p), p, o)
    sums = [np.bincount(cell, weights=w, minlength=number * BINS).reshape(number, BINS) for w in weights]
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=draws)

    def error(weights: np.ndarray) -> np.ndarray:
        count, predicted, frequency = (weights @ table for table in sums)
        return np.abs(predicted - frequency).sum(axis=-1) / count.sum(axis=-1)

    whole = float(error(np.ones((1, number)))[0])
    lower, upper = np.quantile(error(drawn), [(1 - LEVEL) / 2, 1 - (1 - LEVEL) / 2])
    return max(0.0, 2 * whole - float(upper)), min(1.0, 2 * whole - float(lower))


def pair_nll(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> np.ndarray:
    """Return -(y log p + (1 - y) log(1 - p)) of the labels y (N,), in nats, (N,). It stays finite if p underflows."""
    delta, label = (torch.tensor(values, dtype=torch.float32) for values in (gap, label))
    sigmas, nll = torch.full_like(delta, sigma), dataclasses.replace(config, objective="nll")
    return preference_loss(delta, torch.zeros_like(delta), sigmas, label, config=nll).double().numpy()


def negative_log_likelihood(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """Return the mean of `pair_nll`."""
    return float(pair_nll(gap, label, sigma=sigma, config=config).mean())


def likelihood_at(sigma: float, config: LossConfig) -> Measure:
    """Return a function that maps `PairScores` to `pair_nll` at sigma."""
    level = NoiseLevels.at(sigma).name
    return lambda scores: pair_nll(scores.gap(level), scores.label, sigma=sigma, config=config)


def best_scale(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """Return the factor s >= 0 that minimises the negative log-likelihood of labels (N,) given the gaps s * gap.

    s = 1 means that the reward is calibrated, and s < 1 that it is overconfident. The likelihood is log-concave in s,
    so the optimum is unique. Returns 0 if gaps and labels do not correlate positively, inf if all labels are 0 or 1 and
    agree with their gaps, and NaN if all gaps are 0.
    """
    gaps, preferred = np.asarray(gap, dtype=np.float64), 2 * np.asarray(label, dtype=np.float64) - 1
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


def fidelity_rater(p: ArrayLike) -> np.ndarray:
    """Return the raters' probability for which p minimises the fidelity loss: sqrt(p) / (sqrt(p) + sqrt(1 - p))."""
    p = np.asarray(p, dtype=np.float64)
    return np.sqrt(p) / (np.sqrt(p) + np.sqrt(1 - p))


def _binned(probability: ArrayLike, observed: ArrayLike, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put the more probable image of every pair first. Return probabilities, labels and bin indices, each (N,)."""
    p, o = np.asarray(probability, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    o = np.where(p > 0.5, o, np.where(p < 0.5, 1 - o, 0.5))
    p = np.maximum(p, 1 - p)
    return p, o, np.searchsorted(np.linspace(0.5, 1.0, bins + 1)[1:-1], p, side="right")


def _standard_error(values: np.ndarray, captions: np.ndarray) -> float:
    """Return the standard error of the mean of n values in [0, 1]. Values of one caption may be correlated.

    The result is at least sqrt(v / (n + 3)), with the variance v of the values and two more, 0 and 1. If all values are
    0 or 1, this is the standard deviation of Beta(sum + 1, n - sum + 1), the posterior of the mean of independent
    values. Shares of several raters vary less.
    """
    more = np.append(values, [0.0, 1.0])
    independent = math.sqrt(more.var() / (len(values) + 3))
    per_caption = by_caption(values, captions)
    if len(per_caption) < 2:
        return independent
    return max(independent, float(per_caption.std(ddof=1)) / math.sqrt(len(per_caption)))


def reliabilities(
    runs: Runs, losses: Mapping[str, LossConfig], name: str, sigmas: Sequence[float]
) -> dict[str, dict[float, Calibration]]:
    """Return a dict: arm (training variant) -> noise level -> calibration on test set `name`. All seeds are pooled.

    losses: arm -> the arm's training loss, which turns score gaps into probabilities.
    """
    curves: dict[str, dict[float, Calibration]] = {}
    for arm, seeds_of_arm in runs.items():
        seeds = [sets[name] for sets in seeds_of_arm.values()]
        label, caption = (np.concatenate([vars(scores)[column] for scores in seeds]) for column in ("label", "caption"))
        curves[arm] = {}
        for sigma in sigmas:
            gap = np.concatenate([scores.gap(NoiseLevels.at(sigma).name) for scores in seeds])
            rng = np.random.default_rng((0, len(curves)))
            curves[arm][sigma] = calibrate(gap, label, caption, sigma=sigma, config=losses[arm], rng=rng)
    return curves


def calibration_section(curves: Mapping[str, Mapping[float, Calibration]], name: str) -> str:
    """Return Markdown: a table with a row per variant and noise level."""
    rows = []
    for label, levels in curves.items():
        for sigma, found in levels.items():
            curve = found.reliability
            ece, chance = (f"{100 * x:.1f}" for x in (curve.error, curve.by_chance))
            losses = (f"{x:.3f}" for x in (found.brier, found.nll))
            cells = [curve.count.sum(), f"{ece} {bracket(100 * found.low, 100 * found.high, '.1f')}", chance, *losses]
            rows.append([label, f"{sigma:g}", *cells, f"{found.scale:.2f}", f"{found.scaled_nll:.3f}"])
    header = ["arm", "sigma", "pairs", "ECE", "by chance", "Brier", "NLL", "best scale", "NLL at it"]
    return f"{SECTION.format(name=name)}\n\n{table(header, rows)}\n"
