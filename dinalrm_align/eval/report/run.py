"""Pictures of runs: grids of samples, before beside after, the curves of one run, groups of seeds in one figure.

    python -m dinalrm_align.eval.report.run runs/refl_shapes_dinalrm_seed0
    python -m dinalrm_align.eval.report.run --group dinalrm runs/*dinalrm_seed* --group pixel runs/*pixel_seed*

Everything is read from what a run leaves in its folder (metrics.jsonl, evaluations/), so that figures can be made
again. Runs of any recipes on one page: `recipes/compare_runs.py`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.report.groups import PHASES, Group, read_groups, series, table
from dinalrm_align.eval.report.intervals import Interval, seeds_by_captions
from dinalrm_align.models.grids import finish_figure
from dinalrm_align.train.command import refusing
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.files import make_folder
from dinalrm_align.train.metrics import read_metrics


def plot_run(run: Path) -> Path:
    """curves.png of one run: scores held out and in training, the first alarm of the hacking watch, KL, drift, gradient
    norm, seconds and memory by phase.
    """
    rows = read_metrics(run / "metrics.jsonl")
    figure = Figure(figsize=(13, 6.5))
    gold, proxy, training, kl, seconds, memory = figure.subplots(2, 3).flatten()
    gold.errorbar(*series(rows, "gold"), yerr=series(rows, "gold_gain_standard_error")[1], marker="o", capsize=2)
    gold.set_title("gold score, held out (bars: of the paired gain)")
    proxy.plot(*series(rows, "proxy"), marker="o")
    proxy.set_title("reward, held out")
    alarm = next((step for step, hacked in zip(*series(rows, "hacking")) if hacked), None)
    for axis in (gold, proxy) if alarm is not None else ():
        axis.axvline(alarm, color="tab:red", linestyle=":", label=f"hacking alarm, update {alarm}")
        axis.legend()
    training.plot(*series(rows, "reward"))
    training.set_title("reward in training")
    kl.plot(*series(rows, "kl"), label="velocity KL")
    kl.plot(*series(rows, "drift"), label="drift, held out", marker="o")
    kl.plot(*series(rows, "grad_norm"), label="gradient norm", alpha=0.6)
    kl.set_yscale("symlog", linthresh=1e-4)
    kl.legend()
    kl.set_title("distance and gradient")
    for axis, kind, unit in ((seconds, "seconds", "seconds"), (memory, "memory_mib", "peak MiB above weights")):
        for phase in PHASES:
            steps, values = series(rows, f"{kind}/{phase}")
            if values:
                axis.plot(steps, values, marker="." if len(values) < 40 else None, label=phase)
        if axis.lines:
            axis.legend()
        axis.set_ylim(bottom=0)
        axis.set_title(f"{unit} by phase")
    for axis in figure.axes:
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
    path = run / "curves.png"
    finish_figure(figure, path, run.name)
    return path


def compare(groups: Sequence[Group], path: Path) -> None:
    """Groups in one PNG. Above, gold gain against updates, seconds of training and FLOPs; below, the gain of the reward
    that is climbed, and what an update costs, phase by phase.

    Curves are means over seeds with their 95 % interval over seeds and captions. FLOPs are those of all phases, the
    mean of the profiled updates times the number of updates; a group without profiled updates has no such curve.
    """
    figure = Figure(figsize=(16, 8))
    grid = figure.add_gridspec(2, 12)
    gold = [figure.add_subplot(grid[0, start : start + 4]) for start in (0, 4, 8)]
    proxy, *costs = (figure.add_subplot(grid[1, start : start + 3]) for start in (0, 3, 6, 9))
    for group in groups:
        steps = group.steps
        gain = [seeds_by_captions(group.gains("gold", step)) for step in steps]
        teraflops = sum(group.cost("gflops").values()) / 1000
        for axis, xs in zip(gold, (steps, [group.seconds_at(step) for step in steps], [n * teraflops for n in steps])):
            if xs[-1] > 0:
                _curve(axis, xs, gain, group)
        _curve(proxy, steps, [seeds_by_captions(group.gains("proxy", step)) for step in steps], group)
    for axis, unit in zip(gold, ("update", "seconds of training", "TFLOPs of training, all phases")):
        axis.set_title("gold: gain over the base model")
        axis.set_xlabel(unit)
    proxy.set_title("reward: gain in s.d. of the base model")
    proxy.set_xlabel("update")
    titles = {"seconds": "seconds", "gflops": "GFLOPs", "memory_mib": "peak MiB above weights"}
    for axis, (kind, title) in zip(costs, titles.items()):
        _bars(axis, {group.label: group.cost(kind) for group in groups})
        axis.set_title(f"{title} of an update")
    for axis in (*gold, proxy, *costs):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
        else:
            axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
    finish_figure(figure, path, "means over seeds; bands: 95 % intervals over seeds and captions")


def _curve(axis: Axes, xs: Sequence[float], intervals: Sequence[Interval], group: Group) -> None:
    seeds = f"{len(group.runs)} seeds" if len(group.runs) > 1 else "1 seed"
    (line,) = axis.plot(xs, [one.mean for one in intervals], marker="o", label=f"{group.label}, {seeds}")
    low, high = [one.low for one in intervals], [one.high for one in intervals]
    axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.15)


def _bars(axis: Axes, costs: dict[str, dict[str, float]]) -> None:
    """Label -> phase -> number, as groups of bars."""
    phases = [phase for phase in PHASES if any(phase in cost for cost in costs.values())]
    width = 0.8 / len(costs)
    for index, (label, cost) in enumerate(costs.items()):
        values = [cost.get(phase, 0.0) for phase in phases]
        bars = axis.bar(np.arange(len(phases)) + index * width, values, width, label=label)
        axis.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=6)
    axis.set_xticks(np.arange(len(phases)) + 0.4 - width / 2, phases, fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the curves of one run, or compare groups of seeds: a PNG, and its numbers in a markdown table beside it."""
    parser = argparse.ArgumentParser(prog="python -m dinalrm_align.eval.report.run", description=main.__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a run, to draw its curves")
    parser.add_argument(
        "--group", nargs="+", action="append", default=[], metavar=("LABEL", "RUN"),
        help="instead: a label and the folders of its runs, one per seed; give it once per label",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("compare.png"), help="PNG of the comparison")
    parser.add_argument("--command", action="append", default=[], help="a line to append to the table; repeatable")
    arguments = parser.parse_args(argv)
    if bool(arguments.run) == bool(arguments.group):
        parser.error("give the folder of one run, or --group LABEL RUN [RUN ...] for each label")
    folders: dict[str, list[Path]] = {}
    for label, *runs in arguments.group:
        if label in folders or not runs:
            parser.error(f"--group {label}: expected each label once, and after it at least one run folder")
        folders[label] = [Path(run) for run in runs]
    given = [arguments.run] if arguments.run else [run for runs in folders.values() for run in runs]
    absent = [str(run) for run in given if not (run / "metrics.jsonl").exists()]
    if absent:
        parser.error(f"not a run folder (no metrics.jsonl): {', '.join(absent)}")
    if arguments.output.suffix != ".png":
        parser.error(f"argument --output: got {arguments.output}; expected the name of a .png")
    with refusing():
        if arguments.run:
            print(plot_run(arguments.run))
            return
        groups = read_groups(folders)
        make_folder(arguments.output.parent)
        compare(groups, arguments.output)
        written = arguments.output.with_suffix(".md")
        write_atomically(written, table(groups, arguments.command))
        print(f"{arguments.output}\n{written}")


if __name__ == "__main__":
    main()
