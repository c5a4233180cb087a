"""Runs of several labels side by side, several seeds to a label: paired gains with intervals, and what they cost.

Everything is read from what runs leave in their folders. All runs must have been judged on the same terms: the same
prompts, noise and sampler. Then a gain over the base model is paired sample by sample, and the difference between two
labels seed by seed as well. Samples of one caption are averaged; intervals are over seeds and captions
(`intervals.seeds_by_captions`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.eval.report.intervals import Interval, by_caption, seeds_by_captions
from dinalrm_align.train.files import read_json, read_yaml
from dinalrm_align.train.metrics import read_metrics
from dinalrm_align.train.settings import check_integer, check_number

PHASES = ("rollout", "policy", "reward", "pretrain", "backward")
Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run. rows: of metrics.jsonl; scores: update -> "gold", "proxy" and "gold/NAME" of other judges -> (N,) of the
    held-out samples; terms: what they were judged on.
    """

    folder: Path
    seed: int
    rows: list[Row]
    terms: dict[str, object]
    scores: dict[int, dict[str, np.ndarray]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """FileNotFoundError for a file that is not there; ValueError for a run with no evaluation yet."""
        rows = read_metrics(folder / "metrics.jsonl")
        evaluated = [int(row["step"]) for row in rows if "gold" in row]
        if not evaluated or evaluated[0] != 0:
            raise ValueError(f"{folder} holds no evaluation of the base model, which a run's first row has")
        found = {step: _read_evaluation(folder / "evaluations" / f"{step:06d}.json") for step in evaluated}
        scores = {step: {name: np.array(one[name]) for name in _judged(one)} for step, one in found.items()}
        seed = read_yaml(folder / "config.yaml", "config").get("seed")
        check_integer(f"{folder / 'config.yaml'}: seed", seed)
        return cls(folder, seed, rows, found[0]["terms"], scores)

    def gain(self, name: str, step: int) -> np.ndarray:
        """(C,) over the base model, by caption. Gold in its own unit, the others in standard deviations of the base
        model's samples, since rewards have scales of their own.
        """
        before, after = self.scores[0][name], self.scores[step][name]
        unit = 1.0 if name == "gold" else float(before.std()) or 1.0
        return by_caption((after - before) / unit, self.terms["prompts"])

    def seconds(self) -> np.ndarray:
        """(updates,) of training, evaluations left out. A profiled update, slowed by that, counts as the median of the
        others.
        """
        updates = [row for row in self.rows if "elapsed" in row]
        took = np.diff([0.0, *(row["elapsed"] for row in updates)])
        plain = np.array([any(name.startswith("seconds/") for name in row) for row in updates], dtype=bool)
        return np.where(plain, took, np.median(took[plain])) if plain.any() else took


@dataclass(frozen=True)
class Group:
    """Runs of one label, which differ in their seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def steps(self) -> list[int]:
        """Updates at which every run of the group was judged; 0 is the first."""
        return sorted(set.intersection(*(set(run.scores) for run in self.runs)))

    @property
    def best_step(self) -> int:
        """The update with the largest mean gold gain."""
        return max(self.steps, key=lambda step: float(self.gains("gold", step).mean()))

    def gains(self, name: str, step: int) -> np.ndarray:
        """(S, C): see `Run.gain`."""
        return np.stack([run.gain(name, step) for run in self.runs])

    def seconds_at(self, step: int) -> float:
        """Of training until an update, mean over runs."""
        return float(np.mean([run.seconds()[:step].sum() for run in self.runs]))

    def seconds_per_update(self) -> float:
        """Median over the updates of a run, mean over runs."""
        return float(np.mean([np.median(run.seconds()) for run in self.runs]))

    def cost(self, kind: str) -> dict[str, float]:
        """By phase, where measured: seconds (mean over runs of the median over updates), gflops (mean over profiled
        updates) or memory_mib (the largest).
        """
        of_run, of_group = {
            "seconds": (np.median, np.mean),
            "gflops": (np.mean, np.mean),
            "memory_mib": (np.max, np.max),
        }[kind]
        found = {phase: [series(run.rows, f"{kind}/{phase}")[1] for run in self.runs] for phase in PHASES}
        return {
            phase: float(of_group([of_run(values) for values in runs if values]))
            for phase, runs in found.items()
            if any(runs)
        }


def _read_evaluation(path: Path) -> dict[str, Any]:
    """The scores of one evaluation and its terms; ValueError unless there is a finite number per sample."""
    found = read_json(path)
    prompts = found["terms"].get("prompts") if isinstance(found.get("terms"), dict) else None
    if not isinstance(prompts, list):
        raise ValueError(f"{path}: got no terms with prompts; expected what `align.evaluation` writes")
    for name in _judged(found):
        values = found.get(name)
        if not isinstance(values, list) or len(values) != len(prompts):
            raise ValueError(f"{path}: {name}: got {values!r:.60}; expected {len(prompts)} numbers, one per prompt")
        for value in values:
            check_number(f"{path}: {name}", value)
    return found


def _judged(evaluation: dict[str, Any]) -> list[str]:
    """Names of the scores of an evaluation that gains are taken of."""
    return ["gold", "proxy", *(name for name in evaluation if name.startswith("gold/"))]


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was recorded."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def read_groups(folders: dict[str, Sequence[Path]]) -> list[Group]:
    """Label -> run folders. ValueError unless all runs can be compared: judged on the same terms, after update 0 too,
    and in a group each seed once.
    """
    groups = [Group(label, tuple(Run.read(folder) for folder in runs)) for label, runs in folders.items()]
    first = groups[0].runs[0]
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"{group.label}: got seeds {seeds}; expected each once, or the interval would be too narrow"
            )
        for run in group.runs:
            terms = {**first.terms, **run.terms}
            changed = [name for name in terms if first.terms.get(name) != run.terms.get(name)]
            if changed:
                raise ValueError(
                    f"{run.folder} was judged on other terms than {first.folder}: they differ in {', '.join(changed)}, "
                    "and gains would not be paired; compare runs with equal evaluation settings, model and prompts"
                )
        if len(group.steps) < 2:
            raise ValueError(f"{group.label}: no evaluation after update 0 that all its runs have; let them go on")
    return groups


def difference(first: Group, second: Group, steps: tuple[int, int]) -> Interval | None:
    """Gold gain of one group at its step less that of another at its own, over the seeds they share; None if none."""
    runs = {run.seed: run for run in second.runs}
    rows = [
        run.gain("gold", steps[0]) - runs[run.seed].gain("gold", steps[1]) for run in first.runs if run.seed in runs
    ]
    return seeds_by_captions(np.stack(rows)) if rows else None


def table(groups: Sequence[Group], commands: Sequence[str] = ()) -> str:
    """Markdown: gains of each group and differences between groups with intervals, costs, and how to read them.

    commands: lines to append, how the runs were made.
    """
    terms = groups[0].runs[0].terms
    captions, samples = len(set(terms["prompts"])), len(terms["prompts"])
    last = [group.steps[-1] for group in groups]
    best = [group.best_step for group in groups]
    lines = [
        f"# {' against '.join(group.label for group in groups)}", "",
        f"| | {' | '.join(group.label for group in groups)} |", "|---|" + "---:|" * len(groups),
        _line("seeds", [", ".join(str(run.seed) for run in group.runs) for group in groups]),
        _line("last update judged", last),
        _line("gold gain at the last update", [_interval(g, "gold", at) for g, at in zip(groups, last)]),
        _line("gold gain at the best evaluation (its update)",
              [f"{_interval(g, 'gold', at)} ({at})" for g, at in zip(groups, best)]),
        _line("reward gain at the last update, in s.d. of the base model's samples",
              [_interval(g, "proxy", at) for g, at in zip(groups, last)]),
        _line("seconds per update", [f"{group.seconds_per_update():.2f}" for group in groups]),
        *_costs(groups, "seconds", "seconds of an update", total=False),
        *_costs(groups, "gflops", "GFLOPs of an update", total=True),
        *_costs(groups, "memory_mib", "peak MiB above the weights", total=False),
        "", *_differences(groups),
        f"Gold gain: over the base model, paired on {samples} samples of {captions} captions with the same noise in "
        "every run. In brackets the 95 % interval over seeds and captions. The best evaluation was chosen on these "
        "same samples, which flatters it. Seconds are medians, FLOPs means of the profiled updates (two per "
        "multiply-accumulate; matrix products, convolutions and attention; recomputation included), memory the "
        "maximum.",
        *(["", "Made by:", "", "```bash", *commands, "```"] if commands else []),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(name: str, cells: Sequence[object]) -> str:
    return f"| {name} | {' | '.join(map(str, cells))} |"


def _interval(group: Group, name: str, step: int) -> str:
    return str(seeds_by_captions(group.gains(name, step)))


def _costs(groups: Sequence[Group], kind: str, title: str, *, total: bool) -> list[str]:
    """A line for each phase that some group has, and one for their sum."""
    costs = [group.cost(kind) for group in groups]
    found = [phase for phase in PHASES if any(phase in cost for cost in costs)]
    lines = [
        _line(f"{title}: {phase}", [f"{cost[phase]:.4g}" if phase in cost else "" for cost in costs]) for phase in found
    ]
    if total and found:
        lines.append(_line(f"{title}: all phases", [f"{sum(cost.values()):.4g}" for cost in costs]))
    return lines


def _differences(groups: Sequence[Group]) -> list[str]:
    """A small table of paired differences for every two groups that share seeds."""
    lines = []
    for first, second in combinations(groups, 2):
        names = f"{first.label} less {second.label}"
        common = max(set(first.steps) & set(second.steps))
        compared = {"each at its best evaluation": (first.best_step, second.best_step)}
        if common > 0:
            compared = {f"at update {common}": (common, common)} | compared
        for at, steps in compared.items():
            found = difference(first, second, steps)
            cells = ["", "no seed in common"] if found is None else [found.seeds, found]
            lines.append(_line(f"{names}, {at}", cells))
    head = ["| paired difference of gold gain | seeds | mean [95 % interval] |", "|---|---:|---:|"]
    return [*head, *lines, ""] if lines else []
