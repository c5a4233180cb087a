"""Pictures of runs: grids of samples, before beside after, the curves of one run, several runs in one figure.

    python -m dinalrm_align.report runs/refl_shapes_dinalrm_seed0 runs/refl_shapes_pixel_seed0 --output compare.png

Everything is read from what a run leaves in its folder (metrics.jsonl, evaluations/), so that figures can be made
again.
"""

import argparse
import json
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dinalrm_align.resume import read_metrics

PHASES = ("rollout", "policy", "reward", "pretrain", "backward")
CELL_INCHES = 1.5


def to_bytes(images: Tensor) -> np.ndarray:
    """Pictures (N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


def save_strip(pictures: np.ndarray, path: Path) -> None:
    """Pictures (N, H, W, 3) uint8 -> one lossless PNG of H x (N W), which `load_strip` takes apart again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, lambda temporary: Image.fromarray(np.concatenate(list(pictures), axis=1)).save(temporary))


def load_strip(path: Path, count: int) -> np.ndarray:
    """The `count` pictures (N, H, W, 3) uint8 that `save_strip` put in a row."""
    with Image.open(path) as strip:
        return np.stack(np.split(np.asarray(strip.convert("RGB")), count, axis=1))


def save_grid(
    images: Tensor | np.ndarray, captions: Sequence[str], path: Path, *, title: str = "", columns: int = 8
) -> None:
    """A PNG of pictures with their captions below them, `columns` a row.

    images: (N, 3, H, W) in [0, 1], or (N, H, W, 3) uint8; captions: N strings. ValueError when the numbers differ.
    """
    pictures = to_bytes(images) if isinstance(images, Tensor) else images
    if len(pictures) != len(captions):
        raise ValueError(f"one caption per picture: got {len(pictures)} pictures, {len(captions)} captions")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(columns * CELL_INCHES, rows * CELL_INCHES * 1.35 + (0.4 if title else 0)))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, picture, caption in zip(axes, pictures, captions, strict=False):
        axis.imshow(picture)
        _caption(axis, caption)
    _finish(figure, path, title)


def save_before_after(
    before: np.ndarray, after: np.ndarray, captions: Sequence[str], path: Path, *, title: str = "", columns: int = 4
) -> None:
    """A PNG of pairs, each picture before training beside the one after it. before, after: (N, H, W, 3) uint8."""
    if not len(before) == len(after) == len(captions):
        raise ValueError(f"got {len(before)} pictures before, {len(after)} after, {len(captions)} captions")
    pairs = [np.concatenate([b, np.full_like(b[:, :2], 255), a], axis=1) for b, a in zip(before, after, strict=True)]
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(columns * CELL_INCHES * 2, rows * CELL_INCHES * 1.35 + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, pair, caption in zip(axes, pairs, captions, strict=False):
        axis.imshow(pair)
        _caption(axis, caption, width=40)
    _finish(figure, path, title or "in each pair: before | after")


def plot_run(run: Path) -> Path:
    """curves.png of one run: scores held out and in training, KL, gradient norm, seconds and memory by phase."""
    rows = read_metrics(run / "metrics.jsonl")
    figure = Figure(figsize=(13, 6.5))
    gold, proxy, training, kl, seconds, memory = figure.subplots(2, 3).flatten()
    gold.errorbar(*_series(rows, "gold"), yerr=_series(rows, "gold_gain_standard_error")[1], marker="o", capsize=2)
    gold.set_title("gold score, held out (bars: of the paired gain)")
    proxy.plot(*_series(rows, "proxy"), marker="o")
    proxy.set_title("reward, held out")
    training.plot(*_series(rows, "reward"))
    training.set_title("reward in training")
    kl.plot(*_series(rows, "kl"), label="velocity KL")
    kl.plot(*_series(rows, "grad_norm"), label="gradient norm", alpha=0.6)
    kl.set_yscale("symlog", linthresh=1e-4)
    kl.legend()
    kl.set_title("distance and gradient")
    for axis, kind, unit in ((seconds, "seconds", "seconds"), (memory, "memory_mib", "peak MiB above weights")):
        for phase in PHASES:
            steps, values = _series(rows, f"{kind}/{phase}")
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
    _finish(figure, path, run.name)
    return path


def compare(runs: dict[str, Path], path: Path) -> None:
    """Runs by label in one PNG: held-out proxy and gold, against updates and against seconds of training; below them
    what an update costs, phase by phase: median seconds and peak memory.

    Rewards have scales of their own, so the proxy is drawn as its gain over the base model in standard deviations of
    the base model's samples; gold is drawn as it is, with the standard errors of its paired gain.
    """
    figure = Figure(figsize=(11, 10))
    panels = figure.subplots(3, 2)
    for index, (label, run) in enumerate(runs.items()):
        every_row = read_metrics(run / "metrics.jsonl")
        rows = [row for row in every_row if "gold" in row]
        if not rows:
            raise ValueError(f"{run} holds no evaluation yet; a run's first row has one")
        start = json.loads((run / "evaluations" / "000000.json").read_text())
        spread = float(np.std(start["proxy"])) or 1.0
        gains = [(row["proxy"] - rows[0]["proxy"]) / spread for row in rows]
        golds = [row["gold"] for row in rows]
        errors = [row["gold_gain_standard_error"] for row in rows]
        for column, xs in enumerate(([row["step"] for row in rows], [row.get("elapsed", 0.0) for row in rows])):
            panels[0, column].plot(xs, gains, marker="o", label=label)
            panels[1, column].errorbar(xs, golds, yerr=errors, marker="o", capsize=2, label=label)
        for axis, cost in zip(panels[2], (phase_cost(every_row, "seconds"), phase_cost(every_row, "memory_mib"))):
            places = np.arange(len(PHASES)) + index * 0.8 / len(runs)
            values = [cost.get(phase, 0.0) for phase in PHASES]
            bars = axis.bar(places, values, 0.8 / len(runs), label=f"{label}")
            axis.bar_label(bars, [f"{value:.3g}" if value else "" for value in values], fontsize=7)
    for column, unit in enumerate(("update", "seconds of training")):
        panels[0, column].set_title("proxy: gain in standard deviations of the base model")
        panels[1, column].set_title("gold")
        for axis in panels[:2, column]:
            axis.set_xlabel(unit)
    for axis, title in zip(panels[2], ("median seconds of an update, by phase", "peak MiB above weights, by phase")):
        axis.set_xticks(np.arange(len(PHASES)) + 0.4 - 0.4 / len(runs), PHASES)
        axis.set_title(title)
    for axis in panels.flatten():
        axis.grid(alpha=0.3)
        axis.legend()
    _finish(figure, path, "")


def phase_cost(rows: Sequence[dict[str, float]], kind: str) -> dict[str, float]:
    """Of each phase that was measured: the median of its "seconds", or the largest of its "memory_mib"."""
    summary = {"seconds": np.median, "memory_mib": np.max}[kind]
    found = {phase: _series(rows, f"{kind}/{phase}")[1] for phase in PHASES}
    return {phase: float(summary(values)) for phase, values in found.items() if values}


def _series(rows: Sequence[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was recorded."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _caption(axis: Axes, caption: str, *, width: int = 22) -> None:
    lines = textwrap.wrap(caption, width)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: width - 1] + "\u2026"]
    axis.set_title("\n".join(lines), y=-0.08, va="top", fontsize=7, parse_math=False)


def _finish(figure: Figure, path: Path, title: str) -> None:
    """Lay out, write under a temporary name, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    _replace(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".writing_{path.name}")
    write(temporary)
    os.replace(temporary, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the curves of one run, or compare several."""
    parser = argparse.ArgumentParser(prog="python -m dinalrm_align.report", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--output", type=Path, help="PNG of the comparison (default: compare.png)")
    arguments = parser.parse_args(argv)
    absent = [str(run) for run in arguments.runs if not (run / "metrics.jsonl").exists()]
    if absent:
        parser.error(f"not a run folder (no metrics.jsonl): {', '.join(absent)}")
    if len(arguments.runs) == 1:
        print(plot_run(arguments.runs[0]))
    else:
        output = arguments.output or Path("compare.png")
        names = [run.name for run in arguments.runs]
        unique = len(set(names)) == len(names)
        compare({run.name if unique else str(run): run for run in arguments.runs}, output)
        print(output)


if __name__ == "__main__":
    main()
