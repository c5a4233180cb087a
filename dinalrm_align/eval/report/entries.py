"""Entries of a comparison: runs that differ only in their seed, named and coloured together.

Gains are over the base model and paired sample by sample, so runs are comparable only if they were evaluated with the
same model, prompts, noise and sampler as the first run. Of other runs only cost and KL are shown.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.eval.report.intervals import Interval, seeds_by_captions
from dinalrm_align.eval.report.runs import Run, phases_of, series
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.files import read_json, read_yaml

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Okabe and Ito's palette for colour-blind readers; the eighth colour replaces a yellow with too little contrast."""
DASHES = ("-", "--", ":", "-.")
NOT_NAMED = re.compile(
    r"(seed|output_dir|eval_prompts|resume|device|tracker|profile_every|(watch|evaluation)\..*|.*\.(keep_last|checkpoint_every))"
)
"""Settings in which runs of one entry may differ."""
MARKS = ("metrics.jsonl", "config.yaml")
"""Files that every run writes at its start."""


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in their seed.

    Args:
        labels: one per run.
        incomparable: why the gains are not comparable with the first run's; empty if they are.
    """

    name: str
    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    colour: str
    dash: str
    incomparable: str = ""

    def single_runs(self) -> "list[Entry]":
        """An entry per run, named by its label."""
        return [replace(self, name=label, runs=(run,), labels=(label,)) for run, label in zip(self.runs, self.labels)]

    @property
    def legend(self) -> str:
        return f"{self.name}, {len(self.runs)} seeds" if len(self.runs) > 1 else self.labels[0]

    @property
    def steps(self) -> list[int]:
        """Updates at which every run was evaluated; 0 is the first."""
        return sorted(set.intersection(*(set(run.scores) for run in self.runs)))

    @property
    def best_step(self) -> int:
        """The update with the largest mean gold gain."""
        return max(self.steps, key=lambda step: float(self.gains("gold", step).mean()))

    def gains(self, name: str, step: int) -> np.ndarray:
        """(S, C), see `Run.gain`."""
        return np.stack([run.gain(name, step) for run in self.runs])

    def gain(self, name: str, step: int) -> Interval:
        """Mean gain with its interval over seeds and captions."""
        return seeds_by_captions(self.gains(name, step))

    def has(self, name: str) -> bool:
        """Whether every evaluation has scores of this name."""
        return all(name in scores for run in self.runs for scores in run.scores.values())

    def at(self, clock: str, steps: Sequence[float], run: Run | None = None) -> list[float]:
        """Updates -> updates, mean seconds of training ("time") or TFLOPs ("flops"), of all runs or of one."""
        if clock == "updates":
            return list(steps)
        if clock == "flops":
            return [step * self.teraflops for step in steps]
        runs = self.runs if run is None else (run,)
        return [float(np.mean([one.clock[int(step)] for one in runs])) for step in steps]

    @property
    def teraflops(self) -> float:
        """TFLOPs of an update, all phases; 0 where no update was profiled."""
        return sum(self.cost("gflops").values()) / 1000

    def cost(self, kind: str) -> dict[str, float]:
        """By phase, where measured: "seconds" (mean over runs of the median over updates), "gflops" (mean over profiled
        updates) or "memory_mib" (maximum).
        """
        over_updates, over_runs = {
            "seconds": (np.median, np.mean), "gflops": (np.mean, np.mean), "memory_mib": (np.max, np.max),
        }[kind]  # fmt: skip
        costs = {}
        for phase in phases_of(self.runs, kind):
            found = [series(run.rows, f"{kind}/{phase}")[1] for run in self.runs]
            costs[phase] = float(over_runs([over_updates(values) for values in found if values]))
        return costs


def read_entries(
    folders: Sequence[Path], groups: Mapping[str, Sequence[Path]] | None = None
) -> tuple[list[Entry], list[str]]:
    """Read runs from their folders.

    Args:
        folders: runs, collected into entries by recipe, reward and settings. Folders without a run are skipped.
        groups: name -> runs of one entry, one per seed.

    Returns the entries and notes about runs that are skipped or not comparable. Raises ValueError when there is no run,
    or a group names a folder without a run or a seed twice.
    """
    folders = [folder for folder in folders if not folder.is_file()]  # runs/* matches logs and images too
    empty = [str(folder) for folder in folders if not _is_run(folder)]
    notes = [f"Skipped, no {' and '.join(MARKS)}: {', '.join(empty)}."] if empty else []
    runs = []
    for folder in folders:
        if str(folder) not in empty:
            try:
                runs.append((Run.read(folder), _read_facts(folder)))
            except (ValueError, FileNotFoundError) as error:
                notes.append(f"{folder} is skipped: {error}.")
    names, labels = _names(runs)
    members: dict[str, list[tuple[Run, dict[str, Any], str]]] = {}
    for (run, facts), name, label in zip(runs, names, labels):
        members.setdefault(name, []).append((run, facts, label))
    for name, group in (groups or {}).items():
        members[name] = _read_group(name, group)
    if not members:
        raise ValueError(f"no run to compare. {' '.join(notes)[:600]}")
    first = next(iter(members.values()))[0]
    entries, reasons = [], {}
    for name, found in members.items():
        reason = next(filter(None, (_incomparable(run, facts, *first[:2]) for run, facts, _ in found)), "")
        if reason:
            reasons.setdefault(reason, []).extend(label for _, _, label in found)
        number = len(entries)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        runs_of_entry, _, labels_of_entry = zip(*found)
        entries.append(Entry(name, runs_of_entry, labels_of_entry, colour, dash, reason))
    for reason, labels in reasons.items():
        notes.append(f"{'; '.join(labels)}: {reason}. Gains cannot be paired: only cost and KL are shown.")
    return entries, notes


def difference(first: Entry, second: Entry, steps: tuple[int, int]) -> Interval | None:
    """Gold gain of `first` at its step minus that of `second` at its own, over shared seeds; None without any."""
    runs = {run.seed: run for run in second.runs}
    rows = [
        run.gain("gold", steps[0]) - runs[run.seed].gain("gold", steps[1]) for run in first.runs if run.seed in runs
    ]
    return seeds_by_captions(np.stack(rows)) if rows else None


def _is_run(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MARKS)


def _read_group(name: str, folders: Sequence[Path]) -> list[tuple[Run, dict[str, Any], str]]:
    absent = [str(folder) for folder in folders if not _is_run(folder)]
    if absent:
        raise ValueError(f"group {name}: got folders without a run (no {' and '.join(MARKS)}): {', '.join(absent)}")
    runs = [Run.read(folder) for folder in folders]
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"group {name}: got seeds {seeds}; expected each once, or the interval would be too narrow")
    return [(run, _read_facts(run.folder), f"{name}, seed {run.seed}") for run in runs]


def _read_facts(folder: Path) -> dict[str, Any]:
    """Recipe, reward, model and settings of a run. summary.json names the recipe of a finished run, the last checkpoint
    that of an unfinished one.
    """
    config = read_yaml(folder / "config.yaml", "config")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    checkpoint = latest_checkpoint(folder)
    identity = read_json(checkpoint / "state.json").get("identity", {}) if checkpoint else {}
    recipe = str(summary.get("recipe") or identity.get("recipe") or "run").removesuffix("_sd35")
    reward = re.sub(r"[^\s=*+]*/", "", str(config.get("reward", "no reward")))  # last part of a folder or hub id
    return {"recipe": recipe, "reward": reward, "model": config.get("model"), "settings": dict(_flat(config))}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _names(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> tuple[list[str], list[str]]:
    """Entry name and label of every run. An entry is named by recipe and reward, and where needed by the settings that
    differ (more than three: by the folder of its first run). A label adds the seed, and the folder if labels collide.
    """
    short = [f"{facts['recipe']} {facts['reward']}" for _, facts in runs]
    names, folders = [], {}
    for name, (run, facts) in zip(short, runs):
        alike = [other["settings"] for other_name, (_, other) in zip(short, runs) if other_name == name]
        keys = dict.fromkeys(key for settings in alike for key in settings if not NOT_NAMED.fullmatch(key))
        differing = [key for key in keys if len({str(settings.get(key)) for settings in alike}) > 1]
        values = [f"{key.rsplit('.', 1)[-1]} {_text(facts['settings'].get(key))}" for key in differing]
        folder = folders.setdefault((name, *values), run.folder.name)
        names.append(", ".join([name, *(values if len(values) <= 3 else [folder])]))
    labels = [f"{name}, seed {run.seed}" for name, (run, _) in zip(names, runs)]
    twice = {label for label, number in Counter(labels).items() if number > 1}
    for index, (label, (run, _)) in enumerate(zip(list(labels), runs)):
        if label in twice:
            labels[index], names[index] = f"{label} ({run.folder})", f"{names[index]} ({run.folder})"
    return names, labels


def _text(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _incomparable(run: Run, facts: Mapping[str, Any], first: Run, first_facts: Mapping[str, Any]) -> str:
    """Why the gains of a run are not comparable with the first one's; empty if they are."""
    own, other = {**run.terms, "model": facts["model"]}, {**first.terms, "model": first_facts["model"]}
    changed = [name for name in {**own, **other} if name != "shown" and own.get(name) != other.get(name)]
    if changed:
        return f"evaluated with other settings than {first.folder} (they differ in {', '.join(changed)})"
    return "evaluated on one caption" if len(set(run.terms["prompts"])) < 2 else ""
