"""Ablate DiNa-LRM's design choices: train a reward for each variant (arm) and seed, and test all on the same pairs.

    python recipes/ablate_reward.py        # the paper's questions, 5 seeds: 25 trainings, 6 hours of a core (estimate)
    python recipes/ablate_reward.py --arms '[bradley_terry, nll]' --seeds '[0, 1, 2]'  # more; finished arms are kept
    python recipes/ablate_reward.py --model sd35 --pairs DIR --test_sets '{hpdv3: DIR, hpdv2: DIR}' \\
        --launch "accelerate launch --num_processes 8"

An arm is recipes/train_reward.py with a few options changed. The arms include the variants of arXiv 2602.11146, section
5. The same command continues a stopped ablation. When the pairs are finished, two processes may share output_dir if
their arms differ. The recipe writes a report (ablation.md, ablation.json and one figure per research question) and, for
each run, a folder arms/ARM/seedN. In that folder, scores_SET.safetensors holds the run's scores on the test set SET.
"""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.resolve import parse_for_model
from dinalrm_align.eval.config import ARMS, BASELINE, AblateRun, Changes
from dinalrm_align.models.specs import ModelSpec
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.train.command import parse, refuse, refusing, run_process

HERE = Path(__file__).parent


def resolve(argv: Sequence[str]) -> tuple[AblateRun, ModelSpec, Path, dict[str, tuple[Changes, TrainRewardRun]]]:
    """Return settings, model, path of the baseline YAML, and a dict that maps arms to (changes, training settings)."""
    with refusing():
        config, spec, reason = parse_for_model(AblateRun, __doc__, Path(__file__), argv)
    print(reason, flush=True)
    if spec.kind != "shapes" and (config.pairs is None or not config.test_sets):
        refuse(f"{spec.name} has no pairs of its own; expected --pairs DIR and --test_sets '{{name: DIR}}'")
    training = Path(config.training) if config.training else HERE / f"train_reward_{spec.kind}.yaml"
    baseline, _ = parse(TrainRewardRun, "", [], [training])
    changes = {name: arm.options(baseline.reward) for name, arm in ARMS.items()}
    arms = {name: (made, parse(TrainRewardRun, "", options(made), [training])[0]) for name, made in changes.items()}
    return config, spec, training, arms


def options(changes: Changes) -> list[str]:
    """Return `changes` (dotted option name -> value) as command-line arguments `--name=value`."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]


def runs_of(out: Path, arm: str) -> dict[int, Path]:
    """Return the folders of an arm's runs, by seed."""
    folders = [run for run in (out / "arms" / arm).glob("seed*") if re.fullmatch("seed(0|[1-9][0-9]*)", run.name)]
    return dict(sorted((int(run.name.removeprefix("seed")), run) for run in folders))


def check_run(run: Path, config: AblateRun, spec: ModelSpec, training: Path, changes: Changes) -> str:
    """Return the settings of a run as JSON. Refuses settings other than those of the run that the folder `run` has."""
    settings = {"changes": changes, "steps": config.steps, "training": training.read_text(encoding="utf-8")}
    made_here = Path(config.pairs).is_relative_to(config.output_dir)  # then the pairs record their settings themselves
    settings |= {"model": spec.name, "pairs": None if made_here else config.pairs}
    stored = run / "settings.json"
    before = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    for name in before:  # earlier versions stored fewer
        if before[name] != json.loads(json.dumps(settings[name])):
            got = f"{name}: got {settings[name]!r:.120}; expected {before[name]!r:.120}, as in {stored}"
            refuse(f"{got}: choose another --output_dir, or delete that run")
    return json.dumps(settings, indent=1)


def train_arm(arm: str, seed: int, config: AblateRun, spec: ModelSpec, training: Path, changes: Changes) -> Path:
    """Train one variant (`arm`) with one seed in a subprocess, or resume it. Returns the folder of the run."""
    from dinalrm_align.eval.test_sets_config import TEST_SETS
    from dinalrm_align.train.checkpoints import latest_checkpoint
    from dinalrm_align.train.files import write_atomically

    run = Path(config.output_dir) / "arms" / arm / f"seed{seed}"
    write_atomically(run / "settings.json", check_run(run, config, spec, training, changes))
    if (run / "reward" / "config.json").exists():
        return run
    if latest_checkpoint(run) is not None:
        words = ["--resume", str(run)]
    else:
        given = {
            "model": spec.name, "pairs": config.pairs, "seed": seed, "loop.steps": config.steps, "output_dir": str(run),
            "accuracy.sigmas": [ARMS[arm].sigma], "accuracy.ensemble": [], "accuracy.every": 0,
        }  # fmt: skip
        own = [where for name, where in config.test_sets.items() if name not in TEST_SETS]  # no public ones
        given |= {"validation_pairs": own[0]} if own else {}
        words = ["--config", str(training), *options({**given, **changes})]
    words += options({"on_bad": config.on_bad} if config.on_bad else {})
    launcher = shlex.split(config.launch) if config.launch else [sys.executable]
    command = [*launcher, str(HERE / "train_reward.py"), *words, f"--device={config.device}"]
    print(f"\n{arm}, seed {seed}: {shlex.join(command)}", flush=True)
    if status := run_process(command):
        refuse(f"training {arm}, seed {seed} exited with status {status}; run the same command to continue")
    return run


def main(argv: Sequence[str] | None = None) -> None:
    with refusing(stopped="finished trainings and scores are stored; run the same command to continue"):
        ablate(sys.argv[1:] if argv is None else list(argv))


def ablate(words: Sequence[str]) -> None:
    config, spec, training, arms = resolve(words)
    check_sources(spec, {})

    import torch

    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval import ablation_report
    from dinalrm_align.eval.ablation import levels_to_evaluate, levels_with_draws, main_sets
    from dinalrm_align.eval.evaluator import Candidate, Evaluator, open_image_sets, scores_file
    from dinalrm_align.eval.scores import NoiseLevels, PairScores
    from dinalrm_align.models.pipeline import load_pipeline, load_transformer
    from dinalrm_align.shapes.pairs import ensure_pairs
    from dinalrm_align.train.device import available_device

    out, baseline = Path(config.output_dir), arms[BASELINE][1]
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = available_device(default if config.device == "auto" else config.device)
    dtype = getattr(torch, spec.dtype) if device.type == "cuda" else torch.float32

    # ------------------------------------------------------------------------------------------- pairs and evaluator
    if spec.kind == "shapes":
        held_out = config.shapes_pairs.held_out_kinds
        kinds = ["train"] * (config.pairs is None) + held_out * (config.test_sets is None)
        pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
        made = {kind: ensure_pairs(kind, out / "pairs" / kind, pipeline, config.shapes_pairs) for kind in kinds}
        config.pairs = config.pairs or str(made["train"])
        config.test_sets = config.test_sets or {kind: str(made[kind]) for kind in held_out}
    transformer = load_transformer(spec.pipeline, dtype=dtype).to(device).requires_grad_(False)
    encoders = Encoders(spec.pipeline, text_length=baseline.reward.text_length, device=device, dtype=dtype)
    size = baseline.height or spec.reward_size, baseline.width or spec.reward_size
    on_bad = config.on_bad or baseline.on_bad
    image_sets = open_image_sets(config.test_sets, on_bad=on_bad)
    settings = dict(noise_seed=config.noise_seed, on_bad=on_bad, image_sets=image_sets)
    evaluator = Evaluator(config.test_sets, encoders, size, config.batch_size, **settings)

    for arm, (changes, _) in arms.items():  # refused here, and not after hours of training
        for run in runs_of(out, arm).values():
            check_run(run, config, spec, training, changes)

    # ---------------------------------------------------------------------- train and evaluate every arm, seed by seed
    def scores(arm: str, seed: int) -> dict[str, PairScores]:
        run = train_arm(arm, seed, config, spec, training, arms[arm][0])
        ensembles = config.ensembles if arm == BASELINE else config.ensembles[:1]
        by_level = config.test_sets if arm == BASELINE else main_sets(config.test_sets)
        own = [ARMS[arm].sigma]
        levels = {
            name: levels_to_evaluate(config.sigmas if name in by_level else own, ensembles) for name in config.test_sets
        }
        if arm == BASELINE:
            levels[[*levels][-1]] += levels_with_draws(config.draws, config.ensembles[0])
        candidate = Candidate.from_checkpoint(run / "reward", lambda: transformer)
        return evaluator(candidate, levels, run, title=f"{arm}, seed {seed}")

    for seed in config.seeds:
        for arm in config.arms:
            levels = NoiseLevels.at(ARMS[arm].sigma).name, NoiseLevels.at(*config.ensembles[0]).name
            for name, found in scores(arm, seed).items():
                accuracies = ", ".join(f"{100 * found.accuracy(level):.1f} % at sigma {level}" for level in levels)
                print(f"{arm}, seed {seed}: {name} {accuracies}", flush=True)

    # -------------------------------------------------------------------------- report all finished runs in the folder
    finished: dict[str, dict[int, dict[str, PairScores]]] = {}
    for arm in ARMS:
        for seed, run in runs_of(out, arm).items():
            if all(scores_file(run, name).exists() for name in config.test_sets):
                finished.setdefault(arm, {})[seed] = scores(arm, seed)
    command = shlex.join(["python", "recipes/ablate_reward.py", *words])
    losses = {arm: arms[arm][1].loss for arm in finished}
    ablation_report.write(finished, losses, config, command=command, directory=out)
    print(f"\nreport: {out / 'ablation.md'}")


if __name__ == "__main__":
    main()
