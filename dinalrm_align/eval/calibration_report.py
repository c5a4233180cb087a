"""Calibration of the arms of an ablation: a table, a figure, and whether one scale fits all noise levels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.ablation import Runs
from dinalrm_align.eval.calibration import Calibration, calibrate, fidelity_rater
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NoiseLevels
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.train.files import save_figure

Curves = Mapping[str, Mapping[float, Calibration]]
"""arm -> sigma -> calibration."""
FEWEST_PLOTTED = 10
"""Fewest pairs of a plotted bin."""


SECTION = (
    "## Calibration\n\nOn {name}, each arm by the likelihood it was trained with, pairs of all seeds. ECE: expected "
    "calibration error in points, with its 95 % interval over captions; by chance: the ECE of exact predictions. NLL "
    "in nats (0.693 for p = 1/2). Best scale: the factor on the gaps that minimises the NLL; 1 is calibrated, below 1 "
    "overconfident. A reward trained to the optimum of fidelity is overconfident: it predicts q^2 / (q^2 + (1 - q)^2) "
    "where raters prefer with probability q (dashed in the figure)."
)


def reliabilities(
    runs: Runs, losses: Mapping[str, LossConfig], name: str, sigmas: Sequence[float], *, seed: int = 0
) -> dict[str, dict[float, Calibration]]:
    """Calibration of every arm at single noise levels on the set `name`, by the likelihood in `losses` that it was
    trained with. Pairs of all seeds are pooled by caption, so intervals are over captions.
    """
    curves: dict[str, dict[float, Calibration]] = {}
    for arm, seeds_of_arm in runs.items():
        seeds = [sets[name] for sets in seeds_of_arm.values()]
        label, caption = (np.concatenate([vars(scores)[column] for scores in seeds]) for column in ("label", "caption"))
        curves[arm] = {}
        for sigma in sigmas:
            gap = np.concatenate([scores.gap(NoiseLevels.at(sigma).name) for scores in seeds])
            rng = np.random.default_rng((seed, len(curves)))
            curves[arm][sigma] = calibrate(gap, label, caption, sigma=sigma, config=losses[arm], rng=rng)
    return curves


def calibration_section(curves: Curves, name: str) -> str:
    """Markdown: definitions, a row per arm and noise level, and each arm's range of best scales."""
    rows = []
    for label, levels in curves.items():
        for sigma, found in levels.items():
            ece, low, high, chance = (f"{100 * x:.1f}" for x in (found.error, found.low, found.high, found.by_chance))
            losses = (f"{x:.3f}" for x in (found.brier, found.nll))
            cells = [found.reliability.count.sum(), f"{ece} [{low}, {high}]", chance, *losses]
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


def plot_reliability(curves: Curves, path: Path) -> None:
    """Observed against predicted frequency: a panel per arm, a curve with standard errors per noise level.

    Dashed: the fixed point of the fidelity objective. Bins with few pairs are not plotted, but count in the ECE.
    """
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(6 * columns, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in panels[len(curves) :]:
        axis.set_visible(False)
    for axis, (label, levels) in zip(panels, curves.items(), strict=False):
        _draw(axis, levels)
        axis.set(title=label, xlabel="predicted P(preferred)", ylabel="observed frequency")
    figure.suptitle(
        f"each pair with the more probable image first; bins of at least {FEWEST_PLOTTED} pairs, one standard error"
    )
    save_figure(figure, path)


def _draw(axis: Axes, levels: Mapping[float, Calibration]) -> None:
    predicted = np.linspace(0.5, 1, 200)
    axis.plot(predicted, predicted, color="black", linewidth=0.8, label="exact")
    axis.plot(predicted, fidelity_rater(predicted), color="black", linewidth=0.8, linestyle="--", label="fidelity")
    for shade, (sigma, found) in zip(np.linspace(0, 0.9, len(levels)), levels.items(), strict=True):
        curve, filled = found.reliability, found.reliability.count >= FEWEST_PLOTTED
        axis.errorbar(
            curve.predicted[filled],
            curve.observed[filled],
            curve.standard_error[filled],
            color=colormaps["viridis"](shade),
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.8,
            label=f"sigma {sigma:g}: ECE {100 * found.error:.1f}",
        )
    axis.set(xlim=(0.49, 1.01), ylim=(0.4, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
