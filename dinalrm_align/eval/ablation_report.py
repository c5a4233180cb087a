"""ablation.md, ablation.json and a picture for each question, out of the scores of all arms and seeds."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dinalrm_align.eval.ablation import Evidence, accuracy_at, question_section
from dinalrm_align.eval.ablation_config import ARMS, BASELINE, QUESTIONS, AblateRun
from dinalrm_align.eval.ablation_plots import plot_arms, plot_noise_shares, plot_ways
from dinalrm_align.eval.calibration_report import calibration_section, plot_reliability, reliabilities
from dinalrm_align.eval.inference import inference_section, noise_shares, variance_section
from dinalrm_align.eval.scores import NoiseLevels, PairScores
from dinalrm_align.reward.loss_config import LossConfig
from dinalrm_align.train.durable import write_atomically

LIKELIHOODS = ("calibrated", "fixed", "nll", "bradley_terry")
"""Arms that differ in what they predict; the others share the baseline's likelihood."""
CALIBRATED_AT = (0.1, 0.4, 0.7, 0.9)


def line(arm: str, seed: int, judged: Mapping[str, PairScores], ensemble: list[float]) -> str:
    """One finished run in one line: accuracy on each set at the arm's own sigma and of the ensemble."""
    parts = []
    for name, scores in judged.items():
        own, joined = (
            100 * float(np.nanmean(measure(scores)))
            for measure in (accuracy_at(ARMS[arm].sigma), accuracy_at(*ensemble))
        )
        parts.append(f"{name} {own:.1f} % at sigma {ARMS[arm].sigma:g}, ensemble {joined:.1f} %")
    return f"{arm}, seed {seed}: {'; '.join(parts)}"


def write(
    evidence: Evidence, losses: Mapping[str, LossConfig], config: AblateRun, *, command: str, directory: Path
) -> None:
    """Write the report of all that is finished. losses: how each arm was trained, for its predicted probabilities."""
    sets = list(config.judged or {})
    sigmas, ensemble = sorted(config.sigmas), config.ensembles[0]
    sections = [_preface(evidence, config, sets, command)]
    for key, question in QUESTIONS.items():
        section = question_section(question, evidence, sets, sigmas, ensemble)
        if section:
            sections.append(f"{section}\n![{question.title}]({key}.png)\n")
            plot_arms(evidence, question.arms, sets, sigmas, directory / f"{key}.png", title=question.title)
    if BASELINE in evidence:
        section = inference_section(evidence, BASELINE, sets, sigmas, config.ensembles)
        sections.append(f"{section}\n![Reading a finished reward](inference.png)\n")
        plot_ways(evidence, BASELINE, sets, sigmas, config.ensembles, directory / "inference.png")
        seeds = [judged[sets[-1]] for judged in evidence[BASELINE].values()]
        shares = noise_shares(seeds, config.draws, ensemble)
        if shares:
            sections.append(f"{variance_section(shares)}\n![Variance over noise draws](variance.png)\n")
            plot_noise_shares(shares, directory / "variance.png")
    levels = [sigma for sigma in CALIBRATED_AT if sigma in sigmas] or sigmas
    curves = reliabilities({arm: runs for arm, runs in evidence.items() if arm in LIKELIHOODS}, losses, sets[0], levels)
    sections.append(f"{calibration_section(curves, sets[0])}\n![Reliability](reliability.png)\n")
    plot_reliability(curves, directory / "reliability.png")
    write_atomically(directory / "ablation.md", "\n".join(sections))
    write_atomically(directory / "ablation.json", json.dumps(_numbers(evidence, config, command), indent=1) + "\n")


def _preface(evidence: Evidence, config: AblateRun, sets: list[str], command: str) -> str:
    first = next(iter(next(iter(evidence.values())).values()))
    sizes = [f"{name}: {first[name].size}" for name in sets]
    seeds = "; ".join(f"{arm} {', '.join(map(str, sorted(runs)))}" for arm, runs in evidence.items())
    return "\n".join(
        [
            "# Ablations of the reward",
            "",
            f"`{command}`",
            "",
            f"Model {config.model}; {config.steps} updates an arm. Seeds: {seeds}. Judged on {'; '.join(sizes)}.",
            "",
            "Pairwise accuracy in per cent with 95 % intervals over seeds and captions (two crossed random effects); "
            "differences are paired, in points. Own sigma: "
            + ", ".join(f"{arm} {ARMS[arm].sigma:g}" for arm in evidence)
            + f". Ensemble: sigma {'+'.join(f'{sigma:g}' for sigma in config.ensembles[0])} joined as tokens. All "
            "levels: the mean over single levels between 0 and 1.",
            "",
        ]
    )


def _numbers(evidence: Evidence, config: AblateRun, command: str) -> dict[str, object]:
    """Accuracies run by run at every level, to look at in other ways."""
    readings = [NoiseLevels.at(sigma) for sigma in sorted(config.sigmas)] + [NoiseLevels.at(*config.ensembles[0])]
    return {
        "command": command,
        "steps": config.steps,
        "arms": {
            arm: {
                f"seed {seed}": {
                    name: {
                        reading.name: round(float(np.nanmean(judged.correct(reading.name))), 5) for reading in readings
                    }
                    for name, judged in sets.items()
                }
                for seed, sets in sorted(runs.items())
            }
            for arm, runs in evidence.items()
        },
    }
