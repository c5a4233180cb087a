"""Calibration of predicted preference probabilities: reliability, expected calibration error, NLL, Brier score, scale.

`losses.preference_probability` predicts the label of a pair from its score gap at noise level sigma. The likelihood
assumes that one scale of the gap fits every sigma, since its variance already grows with sigma.

The fidelity objective is not calibrated. For a rater who prefers the first image with probability q, the expectation of
1 - sqrt(probability of the preferred image) is minimal at p = q^2 / (q^2 + (1 - q)^2) and not at q: a reward trained to
its optimum is overconfident (`fidelity_rater`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar

from dinalrm_align.eval.ablation import Runs
from dinalrm_align.eval.report.intervals import LEVEL, by_caption
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss, preference_probability

BINS = 10
SCALES = (1e-3, 1e3)  # bounds of the search for the best scale
SECTION = (
    "## Calibration\n\nOn {name}, each arm by the likelihood it was trained with, pairs of all seeds. ECE: expected "
    "calibration error in points, with its 95 % interval over captions; by chance: the ECE of exact predictions. NLL "
    "in nats (0.693 for p = 1/2). Best scale: the factor on the gaps that minimises the NLL; 1 is calibrated, below 1 "
    "overconfident. A reward trained to the optimum of fidelity is overconfident: it predicts q^2 / (q^2 + (1 - q)^2) "
    "where raters prefer with probability q (dashed in the figure)."
)


@dataclass(frozen=True)
class Reliability:
    """Pairs by confidence, in bins of equal width on [0.5, 1]: mean prediction and label (bins,), NaN without pairs.

    Every pair counts once, with the more probable image first: p below 1/2 becomes 1 - p, and its label 1 - label. At
    p = 1/2 the label counts as 1/2. standard_error: of `observed`, over captions; at least that of independent pairs
    under a flat prior, so it is positive in a bin where all labels agree.
    """

    count: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    standard_error: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: mean |predicted - observed| over pairs. Positive by chance, see `by_chance`."""
        return self._mean(np.abs(self.predicted - self.observed))

    @property
    def by_chance(self) -> float:
        """The expected error of exact predictions: E|N(0, s^2)| = s sqrt(2 / pi), s a bin's standard error."""
        return self._mean(math.sqrt(2 / math.pi) * self.standard_error)

    def _mean(self, values: np.ndarray) -> float:
        filled = self.count > 0
        return float(np.average(values[filled], weights=self.count[filled]))


@dataclass(frozen=True)
class Calibration:
    """Calibration at one noise level. low, high: `calibration_interval`. nll, brier: mean negative log-likelihood and
    squared error. scale, scaled_nll: the factor on the gap that minimises the log-likelihood loss, and that minimum.
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
    """Calibration of N pairs at noise level sigma.

    gap: raw score of the first image minus that of the second. label: share of raters who prefer the first, in [0, 1].
    captions: pairs of one caption are not independent. rng: for the interval.
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
    """P(first preferred), (N,) float64, for gaps (N,) of raw scores at one noise level."""
    delta = torch.tensor(gap, dtype=torch.float32)
    return preference_probability(delta, torch.full_like(delta, sigma), config).double().numpy()


def reliability(
    probability: ArrayLike, observed: ArrayLike, bins: int = BINS, captions: ArrayLike | None = None
) -> Reliability:
    """Bin predictions (N,) and labels (N,), both in [0, 1]. captions: (N,); None if pairs are independent."""
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
    """95 % interval (low, high) of the expected calibration error, from resampled captions.

    The basic bootstrap, 2 e - (quantiles of the resampled errors): resampling adds the bias of sampling once more, so
    plain quantiles are too high by twice that bias. Unreliable where the error is close to `Reliability.by_chance`.
    """
    p, o, index = _binned(probability, observed, BINS)
    _, caption = np.unique(captions, return_inverse=True)
    number = int(caption.max()) + 1
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


def negative_log_likelihood(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """Mean of -(y log p + (1 - y) log(1 - p)) over gaps and labels (N,), in nats; finite where p underflows to 0."""
    delta, label = (torch.tensor(values, dtype=torch.float32) for values in (gap, label))
    sigmas, nll = torch.full_like(delta, sigma), dataclasses.replace(config, objective="nll")
    return float(preference_loss(delta, torch.zeros_like(delta), sigmas, label, config=nll).double().mean())


def best_scale(gap: ArrayLike, label: ArrayLike, *, sigma: float, config: LossConfig) -> float:
    """The s >= 0 that minimises the negative log-likelihood of the labels (N,) given s * gap.

    1: calibrated; below 1: overconfident. The likelihood is log-concave in s, so the optimum is unique: 0 where gaps
    and labels do not correlate positively, inf where no label contradicts its gap, NaN where all gaps are 0.
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
    """The q for which fidelity is minimal at p: sqrt p / (sqrt p + sqrt(1 - p)), the frequency where p is predicted."""
    p = np.asarray(p, dtype=np.float64)
    return np.sqrt(p) / (np.sqrt(p) + np.sqrt(1 - p))


def _binned(probability: ArrayLike, observed: ArrayLike, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions and labels with the more probable image first, and their bins; an edge belongs to the bin above."""
    p, o = np.asarray(probability, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    o = np.where(p > 0.5, o, np.where(p < 0.5, 1 - o, 0.5))
    p = np.maximum(p, 1 - p)
    return p, o, np.searchsorted(np.linspace(0.5, 1.0, bins + 1)[1:-1], p, side="right")


def _standard_error(values: np.ndarray, captions: np.ndarray) -> float:
    """Standard error over captions of the mean of values (n,), at least the deviation of Beta(sum + 1, n - sum + 1)."""
    mean = (values.sum() + 1) / (len(values) + 2)
    independent = math.sqrt(mean * (1 - mean) / (len(values) + 3))
    per_caption = by_caption(values, captions)
    if len(per_caption) < 2:
        return independent
    return max(independent, float(per_caption.std(ddof=1)) / math.sqrt(len(per_caption)))


def reliabilities(
    runs: Runs, losses: Mapping[str, LossConfig], name: str, sigmas: Sequence[float]
) -> dict[str, dict[float, Calibration]]:
    """Calibration of every arm at single noise levels on the set `name`, by its likelihood in training. Pairs of
    all seeds are pooled by caption, so intervals are over captions.
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
    """Markdown: a row per arm and noise level, and each arm's range of best scales."""
    rows = []
    for label, levels in curves.items():
        for sigma, found in levels.items():
            curve = found.reliability
            ece, low, high, chance = (f"{100 * x:.1f}" for x in (curve.error, found.low, found.high, curve.by_chance))
            losses = (f"{x:.3f}" for x in (found.brier, found.nll))
            cells = [curve.count.sum(), f"{ece} [{low}, {high}]", chance, *losses]
            rows.append([label, f"{sigma:g}", *cells, f"{found.scale:.2f}", f"{found.scaled_nll:.3f}"])
    header = ["arm", "sigma", "pairs", "ECE", "by chance", "Brier", "NLL", "best scale", "NLL at it"]
    sentences = "\n".join(f"- {scale_sentence(label, levels)}" for label, levels in curves.items())
    return f"{SECTION.format(name=name)}\n\n{table(header, rows)}\n\n{sentences}\n"


def scale_sentence(label: str, levels: Mapping[float, Calibration]) -> str:
    """The range of the best scales over noise levels below 1; at 1, latents are pure noise."""
    scales = {sigma: found.scale for sigma, found in levels.items() if sigma < 1 and 0 < found.scale < math.inf}
    if not scales:
        return f"{label}: no level has a best scale."
    low, high = min(scales, key=scales.__getitem__), max(scales, key=scales.__getitem__)
    return (
        f"{label}: the best scale goes from {scales[low]:.2f} (sigma {low:g}) to {scales[high]:.2f} (sigma {high:g}), "
        f"by a factor of {scales[high] / scales[low]:.1f}; 1.0 would be one scale for all levels."
    )
