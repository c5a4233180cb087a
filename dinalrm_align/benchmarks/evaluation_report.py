"""evaluation.md, evaluation.json and pictures: accuracy, ways of reading, concepts and calibration of one reward."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinalrm_align.benchmarks.ablation import accuracy_at, in_points, table
from dinalrm_align.benchmarks.ablation_plots import plot_ways
from dinalrm_align.benchmarks.calibration import Calibration
from dinalrm_align.benchmarks.calibration_report import calibration_section, plot_reliability, reliabilities
from dinalrm_align.benchmarks.inference import inference_section
from dinalrm_align.benchmarks.judged import Judged, Reading
from dinalrm_align.config.evaluate import EvaluateRun
from dinalrm_align.durable import write_atomically
from dinalrm_align.intervals import seeds_by_captions

REWARD = "reward"


def write(
    judged: Mapping[str, Judged], gold: Mapping[str, float], config: EvaluateRun, *, command: str, directory: Path
) -> None:
    """Write the report of one reward's scores on every set; calibration is looked at on the first. gold: set ->
    accuracy of the gold score, where it was asked for.
    """
    evidence, sets = {REWARD: {0: judged}}, list(judged)
    curves = reliabilities(evidence, {REWARD: config.loss}, sets[0], config.calibrated_at)
    sizes = [f"{name}: {one.size}" for name, one in judged.items()]
    sections = [
        f"# Evaluation of a reward\n\n`{command}`\n\nReward {config.reward or f'of {config.model}'}. Judged on "
        f"{'; '.join(sizes)}. Pairwise accuracy in per cent, 95 % intervals over captions; one reward, so that the "
        "variance between seeds is unknown.\n",
        *([gold_section(gold)] if gold else []),
        inference_section(evidence, REWARD, sets, sorted(config.sigmas), config.ensembles),
        "![Ways of reading](inference.png)\n",
        *(concept_section(name, one, config) for name, one in judged.items() if one.concept is not None),
        calibration_section(curves, sets[0]),
        "![Reliability](reliability.png)\n",
    ]
    plot_ways(evidence, REWARD, sets, sorted(config.sigmas), config.ensembles, directory / "inference.png")
    plot_reliability(curves, directory / "reliability.png")
    write_atomically(directory / "evaluation.md", "\n".join(sections))
    numbers = {**_numbers(judged, curves[REWARD], command), "gold": {name: round(p, 5) for name, p in gold.items()}}
    write_atomically(directory / "evaluation.json", json.dumps(numbers, indent=1) + "\n")


def gold_section(gold: Mapping[str, float]) -> str:
    """Markdown: what the judge of pictures itself gets on these pairs."""
    found = ", ".join(f"{100 * accuracy:.1f} on {name}" for name, accuracy in gold.items())
    return f"The gold score itself, read from the decoded latents: {found}. Raters err, and decoding loses a little.\n"


def _numbers(judged: Mapping[str, Judged], levels: Mapping[float, Calibration], command: str) -> dict[str, object]:
    return {
        "command": command,
        "accuracy": {
            name: {reading: round(float(np.nanmean(one.correct(reading))), 5) for reading in one.scores}
            for name, one in judged.items()
        },
        "calibration": {
            f"{sigma:g}": {
                "error": round(found.error, 5),
                "best_scale": round(found.scale, 4),
                "nll": round(found.nll, 5),
            }
            for sigma, found in levels.items()
        },
    }


def concept_section(name: str, judged: Judged, config: EvaluateRun) -> str:
    """Markdown: accuracy by what the pairs of a set differ in, at every level and for every ensemble."""
    levels = [*((sigma,) for sigma in sorted(config.sigmas)), *map(tuple, config.ensembles)]
    lines = [
        f"## By concept, on {name}",
        "",
        f"| concept | pairs | {' | '.join(f'sigma {Reading.at(*level).name}' for level in levels)} |",
        f"|---|---:|{'---:|' * len(levels)}",
    ]
    overall = [
        in_points(seeds_by_captions(table({0: {name: judged}}, name, accuracy_at(*level))), signed=False)
        for level in levels
    ]
    lines.append(f"| all | {len(judged.label)} | {' | '.join(overall)} |")
    concepts = np.array(judged.concept)
    for concept in sorted(set(judged.concept or ())):
        here = concepts == concept
        cells = [f"{100 * np.nanmean(accuracy_at(*level)(judged)[here]):.1f}" for level in levels]
        lines.append(f"| {concept} | {here.sum()} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
