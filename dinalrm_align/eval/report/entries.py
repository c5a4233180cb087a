"""Read alignment runs from their folders, and group them: runs that differ only in their seed form one entry.

A gain is a score minus the base model's score for the same prompt and noise. Gains are comparable only between runs
that were evaluated with the same model, prompts, noise and sampler. If a run was evaluated differently from the first
run, the comparison shows only its cost and KL.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.eval.report.intervals import Interval, by_caption, seeds_by_captions
from dinalrm_align.eval.report.parts import PREFIX
from dinalrm_align.reward.names import gold_rewards
from dinalrm_align.train.checkpoints import latest_checkpoint
from dinalrm_align.train.files import flat, read_json, read_yaml
from dinalrm_align.train.metrics import read_metrics
from dinalrm_align.train.settings import check_integer, check_number

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c564b")
"""Okabe and Ito's palette for colour-blind readers; the eighth colour replaces a yellow with too little contrast."""
DASHES = ("-", "--", ":", "-.")
NOT_NAMED = re.compile(
    r"(seed|output_dir|eval_prompts|resume|device|tracker|profile_every|(watch|evaluation)\..*|.*\.(keep_last|checkpoint_every))"
)
"""Pattern of the settings in which runs of one entry may differ."""
MARKS = ("metrics.jsonl", "config.yaml")  # files that every run writes at its start
AVERAGES = {"seconds": (np.median, np.mean), "gflops": (np.mean, np.mean), "memory_mib": (np.max, np.max)}
"""Kind of cost -> functions that average the cost over updates and then over runs."""


@dataclass(frozen=True)
class Run:
    """Results and settings of one alignment run, read from its folder.

    Args:
        rows: rows of metrics.jsonl.
        terms: settings of the evaluation (model, prompts, noise seed, sampler).
        scores: for each update and each evaluator, the scores (N,) of N samples. Evaluators: "proxy" (the training
            reward), "gold" (a score that no run trains on), "gold/NAME" (an additional score that no run trains on),
            and "gold_parts/PART" (a part of "gold").
        kind: names of the recipe and the reward.
        settings: contents of config.yaml, with nested keys joined by dots.
    """

    folder: Path
    seed: int
    rows: list[dict[str, float]]
    terms: dict[str, Any]
    scores: dict[int, dict[str, np.ndarray]]
    kind: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run. Raises FileNotFoundError for a missing file, ValueError if the base model was not evaluated."""
        rows = read_metrics(folder / "metrics.jsonl")
        evaluated = [int(row["step"]) for row in rows if "gold" in row]
        if not evaluated or evaluated[0] != 0:
            raise ValueError(f"{folder}: got no evaluation of the base model; expected one at update 0")
        found = {step: _read_evaluation(folder / "evaluations" / f"{step:06d}.json") for step in evaluated}
        scores = {step: {name: np.array(one[name]) for name in _score_names(one)} for step, one in found.items()}
        config = read_yaml(folder / "config.yaml", "config")
        check_integer(f"{folder / 'config.yaml'}: seed", config.get("seed"))
        # a finished run names its recipe in summary.json, an unfinished one in its last checkpoint
        summary = read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
        checkpoint = latest_checkpoint(folder)
        identity = read_json(checkpoint / "state.json").get("identity", {}) if checkpoint else {}
        recipe = str(summary.get("recipe") or identity.get("recipe") or "run").removesuffix("_sd35")
        reward = re.sub(r"[^\s=*+]*/", "", str(config.get("reward", "no reward")))  # last part of a folder or hub id
        model = config.get("model")
        gold = gold_rewards(config.get("gold"), "oracle" if model == "shapes" else "pixel")["gold"]
        terms = {**found[0]["terms"], "model": model, "gold": gold}
        return cls(folder, config["seed"], rows, terms, scores, f"{recipe} {reward}", flat(config))

    def gain(self, name: str, step: int) -> np.ndarray:
        """Return the gain over the base model for each caption, (C,). Gains of the evaluator "gold" and of its
        parts are differences of scores. Other gains are divided by the standard deviation of the base model's scores.
        """
        before, after = self.scores[0][name], self.scores[step][name]
        unit = 1.0 if name == "gold" or name.startswith(PREFIX) else float(before.std()) or 1.0
        return by_caption((after - before) / unit, self.terms["prompts"])

    def seconds(self) -> np.ndarray:
        """Return the seconds that each update took, (updates,), not counting evaluations. An update that ran under the
        FLOP profiler gets the median of the unprofiled updates.
        """
        updates = [row for row in self.rows if "elapsed" in row]
        took = np.diff([0.0, *(row["elapsed"] for row in updates)])
        plain = np.array([any(name.startswith("seconds/") for name in row) for row in updates], dtype=bool)
        return np.where(plain, took, np.median(took[plain])) if plain.any() else took

    @cached_property
    def clock(self) -> np.ndarray:
        """Cumulative seconds of training after 0, 1, ... updates: (updates + 1,)."""
        return np.concatenate([[0.0], np.cumsum(self.seconds())])

    @property
    def alarm(self) -> int | None:
        """The first update with a reward-hacking alarm, or None."""
        return next((int(step) for step, value in zip(*series(self.rows, "hacking")) if value), None)


def series(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps at which a metric was recorded, and the recorded values. `rows`: rows of metrics.jsonl."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def phases_of(runs: Sequence[Run], kind: str) -> list[str]:
    """Return the phases for which costs of this kind were recorded, in recorded order. `kind`: a key of AVERAGES."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    return [name.removeprefix(f"{kind}/") for name in names if name.startswith(f"{kind}/")]


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Read a file of evaluation scores. Raises ValueError unless every evaluator has one finite number per prompt."""
    found = read_json(path)
    prompts = found["terms"].get("prompts") if isinstance(found.get("terms"), dict) else None
    if not isinstance(prompts, list):
        raise ValueError(f"{path}: got no terms with prompts; expected a file written by `align.evaluation`")
    for name in _score_names(found):
        values = found.get(name)
        if not isinstance(values, list) or len(values) != len(prompts):
            raise ValueError(f"{path}: {name}: got {values!r:.60}; expected {len(prompts)} numbers, one per prompt")
        for value in values:
            check_number(f"{path}: {name}", value)
    return found


def _score_names(evaluation: dict[str, Any]) -> list[str]:
    return ["gold", "proxy", *(name for name in evaluation if name.startswith(("gold/", PREFIX)))]


@dataclass(frozen=True)
class Entry:
    """Runs that differ only in their seed. A comparison shows them under one name and in one colour. `labels`: a name
    for each run. `incomparable`: why the gains cannot be compared with the first run's gains; empty if they can.
    """

    name: str
    runs: tuple[Run, ...]
    labels: tuple[str, ...]
    colour: str
    dash: str
    incomparable: str = ""

    def single_runs(self) -> "list[Entry]":
        """Return one entry for each run, named by the run's label."""
        return [replace(self, name=label, runs=(run,), labels=(label,)) for run, label in zip(self.runs, self.labels)]

    @property
    def legend(self) -> str:
        return f"{self.name}, {len(self.runs)} seeds" if len(self.runs) > 1 else self.labels[0]

    @property
    def steps(self) -> list[int]:
        """Updates at which every run was evaluated, in ascending order; the first is 0."""
        return sorted(set.intersection(*(set(run.scores) for run in self.runs)))

    @property
    def best_step(self) -> int:
        """The update with the largest mean gold gain over runs and captions."""
        return max(self.steps, key=lambda step: self.gain("gold", step).mean)

    def gain(self, name: str, step: int) -> Interval:
        """Return the gain (see `Run.gain`) averaged over runs and captions, with its 95 % confidence interval."""
        return seeds_by_captions(np.stack([run.gain(name, step) for run in self.runs]))

    def has(self, name: str) -> bool:
        return all(name in scores for run in self.runs for scores in run.scores.values())

    def at(self, clock: str, steps: Sequence[float], run: Run | None = None) -> list[float]:
        """Convert updates to values on a horizontal axis. `clock`: name of the axis, a key of
        `figures.CLOCKS`. `run`: run whose seconds are used; by default, seconds are averaged over the entry's runs.
        """
        if clock == "updates":
            return list(steps)
        if clock == "flops":
            return [step * self.teraflops for step in steps]
        runs = self.runs if run is None else (run,)
        return [float(np.mean([one.clock[int(step)] for one in runs])) for step in steps]

    @property
    def teraflops(self) -> float:
        """TFLOPs of one update, summed over all phases; 0 if no update was profiled."""
        return sum(self.cost("gflops").values()) / 1000

    def cost(self, kind: str) -> dict[str, float]:
        """Return each phase's cost per update, summarised over updates and runs. `kind`: a key of AVERAGES."""
        over_updates, over_runs = AVERAGES[kind]
        costs = {}
        for phase in phases_of(self.runs, kind):
            found = [series(run.rows, f"{kind}/{phase}")[1] for run in self.runs]
            costs[phase] = float(over_runs([over_updates(values) for values in found if values]))
        return costs


def read_entries(
    folders: Sequence[Path], groups: Mapping[str, Sequence[Path]] | None = None
) -> tuple[list[Entry], list[str]]:
    """Read runs and group them into entries of a comparison. Runs in `folders` form one entry if they have the same
    recipe, reward and settings; the settings in NOT_NAMED, such as the seed, may differ. `groups` defines
    additional entries: it maps the name of an entry to the folders of its runs. Each run of a group has its own seed.

    Returns the entries, and notes about runs that are skipped or not comparable. Raises ValueError if there is no run,
    if a group's folder holds no run, or if two runs of a group have the same seed.
    """
    folders = [folder for folder in folders if not folder.is_file()]  # runs/* matches logs and images too
    empty = _without_run(folders)
    notes = [f"Skipped, no {' and '.join(MARKS)}: {', '.join(empty)}."] if empty else []
    runs = []
    for folder in folders:
        if str(folder) not in empty:
            try:
                runs.append(Run.read(folder))
            except (ValueError, FileNotFoundError) as error:
                notes.append(f"{folder} is skipped: {error}.")
    members: dict[str, list[tuple[Run, str]]] = {}
    for run, name, label in zip(runs, *_names(runs)):
        name = f"{name}, evaluated as {run.folder.name}" if _incomparable(run, runs[0]) else name
        members.setdefault(name, []).append((run, label))
    members |= {name: _read_group(name, group) for name, group in (groups or {}).items()}
    if not members:
        raise ValueError(f"no run to compare. {' '.join(notes)[:600]}")
    first = next(iter(members.values()))[0][0]
    entries, reasons = [], {}
    for number, (name, found) in enumerate(members.items()):
        own, labels = zip(*found)
        reason = next(filter(None, (_incomparable(run, first) for run in own)), "")
        if reason:
            reasons.setdefault(reason, []).extend(labels)
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
        entries.append(Entry(name, own, labels, colour, dash, reason))
    for reason, labels in reasons.items():
        notes.append(f"{'; '.join(labels)}: {reason}. Gains cannot be paired: only cost and KL are shown.")
    return entries, notes


def difference(first: Entry, second: Entry, steps: tuple[int, int]) -> Interval | None:
    """Return the gold gain of `first` at update steps[0] minus the gold gain of `second` at update steps[1], averaged
    over captions and the seeds that both entries have. Returns None if the entries share no seed.
    """
    others = {run.seed: run for run in second.runs}
    shared = [(run, others[run.seed]) for run in first.runs if run.seed in others]
    rows = [run.gain("gold", steps[0]) - other.gain("gold", steps[1]) for run, other in shared]
    return seeds_by_captions(np.stack(rows)) if rows else None


def _without_run(folders: Sequence[Path]) -> list[str]:
    return [str(folder) for folder in folders if not all((folder / name).is_file() for name in MARKS)]


def _read_group(name: str, folders: Sequence[Path]) -> list[tuple[Run, str]]:
    if absent := _without_run(folders):
        raise ValueError(f"group {name}: got folders without a run (no {' and '.join(MARKS)}): {', '.join(absent)}")
    runs = [Run.read(folder) for folder in folders]
    if other := next(filter(None, (_incomparable(run, runs[0]) for run in runs)), ""):
        raise ValueError(f"group {name}: got a run {other}; expected runs with one evaluation")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"group {name}: got seeds {seeds}; expected each once, or the interval would be too narrow")
    return [(run, f"{name}, seed {run.seed}") for run in runs]


def _names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Return the entry name and the label of every run.

    A name consists of recipe, reward and the settings that differ between runs of this recipe and reward. If more
    than three settings differ, the folder of the entry's first run replaces the settings. A label is a name followed by
    the seed. If several runs would get the same label, each run's folder is appended to its name and label.
    """
    names, folders = [], {}
    for run in runs:
        alike = [other.settings for other in runs if other.kind == run.kind]
        keys = dict.fromkeys(key for settings in alike for key in settings if not NOT_NAMED.fullmatch(key))
        differing = [key for key in keys if len({str(settings.get(key)) for settings in alike}) > 1]
        values = [f"{key.rsplit('.', 1)[-1]} {_text(run.settings.get(key))}" for key in differing]
        folder = folders.setdefault((run.kind, *values), run.folder.name)
        names.append(", ".join([run.kind, *(values if len(values) <= 3 else [folder])]))
    labels = [f"{name}, seed {run.seed}" for name, run in zip(names, runs)]
    twice = {label for label, number in Counter(labels).items() if number > 1}
    for index, (label, run) in enumerate(zip(list(labels), runs)):
        if label in twice:
            labels[index], names[index] = f"{label} ({run.folder})", f"{names[index]} ({run.folder})"
    return names, labels


def _text(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _incomparable(run: Run, first: Run) -> str:
    """Return why a run's gains cannot be compared with the first run's gains, or an empty string if they can."""
    names = dict.fromkeys([*run.terms, *first.terms])
    changed = [name for name in names if name != "shown" and run.terms.get(name) != first.terms.get(name)]
    why = f"evaluated with other settings than {first.folder} (they differ in {', '.join(changed)})"
    return why if changed else ""
