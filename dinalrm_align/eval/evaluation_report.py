"""evaluation.md, evaluation.json and pictures: accuracy, ways of reading, concepts and calibration of one reward."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinalrm_align.eval import test_set_report
from dinalrm_align.eval.ablation import accuracy_of_mean, in_points, table
from dinalrm_align.eval.ablation_plots import plot_ways
from dinalrm_align.eval.calibration import Calibration
from dinalrm_align.eval.calibration_report import calibration_section, plot_reliability, reliabilities
from dinalrm_align.eval.config import EvaluateRun
from dinalrm_align.eval.inference import DRAWN_AT, inference_section
from dinalrm_align.eval.report.intervals import seeds_by_captions
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, PairScores
from dinalrm_align.eval.test_set_report import SetResult
from dinalrm_align.train.durable import write_atomically

REWARD = "reward"


def write(
    found: Sequence[SetResult], gold: Mapping[str, float], config: EvaluateRun, *, command: str, directory: Path
) -> None:
    """Write the report of one reward's scores on every set. Ways of reading and calibration, the latter on the first
    set, are of rewards that are read at noise levels. gold: set -> accuracy of the gold score, where it was asked for.
    """
    judged = {one.name: one.judged for one in found}
    evidence, sets, headline = {REWARD: {0: judged}}, list(judged), headline_readings(config, found[0].judged)
    sizes = [f"{name}: {one.size}" for name, one in judged.items()]
    sections = [
        f"# Evaluation of a reward\n\n`{command}`\n\nReward {config.reward or f'of {config.model}'}. Judged on "
        f"{'; '.join(sizes)}. Pairwise accuracy in per cent, 95 % intervals over captions; one reward, so that the "
        "variance between seeds is unknown.\n",
        *([gold_section(gold)] if gold else []),
        test_set_report.section(found, headline),
    ]
    values: dict[str, object] = {"command": command, "sets": test_set_report.numbers(found)}
    values["accuracy"] = {
        name: {reading: round(float(np.nanmean(one.correct(reading))), 5) for reading in one.scores}
        for name, one in judged.items()
    }
    concepts = [concept_section(name, one) for name, one in judged.items() if one.concept is not None]
    if headline == [NO_NOISE.name]:
        sections += concepts
    else:
        curves = reliabilities(evidence, {REWARD: config.loss}, sets[0], config.calibrated_at)
        sections += [
            "![Accuracy against sigma](accuracy_vs_sigma.png)\n",
            inference_section(evidence, REWARD, sets, sorted(config.sigmas), config.ensembles),
            "![Ways of reading](inference.png)\n",
            *concepts,
            calibration_section(curves, sets[0]),
            "![Reliability](reliability.png)\n",
        ]
        test_set_report.plot_levels(found, directory / "accuracy_vs_sigma.png")
        plot_ways(evidence, REWARD, sets, sorted(config.sigmas), config.ensembles, directory / "inference.png")
        plot_reliability(curves, directory / "reliability.png")
        values["calibration"] = _calibration(curves[REWARD])
    for one in found:
        test_set_report.write_pairs(one.judged, directory / f"pairs_{one.name}.jsonl")
    values["gold"] = {name: round(p, 5) for name, p in gold.items()}
    write_atomically(directory / "evaluation.md", "\n".join(sections))
    write_atomically(directory / "evaluation.json", json.dumps(values, indent=1) + "\n")


def headline_readings(config: EvaluateRun, judged: PairScores) -> list[str]:
    """The readings that stand for a reward: the paper's single level and the first ensemble, or its one score."""
    if NO_NOISE.name in judged.scores:
        return [NO_NOISE.name]
    return [NoiseLevels.at(DRAWN_AT).name, NoiseLevels.at(*config.ensembles[0]).name]


def gold_section(gold: Mapping[str, float]) -> str:
    """Markdown: what the judge of pictures itself gets on these pairs."""
    found = ", ".join(f"{100 * accuracy:.1f} on {name}" for name, accuracy in gold.items())
    return f"The gold score itself, read from the decoded latents: {found}. Raters err, and decoding loses a little.\n"


def _calibration(levels: Mapping[float, Calibration]) -> dict[str, object]:
    return {
        f"{sigma:g}": {
            "error": round(found.error, 5),
            "best_scale": round(found.scale, 4),
            "nll": round(found.nll, 5),
        }
        for sigma, found in levels.items()
    }


def concept_section(name: str, judged: PairScores) -> str:
    """Markdown: accuracy by what the pairs of a set differ in, in every way it was read."""
    readings = sorted(judged.scores, key=lambda reading: ("+" in reading, reading))
    heads = [reading if reading == NO_NOISE.name else f"sigma {reading}" for reading in readings]
    lines = [
        f"## By concept, on {name}",
        "",
        f"| concept | pairs | {' | '.join(heads)} |",
        f"|---|---:|{'---:|' * len(readings)}",
    ]
    overall = [
        in_points(seeds_by_captions(table({0: {name: judged}}, name, accuracy_of_mean(reading))), signed=False)
        for reading in readings
    ]
    lines.append(f"| all | {len(judged.label)} | {' | '.join(overall)} |")
    concepts = np.array(judged.concept)
    for concept in sorted(set(judged.concept or ())):
        here = concepts == concept
        cells = [f"{100 * np.nanmean(judged.correct(reading)[here]):.1f}" for reading in readings]
        lines.append(f"| {concept} | {here.sum()} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
