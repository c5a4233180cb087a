"""Write the report of an ablation: ablation.md, ablation.json and figures."""

import json
from collections.abc import Mapping
from pathlib import Path

from dinalrm_align.eval.ablation import (
    Evidence,
    Runs,
    inference_section,
    noise_shares,
    question_section,
    variance_section,
)
from dinalrm_align.eval.calibration import calibration_section, reliabilities
from dinalrm_align.eval.config import ARMS, BASELINE, QUESTIONS, AblateRun
from dinalrm_align.eval.plots import plot_arms, plot_inference, plot_noise_shares, plot_reliability
from dinalrm_align.eval.scores import NoiseLevels, level_name
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.train.files import write_atomically

LIKELIHOODS = ("calibrated", "fixed", "nll", "bradley_terry")  # arms whose likelihood differs from the other arms'
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
        f"(two crossed random effects); differences are paired, in points. Own sigma: {own}. Ensemble: sigma "
        f"{level_name(config.ensembles[0])} joined as tokens. All levels: the mean over levels between 0 and 1.\n"
    ]
    for key, question in QUESTIONS.items():
        section = question_section(question, evidence)
        if section:
            sections.append(f"{section}\n![{question.title}]({key}.png)\n")
            plot_arms(evidence, question.arms, directory / f"{key}.png", title=question.title)
    if BASELINE in runs:
        section = inference_section(evidence, BASELINE)
        sections.append(f"{section}\n![Noise levels at inference](inference.png)\n")
        plot_inference(evidence, BASELINE, directory / "inference.png")
        shares = noise_shares([run[sets[-1]] for run in runs[BASELINE].values()], config.draws, config.ensembles[0])
        if shares:
            sections.append(f"{variance_section(shares)}\n![Variance over noise draws](variance.png)\n")
            plot_noise_shares(shares, directory / "variance.png")
    levels = [sigma for sigma in CALIBRATED_AT if sigma in sigmas] or sigmas
    curves = reliabilities({arm: runs[arm] for arm in runs if arm in LIKELIHOODS}, losses, sets[0], levels)
    sections.append(f"{calibration_section(curves, sets[0])}\n![Reliability](reliability.png)\n")
    plot_reliability(curves, directory / "reliability.png")
    write_atomically(directory / "ablation.md", "\n".join(sections))
    names = [NoiseLevels.at(*level).name for level in [*([sigma] for sigma in sigmas), config.ensembles[0]]]
    arms: dict[str, object] = {}
    for arm, by_seed in runs.items():
        arms[arm] = {
            f"seed {seed}": {name: {at: round(found[name].accuracy(at), 5) for at in names} for name in found}
            for seed, found in sorted(by_seed.items())
        }
    numbers = {"command": command, "steps": config.steps, "arms": arms}
    write_atomically(directory / "ablation.json", json.dumps(numbers, indent=1) + "\n")
