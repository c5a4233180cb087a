"""Pairwise accuracy during training, for each noise level and concept (what the two images of a pair differ in).

Accuracy is the share of pairs whose preferred image scores strictly higher. Equal scores count as wrong, and pairs that
raters tie (label 0.5) are left out. The noise is drawn once per prompt: all images of the prompt and all noise levels
share it.
"""

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.eval.plots import panels
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import Level, Score, level_name
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.train.files import save_figure, write_atomically

OVERALL = "all"


@dataclasses.dataclass(frozen=True)
class Tally:
    """Numbers of pairs, summed over batches and ranks. `not_finite`: number of pairs with a NaN or infinite score."""

    correct: int = 0
    pairs: int = 0
    not_finite: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.correct + other.correct, self.pairs + other.pairs, self.not_finite + other.not_finite)

    @property
    def accuracy(self) -> float:
        return self.correct / self.pairs if self.pairs else math.nan


Tallies = dict[Level, dict[str, Tally]]
"""Noise level -> concept that the pairs differ in (OVERALL for all pairs) -> counts."""


@torch.no_grad()
def pairwise_tallies(
    score: Score, batches: Sequence[PairBatch], levels: Sequence[Level], *, seed: int = 0, rank: int = 0, world: int = 1
) -> Tallies:
    """Count correctly ordered pairs by noise level and concept, in this rank's batches: `rank`, `rank` + `world`, ...

    `merge` sums the counts of all ranks. The noise is seeded by (seed, batch index), so the sums do not depend on
    `world`.
    """
    tallies: Tallies = {level: defaultdict(Tally, {OVERALL: Tally()}) for level in levels}
    for index in range(rank, len(batches), world):
        batch = batches[index]
        noise = batch.draw_noise(seeded_generator(seed, index))
        preferred = torch.sign(batch.label - 0.5)
        untied = preferred != 0
        counted_pairs = {OVERALL: untied}
        for concept in {*(batch.concepts or ())}:
            of_concept = torch.tensor([name == concept for name in batch.concepts], device=untied.device)
            counted_pairs[concept] = untied & of_concept
        for level in levels:
            scores = score(batch, level, noise).float().to(batch.label.device)
            gap = scores[batch.chosen] - scores[batch.rejected]
            for concept, counted in counted_pairs.items():
                counts = (int((which & counted).sum()) for which in (gap * preferred > 0, untied, ~gap.isfinite()))
                tallies[level][concept] += Tally(*counts)
    return tallies


def merge(parts: Iterable[Tallies]) -> Tallies:
    """Sum the counts of all ranks. Raises ValueError if a score on any rank is NaN or infinite."""
    total: Tallies = defaultdict(lambda: defaultdict(Tally))
    for part in parts:
        for level, concepts in part.items():
            for concept, tally in concepts.items():
                total[level][concept] += tally
    for level, concepts in total.items():
        overall = concepts[OVERALL]
        if overall.not_finite:
            got = f"{overall.not_finite} of {overall.pairs} validation pairs have a score that is NaN or infinite"
            raise ValueError(f"at sigma {level_name(level)}, {got}; check the weights and the latents of the pairs")
    return total


def write_report(tallies: Tallies, directory: Path, *, title: str = "") -> None:
    """Write accuracy.json, per_concept.md and accuracy_vs_sigma.png to `directory`. Existing files are replaced."""

    def entry(tally: Tally) -> dict[str, float]:
        return {"accuracy": tally.accuracy, "pairs": tally.pairs}

    concepts = sorted({concept for counts in tallies.values() for concept in counts} - {OVERALL})
    levels = []
    for level, counts in tallies.items():
        by_concept = {name: entry(counts[name]) for name in concepts if name in counts}
        levels.append({"sigma": list(level), **entry(counts[OVERALL]), "concepts": by_concept})
    rows = []
    for name in (OVERALL, *concepts):
        row = [counts.get(name, Tally()) for counts in tallies.values()]
        rows.append([name, row[0].pairs, *(f"{100 * tally.accuracy:.1f}" for tally in row)])
    per_concept = table(["concept", "pairs", *(f"sigma {level_name(level)}" for level in tallies)], rows)
    write_atomically(directory / "accuracy.json", json.dumps({"title": title, "levels": levels}, indent=1) + "\n")
    write_atomically(directory / "per_concept.md", per_concept + "\n")
    _plot(tallies, concepts, directory / "accuracy_vs_sigma.png", title)


def _plot(tallies: Tallies, concepts: Sequence[str], path: Path, title: str) -> None:
    """Plot accuracy against sigma. Thin lines show concepts, dashed lines show ensembles."""
    figure, (axes,) = panels([title], (7, 4.5), "sigma", "pairwise accuracy")
    single = sorted(level for level in tallies if len(level) == 1)
    sigmas = [level[0] for level in single]
    for number, name in enumerate(concepts):
        values = [tallies[level].get(name, Tally()).accuracy for level in single]
        axes.plot(sigmas, values, linewidth=1, alpha=0.6, color=f"C{(number + 1) % 10}", label=name)
    overall = [tallies[level][OVERALL].accuracy for level in single]
    axes.plot(sigmas, overall, color="black", marker="o", label="all pairs")
    for level, counts in tallies.items():
        if len(level) > 1:
            axes.axhline(counts[OVERALL].accuracy, color="black", linestyle="--", label=f"ensemble {level_name(level)}")
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.legend(fontsize=7, ncols=2)
    save_figure(figure, path)


def metrics(tallies: Tallies) -> Mapping[str, float]:
    """Return the accuracy over all pairs at each noise level, under the key `accuracy/SIGMA` of metrics.jsonl."""
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
    """Measure accuracy on all ranks, write the report to `directory` on the main rank, and return the metrics.

    in_step: whether all ranks must call `score` equally often, as sharded weights require. If so, a rank with one batch
    fewer than rank 0 scores an extra batch and discards the result.
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
