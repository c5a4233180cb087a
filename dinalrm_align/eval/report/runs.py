"""One alignment run, read from its folder: training metrics and per-sample evaluation scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dinalrm_align.eval.report.intervals import by_caption
from dinalrm_align.train.files import read_json, read_yaml
from dinalrm_align.train.metrics import read_metrics
from dinalrm_align.train.settings import check_integer, check_number

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run.

    Args:
        rows: of metrics.jsonl.
        terms: evaluation settings: prompts, noise seed, sampler.
        scores: update -> "gold", "proxy" (the training reward) and "gold/NAME" (further evaluators) -> (N,) scores of
            the held-out samples.
    """

    folder: Path
    seed: int
    rows: list[Row]
    terms: dict[str, Any]
    scores: dict[int, dict[str, np.ndarray]]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises FileNotFoundError for a missing file, ValueError for a run without an evaluation of the base model."""
        rows = read_metrics(folder / "metrics.jsonl")
        evaluated = [int(row["step"]) for row in rows if "gold" in row]
        if not evaluated or evaluated[0] != 0:
            raise ValueError(f"{folder}: got no evaluation of the base model; expected one at update 0")
        found = {step: _read_evaluation(folder / "evaluations" / f"{step:06d}.json") for step in evaluated}
        scores = {step: {name: np.array(one[name]) for name in _score_names(one)} for step, one in found.items()}
        seed = read_yaml(folder / "config.yaml", "config").get("seed")
        check_integer(f"{folder / 'config.yaml'}: seed", seed)
        return cls(folder, seed, rows, found[0]["terms"], scores)

    def gain(self, name: str, step: int) -> np.ndarray:
        """(C,) gain over the base model per caption: gold in its own unit, other scores in standard deviations of the
        base model's samples, because rewards differ in scale.
        """
        before, after = self.scores[0][name], self.scores[step][name]
        unit = 1.0 if name == "gold" else float(before.std()) or 1.0
        return by_caption((after - before) / unit, self.terms["prompts"])

    def seconds(self) -> np.ndarray:
        """(updates,) seconds of each training update, without evaluations. Profiling slows an update down, so profiled
        updates count as the median of the others.
        """
        updates = [row for row in self.rows if "elapsed" in row]
        took = np.diff([0.0, *(row["elapsed"] for row in updates)])
        plain = np.array([any(name.startswith("seconds/") for name in row) for row in updates], dtype=bool)
        return np.where(plain, took, np.median(took[plain])) if plain.any() else took

    @cached_property
    def clock(self) -> np.ndarray:
        """(updates + 1,) seconds of training after 0, 1, ... updates."""
        return np.concatenate([[0.0], np.cumsum(self.seconds())])

    @property
    def alarm(self) -> int | None:
        """The first update at which hacking was detected."""
        return next((int(step) for step, value in zip(*series(self.rows, "hacking")) if value), None)


def series(rows: Sequence[Row], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a metric, where it was recorded."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def phases_of(runs: Sequence[Run], kind: str) -> list[str]:
    """Names of the phases for which a run recorded `kind`/phase, in order of appearance."""
    names = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    return [name.removeprefix(f"{kind}/") for name in names if name.startswith(f"{kind}/")]


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Scores of one evaluation and its settings; ValueError unless there is a finite number per sample."""
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
    return ["gold", "proxy", *(name for name in evaluation if name.startswith("gold/"))]
