"""Calibration of the arms of an ablation, as a table, a picture and a sentence on whether one scale fits all levels."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.ablation import Evidence
from dinalrm_align.eval.calibration import Calibration, calibrate, fidelity_rater
from dinalrm_align.eval.scores import NoiseLevels
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.train.figures import save_figure

Curves = Mapping[str, Mapping[float, Calibration]]
"""label -> sigma -> calibration of the pairs judged at that level."""
FEWEST_DRAWN = 10
"""Pairs of a bin that is drawn."""


def reliabilities(
    evidence: Evidence, losses: Mapping[str, LossConfig], name: str, sigmas: Sequence[float], *, seed: int = 0
) -> dict[str, dict[float, Calibration]]:
    """Calibration of every arm at every single level on the judged set `name`, each by the likelihood in `losses` that
    it was trained with. Pairs of all its seeds are taken together, by caption: intervals are for other captions.
    """
    curves: dict[str, dict[float, Calibration]] = {}
    for arm, runs in evidence.items():
        judged = [sets[name] for sets in runs.values()]
        label, caption = (np.concatenate([vars(one)[column] for one in judged]) for column in ("label", "caption"))
        curves[arm] = {}
        for sigma in sigmas:
            gap = np.concatenate([one.gap(NoiseLevels.at(sigma).name) for one in judged])
            rng = np.random.default_rng((seed, len(curves)))
            curves[arm][sigma] = calibrate(gap, label, caption, sigma=sigma, config=losses[arm], rng=rng)
    return curves


def calibration_section(curves: Curves, name: str) -> str:
    """Markdown: what calibration is measured by, a row per arm and level, and each arm's range of best scales."""
    lines = [
        "## Calibration",
        "",
        f"On {name}, each arm by the likelihood it was trained with, pairs of all its seeds. ECE: expected calibration "
        "error in points, with its 95 % interval over captions; by chance: the ECE that exact predictions would show. "
        "NLL in nats (0.693: a coin). Best scale: what gaps would have to be multiplied by for the smallest NLL; 1 is "
        "calibrated, below 1 overconfident. A reward trained perfectly by fidelity is overconfident: it predicts "
        "q^2 / (q^2 + (1 - q)^2) where raters prefer with probability q (dashed in the picture).",
        "",
        "| arm | sigma | pairs | ECE | by chance | Brier | NLL | best scale | NLL at it |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for label, levels in curves.items():
        for sigma, found in levels.items():
            ece = f"{100 * found.error:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"
            lines.append(
                f"| {label} | {sigma:g} | {found.reliability.count.sum()} | {ece} | {100 * found.by_chance:.1f} | "
                f"{found.brier:.3f} | {found.nll:.3f} | {found.scale:.2f} | {found.scaled_nll:.3f} |"
            )
    lines += ["", *(f"- {scale_sentence(label, levels)}" for label, levels in curves.items())]
    return "\n".join(lines) + "\n"


def scale_sentence(label: str, levels: Mapping[float, Calibration]) -> str:
    """Whether one scale fits all noise levels below 1, where nothing is left: the range of the best scales."""
    found = {sigma: one.scale for sigma, one in levels.items() if sigma < 1 and 0 < one.scale < math.inf}
    if not found:
        return f"{label}: no level has a best scale."
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    return (
        f"{label}: the best scale goes from {found[low]:.2f} (sigma {low:g}) to {found[high]:.2f} (sigma {high:g}), "
        f"by a factor of {found[high] / found[low]:.1f}; 1.0 would be one scale for all levels."
    )


def plot_reliability(curves: Curves, path: Path) -> None:
    """Observed against predicted frequency, a panel per label and a curve with standard errors per sigma. Dashed: where
    a reward lies that fidelity has trained perfectly. Bins of few pairs are left out, but count in the ECE.
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
        f"each pair with the more probable picture first; bins of {FEWEST_DRAWN} pairs and more, one standard error"
    )
    save_figure(figure, path)


def _draw(axis: Axes, levels: Mapping[float, Calibration]) -> None:
    predicted = np.linspace(0.5, 1, 200)
    axis.plot(predicted, predicted, color="black", linewidth=0.8, label="exact")
    axis.plot(predicted, fidelity_rater(predicted), color="black", linewidth=0.8, linestyle="--", label="fidelity")
    for place, (sigma, found) in zip(np.linspace(0, 0.9, len(levels)), levels.items(), strict=True):
        curve, filled = found.reliability, found.reliability.count >= FEWEST_DRAWN
        axis.errorbar(
            curve.predicted[filled],
            curve.observed[filled],
            curve.standard_error[filled],
            color=colormaps["viridis"](place),
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.8,
            label=f"sigma {sigma:g}: ECE {100 * found.error:.1f}",
        )
    axis.set(xlim=(0.49, 1.01), ylim=(0.4, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
