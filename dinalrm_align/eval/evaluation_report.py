"""The report of one reward: evaluation.md, evaluation.json, figures, and the scores of every pair."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dinalrm_align.eval import test_set_report
from dinalrm_align.eval.ablation import Evidence, accuracy_of, arm_accuracy, in_points
from dinalrm_align.eval.ablation_plots import plot_inference
from dinalrm_align.eval.calibration_report import calibration_section, plot_reliability, reliabilities
from dinalrm_align.eval.config import EvaluateRun
from dinalrm_align.eval.inference import SINGLE_LEVEL, inference_section
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, PairScores
from dinalrm_align.eval.test_set_report import SetResult
from dinalrm_align.train.files import write_atomically

REWARD = "reward"
"""The single arm of this report."""


def write(
    results: Sequence[SetResult], gold: Mapping[str, float], config: EvaluateRun, *, command: str, directory: Path
) -> None:
    """Write the report. Sections on noise levels and calibration (on the first set) are for latent rewards.

    gold: set -> accuracy of the gold score; empty if it was not evaluated.
    """
    sets = {result.name: result.scores for result in results}
    evidence = Evidence({REWARD: {0: sets}}, list(sets), sorted(config.sigmas), config.ensembles)
    first, levels = results[0].name, main_levels(config, results[0].scores)
    values: dict[str, object] = {"command": command, "sets": test_set_report.numbers(results)}
    values["accuracy"] = {
        name: {level: round(scores.accuracy(level), 5) for level in scores.scores} for name, scores in sets.items()
    }
    sections = [_preface(sets, config, command)]
    if gold:
        found = ", ".join(f"{100 * value:.1f} on {name}" for name, value in gold.items())
        sections.append(
            f"Accuracy of the gold score on decoded latents: {found}. Labels are noisy; decoding is lossy.\n"
        )
    sections.append(test_set_report.section(results, levels))
    concepts = [concept_section(name, evidence) for name, scores in sets.items() if scores.concept is not None]
    if levels == [NO_NOISE.name]:
        sections += concepts
    else:
        curves = reliabilities(evidence.runs, {REWARD: config.loss}, first, config.calibrated_at)
        sections += [
            "![Accuracy against sigma](accuracy_vs_sigma.png)\n",
            inference_section(evidence, REWARD),
            "![Noise levels at inference](inference.png)\n",
            *concepts,
            calibration_section(curves, first),
            "![Reliability](reliability.png)\n",
        ]
        test_set_report.plot_levels(results, directory / "accuracy_vs_sigma.png")
        plot_inference(evidence, REWARD, directory / "inference.png")
        plot_reliability(curves, directory / "reliability.png")
        values["calibration"] = {
            f"{sigma:g}": dict(error=round(one.error, 5), best_scale=round(one.scale, 4), nll=round(one.nll, 5))
            for sigma, one in curves[REWARD].items()
        }
    for result in results:
        test_set_report.write_pairs(result.scores, directory / f"pairs_{result.name}.jsonl")
    values["gold"] = {name: round(value, 5) for name, value in gold.items()}
    write_atomically(directory / "evaluation.md", "\n".join(sections))
    write_atomically(directory / "evaluation.json", json.dumps(values, indent=1) + "\n")


def main_levels(config: EvaluateRun, scores: PairScores) -> list[str]:
    """The noise levels of the main results: the paper's single level and the first ensemble, if there are any."""
    if NO_NOISE.name in scores.scores:
        return [NO_NOISE.name]
    return [NoiseLevels.at(SINGLE_LEVEL).name, NoiseLevels.at(*config.ensembles[0]).name]


def _preface(sets: Mapping[str, PairScores], config: EvaluateRun, command: str) -> str:
    sizes = "; ".join(f"{name}: {scores.size}" for name, scores in sets.items())
    return (
        f"# Evaluation of a reward\n\n`{command}`\n\nReward {config.reward or f'of {config.model}'}. Evaluated on "
        f"{sizes}. Pairwise accuracy in per cent, 95 % intervals over captions; with one reward, the variance between "
        "seeds is unknown.\n"
    )


def concept_section(name: str, evidence: Evidence) -> str:
    """Markdown: accuracy on a set by what the pairs differ in, at every noise level."""
    scores = evidence.runs[REWARD][0][name]
    levels = sorted(scores.scores, key=lambda level: ("+" in level, level))
    header = ["concept", "pairs", *(level if level == NO_NOISE.name else f"sigma {level}" for level in levels)]
    overall = [in_points(arm_accuracy(evidence, REWARD, name, accuracy_of(level)), signed=False) for level in levels]
    rows = [["all", len(scores.label), *overall]]
    concepts = np.array(scores.concept)
    for concept in sorted(set(scores.concept or ())):
        here = concepts == concept
        cells = [f"{100 * np.nanmean(scores.correct(level)[here]):.1f}" for level in levels]
        rows.append([concept, here.sum(), *cells])
    return f"## By concept, on {name}\n\n{table(header, rows)}\n"
