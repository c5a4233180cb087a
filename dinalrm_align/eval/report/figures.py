"""Figures: curves of one run; curves of several runs against updates, seconds or FLOPs; grids of images."""

import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.report.entries import COLOURS, Entry, Run, phases_of, series
from dinalrm_align.eval.report.parts import PREFIX, by_main_part, part_names
from dinalrm_align.models.grids import finish_figure, load_strip
from dinalrm_align.train.files import save_figure
from dinalrm_align.train.metrics import read_metrics

CLOCKS = {"updates": "update", "time": "seconds of training", "flops": "TFLOPs of training, all phases"}
"""Horizontal axis of curves -> its label."""
GAINS = {"gold": "gold: gain over the base model", "proxy": "reward: gain in s.d. of the base model"}
METRICS = {
    "kl": "KL in training, as each recipe defines it", "drift": "held out: velocity KL to the reference",
    "level_spread": "held out: spread of noise levels", "divergence": "reward gain less gold gain, s.d.",
}  # fmt: skip
COSTS = {"seconds": "seconds", "gflops": "GFLOPs", "memory_mib": "peak MiB above the weights"}
SIZE = (5.4, 3.9)
"""Width and height of a figure in inches: small, so that its text stays legible on a narrow page."""


def plot_run(folder: Path) -> Path:
    """Plot scores, parts of gold, KL, drift, time and memory of the run in `folder`. Returns the path of curves.png."""
    rows = read_metrics(folder / "metrics.jsonl")
    run = Run(folder, 0, rows, {}, {})
    gains = dict.fromkeys(name for row in rows for name in row if f"{name}_gain" in row and name != "gold")
    further, parts = [name for name in gains if not name.startswith(PREFIX)], by_main_part(part_names(gains))
    panels = {main: [main, *components] for main, components in parts.items() if components}
    panels |= {"": alone} if (alone := [main for main in parts if main not in panels]) else {}
    lines = 2 + -(-(len(further) + len(panels)) // 3)
    figure = Figure(figsize=(13, 3.25 * lines))
    gold, proxy, training, kl, seconds, memory, *more = figure.subplots(lines, 3).flatten()
    for axis, name in zip((gold, *more), ("gold", *further)):
        axis.errorbar(*series(rows, name), yerr=series(rows, f"{name}_gain_standard_error")[1], marker="o", capsize=2)
    for axis, shown in zip(more[len(further) :], panels.values()):
        _draw_parts(axis, rows, shown)
    for axis in more[len(further) + len(panels) :]:
        axis.axis("off")
    proxy.plot(*series(rows, "proxy"), marker="o")
    for axis in (gold, proxy) if run.alarm is not None else ():
        axis.axvline(run.alarm, color="tab:red", linestyle=":", label=f"hacking alarm, update {run.alarm}")
        axis.legend()
    training.plot(*series(rows, "reward"))
    kl.plot(*series(rows, "kl"), label="velocity KL")
    kl.plot(*series(rows, "drift"), label="drift, held out", marker="o")
    kl.plot(*series(rows, "grad_norm"), label="gradient norm", alpha=0.6)
    kl.set_yscale("symlog", linthresh=1e-4)
    kl.legend()
    for axis, kind in ((seconds, "seconds"), (memory, "memory_mib")):
        for phase in phases_of([run], kind):
            steps, values = series(rows, f"{kind}/{phase}")
            axis.plot(steps, values, marker="." if len(values) < 40 else None, label=phase)
        if axis.lines:
            axis.legend()
        axis.set_ylim(bottom=0)
    titles = ["gold score, held out (bars: of the paired gain)", "reward, held out", "reward in training"]
    titles += ["distance and gradient", "seconds by phase", f"{COSTS['memory_mib']} by phase"]
    titles += [f"{name}, held out" for name in further]
    titles += [f"gold's {main or 'parts'}: gain ± standard error over prompts" for main in panels]
    for axis, title in zip(figure.axes, titles):
        axis.set(title=title, xlabel="update")
        axis.grid(alpha=0.3)
    path = folder / "curves.png"
    finish_figure(figure, path, folder.name)
    return path


def _draw_parts(axis: Axes, rows: Sequence[Mapping[str, float]], parts: Sequence[str]) -> None:
    """Draw the gains of parts of gold, each with a band of one standard error. A part with components is the first."""
    for part, colour in zip(parts, itertools.cycle(("#000000", *(one for one in COLOURS if one != "#000000")))):
        steps, gains = series(rows, f"{PREFIX}{part}_gain")
        low, high = np.array(gains) + [[-1], [1]] * np.array(series(rows, f"{PREFIX}{part}_gain_standard_error")[1])
        axis.plot(steps, gains, marker="o", markersize=4, color=colour, label=part.removeprefix(f"{parts[0]}/"))
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.legend(fontsize=8)


def draw(entries: Sequence[Entry], folder: Path) -> dict[str, dict[str, Path]]:
    """Draw each recorded quantity. Returns PNG paths by quantity and by x axis (a key of CLOCKS; "" for bar charts)."""
    comparable = [entry for entry in entries if not entry.incomparable]
    scores = dict.fromkeys(["gold", "proxy", *(name for entry in comparable for name in entry.runs[0].scores[0])])
    scores = [name for name in scores if not name.startswith(PREFIX)]  # parts stand in a table
    runs = [run for entry in entries for run in entry.runs]
    drawn = {}
    for clock in CLOCKS:
        for name in scores:
            found = [one for one in comparable if one.has(name) and (clock != "flops" or one.teraflops)]
            if any(len(entry.steps) > 1 for entry in found):
                figure = Figure(figsize=SIZE, layout="constrained")
                draw_gain(figure.subplots(), found, name, clock)
                path = folder / f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{clock}.png"
                drawn.setdefault(name, {})[clock] = save_with_legend(figure, path)
        if clock == "flops":
            continue
        for name in METRICS:
            if any(len(series(run.rows, name)[0]) > 1 for run in runs):
                path = folder / f"{name}_{clock}.png"
                drawn.setdefault(name, {})[clock] = _draw_lines(entries, {name: METRICS[name]}, clock, path)
        for kind in ("seconds", "memory_mib"):
            if panels := {f"{kind}/{phase}": phase for phase in phases_of(runs, kind)}:
                path, title = folder / f"{kind}_{clock}.png", f"{COSTS[kind]} of an update, by phase"
                drawn.setdefault(kind, {})[clock] = _draw_lines(entries, panels, clock, path, title)
    if kinds := [kind for kind in COSTS if phases_of(runs, kind)]:
        drawn["costs"] = {"": _draw_costs(entries, kinds, folder / "costs.png")}
    return drawn


def images_of(entries: Sequence[Entry], shown: int) -> tuple[list[str], list[tuple[str, np.ndarray, list[float]]]]:
    """Return the prompts and the columns of an image grid: a column for the base model, and one for the last
    evaluation of each run. A column is (title, images (N, H, W, 3) uint8, gold scores).
    """
    singles = [single for entry in entries if not entry.incomparable for single in entry.single_runs()]
    shown = min([shown, *(single.runs[0].terms["shown"] for single in singles)])

    def column(title: str, run: Run, step: int) -> tuple[str, np.ndarray, list[float]]:
        strip = load_strip(run.folder / "evaluations" / f"{step:06d}.png", run.terms["shown"])
        return title, strip[:shown], list(run.scores[step]["gold"][:shown])

    first = singles[0].runs[0]
    columns = [column("before", first, 0)]
    columns += [column(single.name, single.runs[0], single.steps[-1]) for single in singles if single.steps[-1] > 0]
    return list(first.terms["prompts"][:shown]), columns


def draw_images(prompts: Sequence[str], columns: Sequence[tuple[str, np.ndarray, list[float]]], path: Path) -> None:
    """Write an image grid as a PNG, with a row for each prompt. `prompts`, `columns`: as `images_of` returns them."""
    _, height, width, _ = columns[0][1].shape
    gap = max(2, width // 32)
    cells = [np.pad(strip, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=255) for _, strip, _ in columns]
    pixels = np.concatenate([np.concatenate(list(cell), axis=0) for cell in cells], axis=1)
    left, top, cell = 2.3, 0.7, 1.15  # inches
    size = left + cell * len(columns), top + cell * len(prompts) * height / width
    figure = Figure(figsize=size)
    axis = figure.add_axes((left / size[0], 0, 1 - left / size[0], 1 - top / size[1]))
    axis.imshow(pixels, aspect="auto")
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
    """Draw each entry's gain in the score `name`: the mean as a line, and the confidence interval as a band. If an
    entry has several runs, each run is also drawn as a thin line. A cross marks each run's reward-hacking alarm.
    """
    for entry in entries:
        for run in entry.runs if len(entry.runs) > 1 else []:
            steps = sorted(run.scores)
            ys = [float(run.gain(name, step).mean()) for step in steps]
            axis.plot(entry.at(clock, steps, run), ys, entry.dash, color=entry.colour, alpha=0.45, linewidth=0.7)
        xs, found = entry.at(clock, entry.steps), [entry.gain(name, step) for step in entry.steps]
        _line(axis, entry, xs, [one.mean for one in found], marker="o")
        axis.fill_between(xs, [one.low for one in found], [one.high for one in found], color=entry.colour, alpha=0.12)
        for run in entry.runs:
            if run.alarm in run.scores:
                at = entry.at(clock, [run.alarm], run)[0], float(run.gain(name, run.alarm).mean())
                axis.plot(*at, "X", color=entry.colour, markersize=13, markeredgecolor="white")
                label = axis.annotate(f"alarm, update {run.alarm}", at, (9, -3), textcoords="offset points", fontsize=8)
                label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    title = GAINS.get(name, f"second evaluator {name.removeprefix('gold/')}: gain in s.d. of the base model")
    _finish_axis(axis, title, clock)


def _draw_lines(entries: Sequence[Entry], panels: dict[str, str], clock: str, path: Path, title: str = "") -> Path:
    """Draw a panel for each metric, with a line for each run that recorded it. `panels`: title by metric."""
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(SIZE[0], 1.9 * rows + 0.7) if title else SIZE, layout="constrained")
    axes = figure.subplots(rows, 2 if title else 1, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.axis("off")
    for axis, (name, heading) in zip(axes, panels.items()):
        for entry in entries:
            for run in entry.runs:
                steps, values = series(run.rows, name)
                if steps:
                    _line(axis, entry, entry.at(clock, steps, run), values, marker="." if len(steps) < 20 else None)
        _finish_axis(axis, heading, clock)
        if name in ("kl", "drift"):
            axis.set_yscale("symlog", linthresh=1e-3)
        if name not in ("level_spread", "divergence"):
            axis.set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    return save_with_legend(figure, path)


def _draw_costs(entries: Sequence[Entry], kinds: Sequence[str], path: Path) -> Path:
    """Draw the average cost of an update by phase as bars, with one panel for each kind of cost."""
    figure = Figure(figsize=(3.6 * len(kinds), SIZE[1]), layout="constrained")
    width = 0.8 / len(entries)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False).flatten(), kinds):
        phases = phases_of([run for entry in entries for run in entry.runs], kind)
        for index, entry in enumerate(entries):
            values = [entry.cost(kind).get(phase, 0.0) for phase in phases]
            at = np.arange(len(phases)) + index * width
            bars = axis.bar(at, values, width, color=entry.colour, label=entry.legend)
            if len(entries) <= 3:
                axis.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=6)
        axis.set_xticks(np.arange(len(phases)) + 0.4 - width / 2, phases, fontsize=8)
        axis.set_title(f"{COSTS[kind]} of an update", fontsize=10)
    return save_with_legend(figure, path)


def _line(axis: Axes, entry: Entry, xs: Sequence[float], ys: Sequence[float], *, marker: str | None) -> None:
    axis.plot(xs, ys, entry.dash, color=entry.colour, marker=marker, markersize=4, linewidth=1.4, label=entry.legend)


def _finish_axis(axis: Axes, title: str, clock: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(CLOCKS[clock])
    axis.grid(alpha=0.3)


def save_with_legend(figure: Figure, path: Path) -> Path:
    """Save the figure with one legend below all panels. Returns the path of the saved file."""
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    layout = dict(loc="outside lower center", ncols=max(1, min(3, 66 // max(map(len, handles)))))
    figure.legend(handles.values(), handles.keys(), **layout, fontsize=8, frameon=False)
    save_figure(figure, path, dpi=140)
    return path
