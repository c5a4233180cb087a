"""Curves and tables of gold and of its parts, for the scripts beside this module. An entry: several seeds of a run."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from _estimates import Ratio, at_drift, ratio_interval
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dinalrm_align.eval.report.entries import Entry, Run, series
from dinalrm_align.eval.report.figures import CLOCKS, save_with_legend
from dinalrm_align.eval.report.intervals import Interval, seeds_by_captions
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.report.parts import PREFIX, part_names
from dinalrm_align.shapes.scene import parse_caption

AXES = {**CLOCKS, "drift": "drift: mean squared velocity difference to the base model"}
"""What a gain is drawn against -> label."""
KINDS = ("one object", "pair", "identical objects")
"""Kinds of captions: one object, two in a relation, or several identical ones."""
HOW_TO_READ = (
    "Gains are over the base model, paired by caption and noise. Brackets and bands are 95 % intervals over seeds and "
    "captions (crossed random effects); with one seed, over captions only, and variance between seeds is unknown. "
    "'Smallest effect': the smallest true value that these seeds and captions would separate from 0 in 80 % of "
    "repetitions, two-sided at 5 %; a difference that is not separated says nothing about effects below it. "
    "Drift is the mean squared difference of the policy's and the base model's velocities at two noise levels of the "
    "policy's own held-out samples. Seconds are of training, without evaluations, with whatever else ran beside it."
)


def names_of(entries: Sequence[Entry]) -> list[str]:
    """Return "gold" and the names of its parts that all entries have, as in `Run.scores`."""
    parts = part_names(name for entry in entries for name in entry.runs[0].scores[0])
    return ["gold", *(f"{PREFIX}{part}" for part in parts if all(entry.has(f"{PREFIX}{part}") for entry in entries))]


def label(name: str) -> str:
    return name.removeprefix(PREFIX)


def main_parts(names: Sequence[str]) -> list[str]:
    """Return "gold" and its main parts, without their components."""
    return [name for name in names if "/" not in label(name)]


def drift_curve(run: Run) -> tuple[list[int], list[float]]:
    """Return the evaluated updates of a run, and its drift at them. Raises ValueError if drift was not measured."""
    found = {int(step): value for step, value in zip(*series(run.rows, "drift")) if int(step) in run.scores}
    if found.keys() != run.scores.keys():
        raise ValueError(f"{run.folder}: got drift at {len(found)} of {len(run.scores)} evaluations; expected at all")
    return list(found), list(found.values())


def gain_at_drift(run: Run, name: str, drift: float) -> np.ndarray:
    """Return the gain in the score `name` for each caption, (C,), where the run first reaches the drift."""
    steps, drifts = drift_curve(run)
    return at_drift(drifts, np.stack([run.gain(name, step) for step in steps]), drift)


def paired(first: Entry, second: Entry, gain: Callable[[Run], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return gain(run), (C,), of each run of both entries, as two tables (S, C) of the seeds that both have."""
    others = {run.seed: run for run in second.runs}
    shared = [(run, others[run.seed]) for run in first.runs if run.seed in others]
    if not shared:
        raise ValueError(f"{first.name} and {second.name}: got no seed in common; expected at least one")
    return np.stack([gain(run) for run, _ in shared]), np.stack([gain(run) for _, run in shared])


def share_of(entry: Entry, oracle: Entry, gain: Callable[[Run], np.ndarray]) -> Ratio:
    """Return gain(run) of an entry as a share of the oracle's, with its interval, over the seeds that both have."""
    return ratio_interval(*paired(entry, oracle, gain))


def smallest_effect(interval: Interval) -> str:
    """Format the smallest detectable effect; with one seed, the variance between seeds is unknown."""
    return "one seed" if math.isnan(interval.detectable) else f"{interval.detectable:.3f}"


def gains_of(entry: Entry, step: int | None = None) -> dict[str, dict[str, float]]:
    """Return the gains of gold, of its parts and of the training reward at an update, the last by default."""
    step = entry.steps[-1] if step is None else step
    return {label(name): vars(entry.gain(name, step)) for name in (*names_of([entry]), "proxy")}


def mean_drift(entry: Entry) -> list[float]:
    """Return the drift at each of `entry.steps`, averaged over seeds."""
    curves = [dict(zip(*drift_curve(run))) for run in entry.runs]
    return [float(np.mean([curve[step] for curve in curves])) for step in entry.steps]


def base_levels(entry: Entry) -> str:
    """Return the base model's mean gold and parts on the captions of the evaluations, in a sentence."""
    scores = entry.runs[0].scores[0]
    levels = ", ".join(f"{label(name)} {scores[name].mean():.3f}" for name in names_of([entry]))
    guidance = entry.runs[0].terms.get("guidance_scale")
    return f"The base model at guidance {guidance:g}, {len(scores['gold'])} samples: {levels}."


def gain_table(entries: Sequence[Entry]) -> str:
    """Return a Markdown table: a row for each entry, with its last gains, its drift and what it could have shown."""
    names = main_parts(names_of(entries))
    head = ["", "seeds", "updates", *(f"{label(name)} [95 %]" for name in names), "smallest effect on gold", "drift"]
    rows = []
    for entry in entries:
        last = entry.steps[-1]
        gains = [entry.gain(name, last) for name in names]
        cells = [one.brief for one in gains]
        drift = mean_drift(entry)[-1]
        rows.append([entry.name, str(len(entry.runs)), str(last), *cells, smallest_effect(gains[0]), f"{drift:.4f}"])
    return table(head, rows)


def part_table(entries: Sequence[Entry]) -> str:
    """Return a Markdown table: a row for gold and for each of its parts, with the last gain of every entry."""
    names = [name for name in names_of(entries) if entries]
    rows = [[label(name), *(entry.gain(name, entry.steps[-1]).brief for entry in entries)] for name in names]
    return table(["", *(entry.name for entry in entries)], rows)


def kind_of(caption: str) -> str:
    """Return the kind of a caption of the embedded world, one of KINDS."""
    scene = parse_caption(caption)
    return KINDS[1 if scene.relation else 2 if len(scene.items) > 1 else 0]


def by_kind(entry: Entry) -> dict[str, np.ndarray]:
    """Return a mask of the captions, (C,), in the order of `Run.gain`, for each kind with at least two captions."""
    kinds = np.array([kind_of(caption) for caption in np.unique(entry.runs[0].terms["prompts"])])
    return {kind: kinds == kind for kind in KINDS if (kinds == kind).sum() > 1}


def kind_table(entries: Sequence[Entry], names: Sequence[str] | None = None) -> str:
    """Return a Markdown section: the last gains in the scores `names`, by the kind of caption (`kind_of`).

    names: by default gold and its main parts. A kind's intervals are over seeds and this kind's captions; a kind with
    one caption has no row. The section is empty if the model is not `shapes`.
    """
    if entries[0].runs[0].terms["model"] != "shapes":
        return ""
    names, rows = names or main_parts(names_of(entries)), []
    for entry in entries:
        gains = {name: np.stack([run.gain(name, entry.steps[-1]) for run in entry.runs]) for name in names}
        for kind, own in by_kind(entry).items():
            cells = [seeds_by_captions(gains[name][:, own]).brief for name in names]
            rows.append([entry.name, kind, str(own.sum()), *cells])
    head = ["", "kind", "captions", *(f"{label(name)} [95 %]" for name in names)]
    note = "A pair is two objects in a relation. Intervals are not adjusted for the number of gains."
    guidance = entries[0].runs[0].terms["guidance_scale"]
    return f"## By kind of caption, last update, guidance {guidance:g}\n\n{note}\n\n{table(head, rows)}"


def draw_curves(entries: Sequence[Entry], folder: Path, extra: Sequence[str] = ()) -> list[Path]:
    """Draw gold, each of its parts and the scores `extra` against every one of AXES. Returns a PNG for each score."""
    paths = []
    for name in (*names_of(entries), *extra):
        axes = {key: text for key, text in AXES.items() if key != "flops" or any(entry.teraflops for entry in entries)}
        figure = Figure(figsize=(10.6, 7.4), layout="constrained")
        for axis, (key, text) in zip(figure.subplots(2, 2).flatten(), axes.items()):
            for entry in entries:
                draw_entry(axis, entry, name, key)
            finish(axis, text)
        for axis in figure.axes[len(axes) :]:
            axis.axis("off")
        unit = "s.d. of the base model" if name in extra else "gain over the base model"
        figure.suptitle(f"{label(name)}, {unit}, 95 % over seeds and captions", fontsize=10)
        paths.append(save_with_legend(figure, folder / f"{label(name).replace('/', '_')}.png"))
    return paths


def draw_entry(axis: Axes, entry: Entry, name: str, against: str) -> None:
    """Draw an entry's mean gain with its band, and a cross at each run's alarm. `against`: a key of AXES."""
    steps, found = entry.steps, [entry.gain(name, step) for step in entry.steps]
    if against == "drift":
        xs = mean_drift(entry)
    elif against == "flops" and not entry.teraflops:
        return
    else:
        xs = entry.at(against, steps)
    means, style = [one.mean for one in found], dict(color=entry.colour, linestyle=entry.dash)
    axis.plot(xs, means, marker="o", markersize=4, linewidth=1.4, label=entry.legend, **style)
    axis.fill_between(xs, [one.low for one in found], [one.high for one in found], color=entry.colour, alpha=0.12)
    for run in entry.runs:
        if run.alarm in steps:
            at = steps.index(run.alarm)
            axis.plot(xs[at], means[at], "X", color=entry.colour, markersize=11, markeredgecolor="white")


def finish(axis: Axes, text: str, title: str = "") -> None:
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set(xlabel=text, title=title)
    axis.grid(alpha=0.3)


def verdict(interval: Interval) -> str:
    """Return whether the interval separates the mean from 0, in words. One seed never separates."""
    if interval.seeds == 1:
        return "one seed: not judged"
    if interval.low > 0 or interval.high < 0:
        return "separated from 0"
    return f"not separated; smallest effect {smallest_effect(interval)}"


def figures_section(paths: Sequence[Path]) -> str:
    return "## Curves\n\n" + "\n\n".join(f"![{path.stem}]({path.name})" for path in paths)
