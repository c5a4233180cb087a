"""Curves of runs side by side, against updates and against time, and their pictures on the same prompts and noise."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.report.entries import Entry, groups_of
from dinalrm_align.eval.report.groups import series
from dinalrm_align.eval.report.intervals import seeds_by_captions
from dinalrm_align.models.grids import load_strip
from dinalrm_align.train.figures import save_figure

CLOCKS = {"updates": "update", "time": "seconds of training"}
"""What curves are drawn against, and what the axis is called."""
GAINS = {"gold": "gold: gain over the base model", "proxy": "reward: gain in s.d. of the base model"}
SIZE = (5.4, 3.9)
"""Inches of a figure: small, so that its letters are large on a narrow page."""


def draw(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, Path]]:
    """Write the curves' PNGs: what is drawn -> clock -> its file. What no run measured is not drawn."""
    paired = [entry for entry in entries if not entry.apart]
    judged = list(dict.fromkeys(["gold", "proxy", *(name for entry in paired for name in entry.run.scores[0])]))
    others = ("kl", "drift", "level_spread", "divergence")
    drawn = {}
    for clock in CLOCKS:
        for name in judged:
            found = [entry for entry in paired if all(name in scores for scores in entry.run.scores.values())]
            if any(len(entry.steps) > 1 for entry in found):
                figure = Figure(figsize=SIZE, layout="constrained")
                draw_gain(figure.subplots(), found, name, clock)
                path = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{clock}.png"
                drawn.setdefault(name, {})[clock] = save_with_legend(figure, path)
        for name in others:
            found = [entry for entry in entries if len(series(entry.run.rows, name)[0]) > 1]
            if found:
                drawn.setdefault(name, {})[clock] = _draw_metric(found, name, clock, folder)
        for kind in ("seconds", "memory_mib"):
            if phases := phases_of(entries, kind):
                drawn.setdefault(kind, {})[clock] = _draw_phases(entries, kind, phases, clock, folder)
    return drawn


def phases_of(entries: Sequence[Entry], kind: str) -> list[str]:
    """Names of phases of which some run measured this, in the order in which they are met."""
    names = dict.fromkeys(name for entry in entries for row in entry.run.rows for name in row)
    return [name.removeprefix(f"{kind}/") for name in names if name.startswith(f"{kind}/")]


def pictures(entries: Sequence[Entry], shown: int) -> tuple[list[str], list[tuple[str, np.ndarray, list[float]]]]:
    """Prompts, and columns (title, pictures (N, H, W, 3) uint8, gold scores): the base model, then the last of each."""
    paired = [entry for entry in entries if not entry.apart]
    shown = min([shown, *(entry.run.terms["shown"] for entry in paired)])

    def column(title: str, entry: Entry, step: int) -> tuple[str, np.ndarray, list[float]]:
        strip = load_strip(entry.run.folder / "evaluations" / f"{step:06d}.png", entry.run.terms["shown"])
        return title, strip[:shown], list(entry.run.scores[step]["gold"][:shown])

    columns = [column("before", paired[0], 0)]
    columns += [column(entry.label, entry, entry.steps[-1]) for entry in paired if entry.steps[-1] > 0]
    return list(paired[0].run.terms["prompts"][:shown]), columns


def draw_pictures(prompts: Sequence[str], columns: Sequence[tuple[str, np.ndarray, list[float]]], path: Path) -> None:
    """One PNG: a row per prompt, a column per run."""
    _, height, width, _ = columns[0][1].shape
    gap = max(2, width // 32)
    cells = [np.pad(strip, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for _, strip, _ in columns]
    picture = np.concatenate([np.concatenate(list(cell), axis=0) for cell in cells], axis=1)
    left, top, cell = 2.3, 0.7, 1.15  # inches
    size = left + cell * len(columns), top + cell * len(prompts) * height / width
    figure = Figure(figsize=size)
    axis = figure.add_axes((left / size[0], 0, 1 - left / size[0], 1 - top / size[1]))
    axis.imshow(picture, aspect="auto")
    axis.xaxis.tick_top()
    across = [(width + gap) * index + width / 2 for index in range(len(columns))]
    down = [(height + gap) * index + height / 2 for index in range(len(prompts))]
    axis.set_xticks(across, [textwrap.fill(title, 16) for title, _, _ in columns], fontsize=7)
    axis.set_yticks(down, [textwrap.fill(prompt, 28) for prompt in prompts], fontsize=7)
    axis.tick_params(length=0)
    for text in (*axis.get_xticklabels(), *axis.get_yticklabels()):
        text.set_parse_math(False)
    axis.spines[:].set_visible(False)
    save_figure(figure, path)


def draw_gain(axis: Axes, entries: Sequence[Entry], name: str, clock: str) -> None:
    """Gains of "gold", "proxy" or another judge on an axis, the first alarm of a run marked. Of one run with the
    interval over captions; of several seeds their mean, the interval over both, and thin the runs.
    """
    for group in groups_of(entries):
        members = [entry for entry in entries if entry.group == group.label]
        first, several = members[0], len(members) > 1
        for entry in members if several else []:
            ys = [float(entry.run.gain(name, step).mean()) for step in entry.steps]
            axis.plot(entry.at(clock, entry.steps), ys, first.dash, color=first.colour, alpha=0.45, linewidth=0.7)
        xs = group.steps if clock == "updates" else [group.seconds_at(step) for step in group.steps]
        found = [seeds_by_captions(group.gains(name, step)) for step in group.steps]
        _line(axis, first, xs, [one.mean for one in found], marker="o", seeds=len(members))
        axis.fill_between(xs, [one.low for one in found], [one.high for one in found], color=first.colour, alpha=0.12)
        for entry in members:
            if entry.alarm is not None and entry.alarm in entry.steps:
                at = entry.at(clock, [entry.alarm])[0], float(entry.run.gain(name, entry.alarm).mean())
                axis.plot(*at, "X", color=first.colour, markersize=13, markeredgecolor="white")
                label = axis.annotate(
                    f"alarm, update {entry.alarm}", at, (9, -3), textcoords="offset points", fontsize=8
                )
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    judge = name.removeprefix("gold/")
    axis.set_title(GAINS.get(name, f"{judge} as a judge: gain in s.d. of the base model"), fontsize=10)
    axis.set_xlabel(CLOCKS[clock])
    axis.grid(alpha=0.3)


def _draw_metric(entries: Sequence[Entry], name: str, clock: str, folder: Path) -> Path:
    titles = {
        "kl": "KL in training, as each recipe defines it", "drift": "held out: velocity KL to the reference",
        "level_spread": "held out: spread of noise levels", "divergence": "reward gain less gold gain, s.d.",
    }  # fmt: skip
    figure = Figure(figsize=SIZE, layout="constrained")
    axis = figure.subplots()
    _lines(axis, entries, name, clock)
    axis.set_title(titles[name], fontsize=10)
    axis.set_xlabel(CLOCKS[clock])
    axis.grid(alpha=0.3)
    if name in ("kl", "drift"):
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_ylim(bottom=0)
    return save_with_legend(figure, folder / f"{name}_{clock}.png")


def _draw_phases(entries: Sequence[Entry], kind: str, phases: Sequence[str], clock: str, folder: Path) -> Path:
    rows = -(-len(phases) // 2)
    figure = Figure(figsize=(SIZE[0], 1.9 * rows + 0.7), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flatten()
    for axis in axes[len(phases) :]:
        axis.axis("off")
    for axis, phase in zip(axes, phases):
        _lines(axis, entries, f"{kind}/{phase}", clock)
        axis.set_title(phase, fontsize=9)
        axis.set_xlabel(CLOCKS[clock])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    titles = {"seconds": "seconds of an update, by phase", "memory_mib": "peak MiB above the weights, by phase"}
    figure.suptitle(titles[kind], fontsize=10)
    return save_with_legend(figure, folder / f"{kind}_{clock}.png")


def _lines(axis: Axes, entries: Sequence[Entry], name: str, clock: str) -> None:
    """A metric of every run that recorded it, as it was recorded."""
    for entry in entries:
        steps, values = series(entry.run.rows, name)
        if steps:
            seeds = sum(other.group == entry.group for other in entries)
            _line(axis, entry, entry.at(clock, steps), values, marker="." if len(steps) < 20 else None, seeds=seeds)


def _line(
    axis: Axes, entry: Entry, xs: Sequence[float], ys: Sequence[float], *, marker: str | None, seeds: int
) -> None:
    label = f"{entry.group}, {seeds} seeds" if seeds > 1 else entry.label
    axis.plot(xs, ys, entry.dash, color=entry.colour, marker=marker, markersize=4, linewidth=1.4, label=label)


def save_with_legend(figure: Figure, path: Path) -> Path:
    """With one legend below for all axes."""
    lines = {label: line for axis in figure.axes for line, label in zip(*axis.get_legend_handles_labels())}
    columns = max(1, min(3, 66 // max(map(len, lines))))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    save_figure(figure, path, dpi=140)
    return path
