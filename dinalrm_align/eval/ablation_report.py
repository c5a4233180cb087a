"""Write the report of an ablation: ablation.md, ablation.json and figures."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dinalrm_align.eval.ablation import (
    ABOUT_DIFFERENCES,
    Evidence,
    Runs,
    accuracy_at,
    inference_section,
    main_sets,
    noise_shares,
    question_section,
    tables_by_sigma,
    variance_section,
)
from dinalrm_align.eval.calibration import calibration_section, likelihood_at, reliabilities
from dinalrm_align.eval.config import ARMS, BASELINE, PAPER_ARMS, QUESTIONS, AblateRun
from dinalrm_align.eval.plots import plot_arms, plot_inference, plot_reliability
from dinalrm_align.eval.scores import NoiseLevels, level_name
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.train.files import write_atomically

MAIN_ARMS = (*PAPER_ARMS, "nll", "bradley_terry")
CALIBRATED_AT = (0.1, 0.4, 0.7, 0.9)


def write(runs: Runs, losses: Mapping[str, LossConfig], config: AblateRun, *, command: str, directory: Path) -> None:
    """Write the report of all finished variants. `losses`: variant -> loss that turns score gaps into probabilities."""
    sets, sigmas = list(config.test_sets or {}), sorted(config.sigmas)
    evidence = Evidence(runs, sets, sigmas, config.ensembles)
    first = next(iter(next(iter(runs.values())).values()))
    sizes = "; ".join(f"{name}: {first[name].size}" for name in sets)
    seeds = "; ".join(f"{arm} {', '.join(map(str, sorted(by_seed)))}" for arm, by_seed in runs.items())
    own = ", ".join(f"{arm} {ARMS[arm].sigma:g}" for arm in runs)
    sections = [
        f"# Ablations of the reward\n\n`{command}`\n\nModel {config.model}; {config.steps} updates per arm. Seeds: "
        f"{seeds}. Evaluated on {sizes}.\n\nPairwise accuracy in per cent with 95 % intervals over seeds and captions "
        f"(two crossed random effects). Own sigma: {own}. Ensemble: sigma {level_name(config.ensembles[0])} joined as "
        f"tokens.\n\n{ABOUT_DIFFERENCES}\n"
    ]
    for key, question in QUESTIONS.items():
        section = question_section(question, evidence)
        if section:
            sections.append(f"{section}\n![{question.title}]({key}.png)\n")
            plot_arms(evidence, question.arms, directory / f"{key}.png", title=question.title)
    main = replace(evidence, runs={arm: runs[arm] for arm in runs if arm in MAIN_ARMS})
    sections += [_by_sigma(main, name, losses, directory) for name in main_sets(evidence.sets) if main.runs]
    if BASELINE in runs:
        section = inference_section(evidence, BASELINE)
        sections.append(f"{section}\n![Noise levels at inference](inference.png)\n")
        plot_inference(evidence, BASELINE, directory / "inference.png")
        shares = noise_shares([run[sets[-1]] for run in runs[BASELINE].values()], config.draws, config.ensembles[0])
        sections += [variance_section(shares)] if shares else []
    write_atomically(directory / "ablation.md", "\n".join(sections))
    names = [NoiseLevels.at(*level).name for level in [*([sigma] for sigma in sigmas), config.ensembles[0]]]
    arms = {
        arm: {
            f"seed {seed}": {
                name: {at: round(scores.accuracy(at), 5) for at in names if at in scores.scores}
                for name, scores in found.items()
            }
            for seed, found in sorted(by_seed.items())
        }
        for arm, by_seed in runs.items()
    }
    numbers = {"command": command, "steps": config.steps, "arms": arms}
    write_atomically(directory / "ablation.json", json.dumps(numbers, indent=1) + "\n")


def _by_sigma(evidence: Evidence, name: str, losses: Mapping[str, LossConfig], directory: Path) -> str:
    """Return Markdown: accuracy on test set `name` by sigma and arm, and calibration of the arms of several levels."""
    accuracies = tables_by_sigma(evidence, name, lambda _, sigma: accuracy_at(sigma), evidence.sigmas)
    seen = ", ".join(f"{arm} at {ARMS[arm].sigma:g}" for arm in evidence.runs if ARMS[arm].has_one_level) or "none"
    text = f"## Accuracy on {name} by noise level\n\nTrained at one level: {seen}.\n\n{accuracies}\n"
    runs = {arm: by_seed for arm, by_seed in evidence.runs.items() if not ARMS[arm].has_one_level}
    if not runs:
        return text
    levels = [sigma for sigma in CALIBRATED_AT if sigma in evidence.sigmas] or evidence.sigmas
    curves, rest = reliabilities(runs, losses, name, levels), replace(evidence, runs=runs)
    plot_reliability(curves, directory / f"reliability_{name}.png")
    nll = tables_by_sigma(rest, name, lambda arm, sigma: likelihood_at(sigma, losses[arm]), levels, scale=1, digits=3)
    nll = f"NLL of the labels in nats, with intervals over seeds and captions; lower is better.\n\n{nll}"
    return f"{text}\n{calibration_section(curves, name)}\n{nll}\n\n![Reliability](reliability_{name}.png)\n"
