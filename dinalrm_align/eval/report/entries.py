"""Runs side by side: who they are, and which of them may be compared.

A run is told by its recipe, reward and seed, and where that is not enough by the settings in which it differs. Gains
are over the base model and paired sample by sample, so that runs can be compared only if they were judged on the same
terms (model, prompts, noise, sampler) as the first one; of others only what needs no judge is shown, with a sentence.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.eval.report.groups import Group, Run, series
from dinalrm_align.eval.report.intervals import Interval, seeds_by_captions
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.files import read_json, read_yaml

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Told apart by colour-blind readers too (Okabe and Ito); the eighth replaces a yellow that white swallows."""
DASHES = ("-", "--", ":", "-.")
APART = re.compile(
    r"(seed|output_dir|eval_prompts|resume|device|tracker|profile_every|(watch|evaluation)\..*|.*\.(keep_last|checkpoint_every))"
)
"""Settings that make no other kind of run."""
MARKS = ("metrics.jsonl", "config.yaml")
"""Files that every run has from its first row on."""


@dataclass(frozen=True)
class Entry:
    """A run and how it is told from the others.

    group: recipe, reward and settings: what runs of several seeds share, their colour too. apart: why its gains are not
    comparable with the first run's; empty if they are.
    """

    run: Run
    group: str
    label: str
    colour: str
    dash: str
    apart: str = ""

    @property
    def steps(self) -> list[int]:
        return sorted(self.run.scores)

    @property
    def best_step(self) -> int:
        return max(self.steps, key=lambda step: float(self.run.gain("gold", step).mean()))

    @property
    def alarm(self) -> int | None:
        """The first update at which the hacking watch rang."""
        return next((int(step) for step, value in zip(*series(self.run.rows, "hacking")) if value), None)

    @property
    def was_watched(self) -> bool:
        return any("hacking" in row for row in self.run.rows)

    @cached_property
    def clock(self) -> np.ndarray:
        """(updates + 1,) seconds of training after 0, 1, ... updates."""
        return np.concatenate([[0.0], np.cumsum(self.run.seconds())])

    def at(self, clock: str, steps: Sequence[float]) -> list[float]:
        """Steps, or the seconds at which they were made."""
        return list(steps) if clock == "updates" else [float(self.clock[int(step)]) for step in steps]

    def gain(self, name: str, step: int) -> Interval:
        """Over the base model, with the interval over captions; the proxy in s.d. of the base model's samples."""
        return seeds_by_captions(self.run.gain(name, step)[None])

    def peak(self) -> float | None:
        """MiB above the weights, the largest phase; None where it was not measured."""
        found = [value for row in self.run.rows for name, value in row.items() if name.startswith("memory_mib/")]
        return max(found, default=None)


def read_entries(folders: Sequence[Path]) -> tuple[list[Entry], list[str]]:
    """The runs in these folders, and sentences about what is not compared. ValueError if no folder holds a run."""
    folders = [folder for folder in folders if not folder.is_file()]  # runs/* takes logs and pictures along
    empty = [str(folder) for folder in folders if not all((folder / name).is_file() for name in MARKS)]
    notes = [f"Left out, without {' and '.join(MARKS)} and so no runs: {', '.join(empty)}."] if empty else []
    runs = []
    for folder in folders:
        if str(folder) not in empty:
            try:
                runs.append((Run.read(folder), _facts(folder)))
            except (ValueError, FileNotFoundError) as error:
                notes.append(f"{folder} is left out: {error}.")
    if not runs:
        raise ValueError(f"no run to compare. {' '.join(notes)[:600]}")
    groups, labels = _names(runs)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    entries, reasons = [], {}
    for (run, facts), group, label in zip(runs, groups, labels):
        apart = _apart(run, facts, *runs[0])
        if apart:
            reasons.setdefault(apart, []).append(label)
        colour, dash = COLOURS[places[group] % len(COLOURS)], DASHES[places[group] // len(COLOURS) % len(DASHES)]
        entries.append(Entry(run, group, label, colour, dash, apart))
    for apart, names in reasons.items():
        notes.append(f"{'; '.join(names)}: {apart}. Gains cannot be paired then: only cost and KL are shown.")
    return entries, notes


def groups_of(entries: Sequence[Entry]) -> list[Group]:
    """Runs that differ in their seed alone, together; those that are not comparable are left out."""
    names = dict.fromkeys(entry.group for entry in entries if not entry.apart)
    return [
        Group(name, tuple(entry.run for entry in entries if entry.group == name and not entry.apart)) for name in names
    ]


def _facts(folder: Path) -> dict[str, Any]:
    """Recipe, reward, model and settings of a run. Its recipe stands in summary.json once it is over, in a checkpoint's
    identity before.
    """
    config = read_yaml(folder / "config.yaml", "config")
    summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    checkpoint = latest_checkpoint(folder)
    identity = read_json(checkpoint / "state.json").get("identity", {}) if checkpoint else {}
    recipe = str(summary.get("recipe") or identity.get("recipe") or "run").removesuffix("_sd35")
    reward = re.sub(r"[^\s=*+]*/", "", str(config.get("reward", "no reward")))  # of folders and hub ids the last part
    return {"recipe": recipe, "reward": reward, "model": config.get("model"), "settings": dict(_flat(config))}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return found


def _names(runs: Sequence[tuple[Run, Mapping[str, Any]]]) -> tuple[list[str], list[str]]:
    """Group and label of every run. A group is of one recipe, reward and settings: named by the first two, and where
    runs of those differ by the settings in which they do (more than three: by the folder of its first run). A label
    adds the seed, and the folder where even that is not enough.
    """
    names = [f"{facts['recipe']} {facts['reward']}" for _, facts in runs]
    groups, folders = [], {}
    for name, (run, facts) in zip(names, runs):
        alike = [other["settings"] for other_name, (_, other) in zip(names, runs) if other_name == name]
        keys = dict.fromkeys(key for settings in alike for key in settings if not APART.fullmatch(key))
        differing = [key for key in keys if len({str(settings.get(key)) for settings in alike}) > 1]
        told = [f"{key.rsplit('.', 1)[-1]} {_value(facts['settings'].get(key))}" for key in differing]
        folder = folders.setdefault((name, *told), run.folder.name)
        groups.append(", ".join([name, *(told if len(told) <= 3 else [folder])]))
    labels = [f"{group}, seed {run.seed}" for group, (run, _) in zip(groups, runs)]
    twice = {label for label, number in Counter(labels).items() if number > 1}
    for index, (label, (run, _)) in enumerate(zip(list(labels), runs)):
        if label in twice:
            labels[index], groups[index] = f"{label} ({run.folder})", f"{groups[index]} ({run.folder})"
    return groups, labels


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _apart(run: Run, facts: Mapping[str, Any], first: Run, first_facts: Mapping[str, Any]) -> str:
    """Why the gains of a run are not comparable with the first one's; empty if they are."""
    terms = {**run.terms, "model": facts["model"]}, {**first.terms, "model": first_facts["model"]}
    changed = [
        name for name in {**terms[0], **terms[1]} if name != "shown" and terms[0].get(name) != terms[1].get(name)
    ]
    if changed:
        return f"judged on other terms than {first.folder} (they differ in {', '.join(changed)})"
    return "judged on one caption" if len(set(run.terms["prompts"])) < 2 else ""
