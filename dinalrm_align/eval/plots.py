"""Plots of evaluations: accuracy at each sigma, gain over sigma 0.4, and reliability."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.ablation import (
    SINGLE_LEVEL,
    Evidence,
    accuracy_at,
    arm_mean,
    gain_over_single,
    inference_measures,
    main_sets,
)
from dinalrm_align.eval.calibration import Calibration, fidelity_rater
from dinalrm_align.train.files import save_figure

FEWEST_PLOTTED = 10  # bins with fewer pairs are not plotted


def panels(
    titles: Sequence[str], size: tuple[float, float], x: str, y: str, *, columns: int = 0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Create a figure with one panel of `size` inches for each title. `columns`: panels per row; 0 means one row."""
    columns = min(columns or len(titles), len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey).flatten()
    for axis, title in zip(axes, titles, strict=False):
        axis.set(title=title, xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
    for axis in axes[len(titles) :]:
        axis.set_visible(False)
    return figure, list(axes[: len(titles)])


def draw_band(axis: Axes, sigmas: Sequence[float], points: Sequence[tuple[float, float, float]], label: str) -> None:
    """Plot accuracies in per cent, with their intervals as a band. `points`: (value, low, high) as fractions."""
    value, low, high = (100 * np.array(column) for column in zip(*points, strict=True))
    (line,) = axis.plot(sigmas, value, marker="o", markersize=3, label=label)
    axis.fill_between(sigmas, low, high, alpha=0.15, color=line.get_color(), linewidth=0)


def plot_arms(evidence: Evidence, arms: Sequence[str], path: Path, *, title: str) -> None:
    """Plot accuracy against sigma, with a panel for each main test set and a curve with a band for each variant."""
    figure, axes = panels(main_sets(evidence.sets), (5.5, 4.4), "noise level sigma", "pairwise accuracy, per cent")
    for axis, name in zip(axes, main_sets(evidence.sets), strict=True):
        for arm in (arm for arm in arms if arm in evidence.runs):
            found = [arm_mean(evidence, arm, name, accuracy_at(sigma)) for sigma in evidence.sigmas]
            seeds = len(evidence.runs[arm])
            label = f"{arm} ({seeds} seed{'s' if seeds > 1 else ''})"
            draw_band(axis, evidence.sigmas, [(point.mean, point.low, point.high) for point in found], label)
        axis.legend(fontsize=8)
    figure.suptitle(f"{title} (bands: 95 % over seeds and captions, unpaired)")
    save_figure(figure, path)


def plot_inference(evidence: Evidence, arm: str, path: Path) -> None:
    """Plot the accuracy at each choice of noise levels minus the accuracy at sigma 0.4, in a panel per test set."""
    by_set = {name: inference_measures(evidence, arm, name) for name in evidence.sets}
    labels = list(dict.fromkeys(label for measures in by_set.values() for label in measures))
    size = 4.5 + 2 / len(by_set), 0.26 * len(labels) + 1.4
    figure, axes = panels(evidence.sets, size, f"points of accuracy, minus sigma {SINGLE_LEVEL:g}", "", sharey=True)
    for axis, (name, measures) in zip(axes, by_set.items(), strict=True):
        for label, measure in measures.items():
            gain = gain_over_single(evidence, arm, name, measure)
            reach = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
            colour = "C1" if "tokens" in label else "C2" if "average" in label else "C0"
            at = [100 * gain.mean], [labels.index(label)]
            axis.errorbar(*at, xerr=reach, marker="o", markersize=4, capsize=2, color=colour)
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(f"noise levels at inference ({arm}, {len(evidence.runs[arm])} seeds; paired, 95 %)")
    save_figure(figure, path)


def plot_reliability(curves: Mapping[str, Mapping[float, Calibration]], path: Path) -> None:
    """Plot observed against predicted frequency, with a panel for each reward variant and a curve for each noise level.

    Error bars are standard errors. The dashed line shows a reward at the optimum of the fidelity loss. Bins with fewer
    than 10 pairs are not plotted, but count in the expected calibration error (ECE).
    """
    figure, axes = panels([*curves], (6, 4.4), "predicted P(preferred)", "observed frequency", columns=2)
    predicted = np.linspace(0.5, 1, 200)
    for axis, levels in zip(axes, curves.values(), strict=True):
        axis.plot(predicted, predicted, color="black", linewidth=0.8, label="exact")
        axis.plot(predicted, fidelity_rater(predicted), color="black", linewidth=0.8, linestyle="--", label="fidelity")
        for shade, (sigma, found) in zip(np.linspace(0, 0.9, len(levels)), levels.items(), strict=True):
            curve, filled = found.reliability, found.reliability.count >= FEWEST_PLOTTED
            points = [column[filled] for column in (curve.predicted, curve.observed, curve.standard_error)]
            style = dict(color=colormaps["viridis"](shade), marker="o", markersize=3, linewidth=1.2, elinewidth=0.8)
            axis.errorbar(*points, **style, label=f"sigma {sigma:g}: ECE {100 * curve.error:.1f}")
        axis.set(xlim=(0.49, 1.01), ylim=(0.4, 1.02))
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.suptitle(
        f"each pair with the more probable image first; bins of at least {FEWEST_PLOTTED} pairs, one standard error"
    )
    save_figure(figure, path)
