"""Pairwise accuracy: how often the picture a rater preferred scores strictly higher, per noise level and concept.

A tie of scores is an error, a tie of raters (label 0.5) is left out. Noise is drawn once per group and used at every
level, so that levels are compared on the same draws.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.train.durable import atomically, write_atomically

Level = tuple[float, ...]
"""One sigma, or several: an ensemble."""
Score = Callable[[PairBatch, Level, Tensor], Tensor]
"""(batch, level, noise (M, C, H, W)) -> (M,) scores of the pictures; any affine of them gives the same accuracy."""

OVERALL = "all"


@dataclasses.dataclass(frozen=True)
class Tally:
    """Counts of judged pairs, which add up over batches and processes.

    not_finite: how many of the pairs have a score that is NaN or infinite; `merge` refuses them.
    """

    correct: int = 0
    pairs: int = 0
    not_finite: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.correct + other.correct, self.pairs + other.pairs, self.not_finite + other.not_finite)

    @property
    def accuracy(self) -> float:
        return self.correct / self.pairs if self.pairs else math.nan

    @property
    def standard_error(self) -> float:
        """Binomial, of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.pairs) if self.pairs else math.nan


Tallies = dict[Level, dict[str, Tally]]
"""Level -> concept (OVERALL: every pair) -> counts."""


@torch.no_grad()
def pairwise_tallies(
    score: Score, batches: Sequence[PairBatch], levels: Sequence[Level], *, seed: int = 0, rank: int = 0, world: int = 1
) -> Tallies:
    """Count right answers on every world-th batch from `rank`; `merge` adds the parts of all processes.

    The noise of a batch depends on (seed, its index) alone.
    """
    tallies: Tallies = {level: {OVERALL: Tally()} for level in levels}
    for index in range(rank, len(batches), world):
        batch = batches[index]
        noise = batch.draw_noise(seeded_generator(seed, index))
        for level in levels:
            _count(batch, score(batch, level, noise).float().to(batch.label.device), tallies[level])
    return tallies


def _count(batch: PairBatch, scores: Tensor, into: dict[str, Tally]) -> None:
    """Add one batch's pairs to the counts of one level."""
    preferred = torch.sign(batch.label - 0.5)
    judged = preferred != 0
    gap = scores[batch.chosen] - scores[batch.rejected]
    right = gap * preferred > 0
    for concept in {OVERALL, *(batch.concepts or ())}:
        of_concept = judged
        if concept != OVERALL:
            of_concept = judged & torch.tensor([name == concept for name in batch.concepts], device=judged.device)
        part = Tally(*(int((which & of_concept).sum()) for which in (right, judged, ~gap.isfinite())))
        into[concept] = into.get(concept, Tally()) + part


def merge(parts: Iterable[Tallies]) -> Tallies:
    """The sum of the tallies of several processes. ValueError when a score was not finite.

    That is raised here, and not by the process that met the score, so that every process raises it and none is left
    waiting for the others.
    """
    total: Tallies = {}
    for part in parts:
        for level, concepts in part.items():
            into = total.setdefault(level, {})
            for concept, tally in concepts.items():
                into[concept] = into.get(concept, Tally()) + tally
    for level, concepts in total.items():
        overall = concepts[OVERALL]
        if overall.not_finite:
            raise ValueError(
                f"at sigma {level_name(level)}, {overall.not_finite} of {overall.pairs} validation pairs have a score "
                "that is NaN or infinite; look at the weights and at the latents of the pairs"
            )
    return total


def level_name(level: Level) -> str:
    """ "0.4", or "0.2+0.5+0.7" for an ensemble."""
    return "+".join(f"{sigma:g}" for sigma in level)


def write_report(tallies: Tallies, directory: Path, *, title: str = "") -> None:
    """Write accuracy.json, per_concept.md and accuracy_vs_sigma.png into `directory`, replacing earlier ones."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "accuracy.json", json.dumps(_as_json(tallies, title), indent=1) + "\n")
    write_atomically(directory / "per_concept.md", per_concept_table(tallies))
    _plot(tallies, directory / "accuracy_vs_sigma.png", title)


def per_concept_table(tallies: Tallies) -> str:
    """A markdown table: a row per concept, a column per level, accuracies in per cent."""
    levels = list(tallies)
    names = [OVERALL, *sorted({concept for counts in tallies.values() for concept in counts} - {OVERALL})]
    lines = [
        f"| concept | pairs | {' | '.join(f'sigma {level_name(level)}' for level in levels)} |",
        f"|---|---:|{'---:|' * len(levels)}",
    ]
    for name in names:
        row = [tallies[level].get(name, Tally()) for level in levels]
        lines.append(f"| {name} | {row[0].pairs} | {' | '.join(f'{100 * tally.accuracy:.1f}' for tally in row)} |")
    return "\n".join(lines) + "\n"


def _as_json(tallies: Tallies, title: str) -> dict:
    def entry(tally: Tally) -> dict[str, float]:
        return {"accuracy": tally.accuracy, "standard_error": tally.standard_error, "pairs": tally.pairs}

    return {
        "title": title,
        "levels": [
            {
                "sigma": list(level),
                **entry(counts[OVERALL]),
                "concepts": {name: entry(tally) for name, tally in sorted(counts.items()) if name != OVERALL},
            }
            for level, counts in tallies.items()
        ],
    }


def _plot(tallies: Tallies, path: Path, title: str) -> None:
    """Accuracy against sigma with standard errors, concepts as thin lines, ensembles as dashed ones."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    single = sorted(level for level in tallies if len(level) == 1)
    sigmas = [level[0] for level in single]
    concepts = sorted({name for level in single for name in tallies[level]} - {OVERALL})
    for number, name in enumerate(concepts):
        values = [tallies[level].get(name, Tally()).accuracy for level in single]
        axes.plot(sigmas, values, linewidth=1, alpha=0.6, color=f"C{(number + 1) % 10}", label=name)
    overall = [tallies[level][OVERALL] for level in single]
    axes.errorbar(
        sigmas,
        [tally.accuracy for tally in overall],
        [tally.standard_error for tally in overall],
        color="black",
        marker="o",
        capsize=3,
        label="all pairs",
    )
    for level, counts in tallies.items():
        if len(level) > 1:
            axes.axhline(counts[OVERALL].accuracy, color="black", linestyle="--", label=f"ensemble {level_name(level)}")
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="sigma", ylabel="pairwise accuracy", title=title)
    axes.legend(fontsize=7, ncols=2)
    with atomically(path) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def metrics(tallies: Tallies) -> Mapping[str, float]:
    """Numbers for metrics.jsonl: accuracy/<level> over all pairs."""
    return {f"accuracy/{level_name(level)}": counts[OVERALL].accuracy for level, counts in tallies.items()}


def evaluate_pairs(
    score: Score,
    batches: Sequence[PairBatch],
    levels: Sequence[Level],
    accelerator: Accelerator,
    *,
    seed: int,
    directory: Path,
    title: str,
    in_step: bool = False,
) -> Mapping[str, float]:
    """Score the batches on all ranks, write the report into `directory` on the main one, and return `metrics`.

    in_step: the ranks must call `score` equally often, because weights are sharded over them; a rank without a batch
    at the end scores another one, which is not counted.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    with accelerator.autocast():
        part = pairwise_tallies(score, batches, levels, seed=seed, rank=rank, world=world)
        if in_step and 0 < len(batches) % world <= rank:
            pairwise_tallies(score, [batches[0]], levels)
    tallies = merge(gather_object([part]))
    if accelerator.is_main_process:
        write_report(tallies, directory, title=title)
    return metrics(tallies)
