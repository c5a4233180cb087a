"""Figures of an ablation: accuracy against sigma per arm, noise levels at inference, variance over noise draws."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.ablation import Evidence, accuracy_at, arm_accuracy
from dinalrm_align.eval.inference import SINGLE_LEVEL, NoiseShare, gain_over_single, inference_measures
from dinalrm_align.train.files import save_figure


def plot_arms(evidence: Evidence, arms: Sequence[str], path: Path, *, title: str) -> None:
    """Accuracy against the noise level: a panel per set, a curve with its 95 % interval per arm."""
    figure = Figure(figsize=(5.5 * len(evidence.sets), 4.4), layout="constrained")
    panels = figure.subplots(1, len(evidence.sets), squeeze=False)[0]
    for axis, name in zip(panels, evidence.sets, strict=True):
        for index, arm in enumerate(arm for arm in arms if arm in evidence.runs):
            points = [arm_accuracy(evidence, arm, name, accuracy_at(sigma)) for sigma in evidence.sigmas]
            seeds = len(evidence.runs[arm])
            label = f"{arm} ({seeds} seed{'s' if seeds > 1 else ''})"
            axis.plot(evidence.sigmas, [100 * point.mean for point in points], marker="o", markersize=3, label=label)
            low, high = [100 * point.low for point in points], [100 * point.high for point in points]
            axis.fill_between(evidence.sigmas, low, high, alpha=0.12, color=f"C{index}", linewidth=0)
        _label(axis, name, "noise level sigma", "pairwise accuracy, per cent")
        axis.legend(fontsize=8)
    figure.suptitle(f"{title} (bands: 95 % over seeds and captions, unpaired)")
    save_figure(figure, path)


def plot_inference(evidence: Evidence, arm: str, path: Path) -> None:
    """Paired difference of each choice of noise levels to the single level, for one arm: a panel per set."""
    by_set = {name: inference_measures(evidence, arm, name) for name in evidence.sets}
    labels = list(dict.fromkeys(label for measures in by_set.values() for label in measures))
    figure = Figure(figsize=(4.5 * len(evidence.sets) + 2, 0.26 * len(labels) + 1.4), layout="constrained")
    panels = figure.subplots(1, len(evidence.sets), sharey=True, squeeze=False)[0]
    for axis, (name, measures) in zip(panels, by_set.items(), strict=True):
        for row, label in enumerate(labels):
            if label in measures:
                gain = gain_over_single(evidence, arm, name, measures[label])
                reach = [[100 * (gain.mean - gain.low)], [100 * (gain.high - gain.mean)]]
                colour = "C1" if "tokens" in label else "C2" if "average" in label else "C0"
                axis.errorbar([100 * gain.mean], [row], xerr=reach, marker="o", markersize=4, capsize=2, color=colour)
        axis.axvline(0, color="grey", linewidth=0.8)
        _label(axis, name, f"points of accuracy, minus sigma {SINGLE_LEVEL:g}", "")
        axis.set_yticks(range(len(labels)), labels, fontsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(f"noise levels at inference ({arm}, {len(evidence.runs[arm])} seeds; paired, 95 %)")
    save_figure(figure, path)


def plot_noise_shares(shares: Sequence[NoiseShare], path: Path) -> None:
    """Variance over noise draws against backbone forwards per score, with 1 / K for independent draws."""
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axis = figure.add_subplot()
    for index, label in enumerate(dict.fromkeys(row.label for row in shares)):
        rows = [row for row in shares if row.label == label]
        marker = "o-" if len(rows) > 1 else "D"
        axis.plot([row.forwards for row in rows], [row.share for row in rows], marker, color=f"C{index}", label=label)
    counts = sorted({row.forwards for row in shares})
    axis.plot(counts, [shares[0].share / count for count in counts], "k:", linewidth=1, label="1 / K")
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(counts, map(str, counts))
    axis.minorticks_off()
    _label(axis, "variance over noise draws / variance over images", "backbone forwards per score", "share")
    axis.legend(fontsize=8)
    save_figure(figure, path)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
