"""Which of DiNa-LRM's choices matter? Train a reward per arm and seed, judge all of them on the same held-out pairs.

    python recipes/ablate_reward.py                                      # the paper's questions, 3 seeds: about 2 hours
    python recipes/ablate_reward.py --arms '[calibrated, nll]'           # one more arm; what is finished is not redone
    python recipes/ablate_reward.py --model sd35 --pairs DIR --judged '{hpdv3: DIR, hpdv2: DIR}' \\
        --steps 25000 --launch "accelerate launch --num_processes 8"

Every arm is one run of recipes/train_reward.py with a few options changed (arXiv 2602.11146, section 5, and more):
equal steps, equal data, equal judgement. Stopped, it goes on where it was; two may work in one folder, on other arms.

output_dir gets arms/ARM/seedN (the runs, and judged_SET.safetensors: all scores), ablation.md, ablation.json and one
picture for each question.
"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.eval.ablation_config import ARMS, BASELINE, AblateRun, Changes
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.reward.training_config import TrainRewardRun
from dinalrm_align.train.command import parse, refuse, refusing

HERE = Path(__file__).parent
STARTED_BY = "settings.json"


def settle(argv: Sequence[str]) -> tuple[AblateRun, ModelSpec, Path, dict[str, tuple[Changes, TrainRewardRun]]]:
    """The settings, the model, the YAML that arms change, and each arm's changes and what they come to. Torch-free."""
    config, _ = parse(AblateRun, __doc__, argv)
    with refusing():
        spec, reason = resolve_model(config.model)
    print(reason, flush=True)
    if spec.kind != "shapes" and (config.pairs is None or not config.judged):
        refuse(f"{spec.name} has no pairs of its own: pass --pairs DIR and --judged '{{name: DIR}}'")
    training = Path(config.training) if config.training else HERE / f"train_reward_{spec.kind}.yaml"
    baseline, _ = parse(TrainRewardRun, "", [], [training])
    changes = {name: arm.options(baseline.reward) for name, arm in ARMS.items()}
    arms = {name: (made, parse(TrainRewardRun, "", options(made), [training])[0]) for name, made in changes.items()}
    return config, spec, training, arms


def options(changes: Changes) -> list[str]:
    """Dotted options and their values as words of a command line."""
    return [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items()]


def train(arm: str, seed: int, config: AblateRun, spec: ModelSpec, training: Path, changes: Changes) -> Path:
    """Train one arm with one seed, or finish it, in a program of its own; the folder of the run."""
    from dinalrm_align.train.checkpoints import latest_checkpoint
    from dinalrm_align.train.durable import write_atomically

    run = Path(config.output_dir) / "arms" / arm / f"seed{seed}"
    started = {"changes": changes, "steps": config.steps, "training": training.read_text(encoding="utf-8")}
    before = run / STARTED_BY
    if before.exists() and json.loads(before.read_text(encoding="utf-8")) != json.loads(json.dumps(started)):
        refuse(f"{run} was started with other settings ({before}); choose another --output_dir, or delete that run")
    write_atomically(before, json.dumps(started, indent=1))
    if (run / "reward" / "config.json").exists():
        return run
    device = [f"--device={config.device}"]
    if latest_checkpoint(run) is not None:
        words = ["--resume", str(run), *device]
    else:
        first = next(iter(config.judged.values()))
        level = {"accuracy.sigmas": [ARMS[arm].sigma], "accuracy.ensemble": [], "accuracy.every": 0}
        given = {"model": spec.name, "pairs": config.pairs, "validation_pairs": first, "seed": seed}
        own = {"loop.steps": config.steps, "output_dir": str(run), **level}
        words = ["--config", str(training), *options({**given, **own, **changes}), *device]
    command = [*(shlex.split(config.launch) if config.launch else [sys.executable]), str(HERE / "train_reward.py")]
    print(f"\n{arm}, seed {seed}: {shlex.join([*command, *words])}", flush=True)
    process = subprocess.Popen([*command, *words])
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # the training was told as well: it saves, and ends
            continue
    if status:
        refuse(f"training {arm}, seed {seed} ended with status {status}; the same command goes on where it was")
    return run


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    config, spec, training, arms = settle(words)

    import torch
    from diffusers import StableDiffusion3Pipeline

    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval import ablation_report as report
    from dinalrm_align.eval.evaluator import Evaluator, image_sets, scores_file
    from dinalrm_align.eval.inference import common_readings, draw_readings, ensemble_readings
    from dinalrm_align.eval.scores import PairScores
    from dinalrm_align.models.pipeline import load_transformer
    from dinalrm_align.shapes.pairs import JUDGED, ensure_pairs
    from dinalrm_align.train.device import available_device

    out, baseline = Path(config.output_dir), arms[BASELINE][1]
    with refusing():
        found = "cuda" if torch.cuda.is_available() else "cpu"
        device = available_device(found if config.device == "auto" else config.device)
    dtype = getattr(torch, spec.dtype) if device.type == "cuda" else torch.float32

    # ------------------------------------------------------------- what: pairs to train on, and pairs to be judged by
    if spec.kind == "shapes":
        kinds = (["train"] if config.pairs is None else []) + ([*JUDGED] if config.judged is None else [])
        pipeline = StableDiffusion3Pipeline.from_pretrained(spec.pipeline, local_files_only=True)
        made = {kind: ensure_pairs(kind, out / "pairs" / kind, pipeline, config.shapes_pairs) for kind in kinds}
        config.pairs = config.pairs or str(made["train"])
        config.judged = config.judged or {kind: str(made[kind]) for kind in JUDGED}
    transformer = load_transformer(spec.pipeline, dtype=dtype).to(device).requires_grad_(False)
    encoders = Encoders(spec.pipeline, text_length=baseline.reward.text_length, device=device, dtype=dtype)
    size = (baseline.height or spec.height, baseline.width or spec.width)

    with refusing():
        pictures = image_sets(config.judged)
    evaluator = Evaluator(
        config.judged, transformer, encoders, size, config.batch_size, config.noise_seed, pictures=pictures
    )  # fmt: skip

    # ------------------------------------------------------------------------- how: every arm, seed by seed, then judge
    def judged(arm: str, seed: int) -> dict[str, PairScores]:
        run = train(arm, seed, config, spec, training, arms[arm][0])
        readings = {name: common_readings(config.sigmas, config.ensembles[0]) for name in config.judged}
        if arm == BASELINE:
            readings = {name: taken + ensemble_readings(config.ensembles) for name, taken in readings.items()}
            readings[[*readings][-1]] += draw_readings(config.draws, config.ensembles[0])
        return evaluator(run / "reward", readings, run, title=f"{arm}, seed {seed}")

    for seed in config.seeds:
        for arm in config.arms:
            print(report.line(arm, seed, judged(arm, seed), config.ensembles[0]), flush=True)

    # ------------------------------------------------ so what: tables, pictures and words, of all that is finished here
    evidence: dict[str, dict[int, dict[str, PairScores]]] = {arm: {} for arm in ARMS}
    for arm, seeds in evidence.items():
        for run in sorted((out / "arms" / arm).glob("seed*")):
            if all(scores_file(run, name).exists() for name in config.judged):
                seed = int(run.name.removeprefix("seed"))
                seeds[seed] = judged(arm, seed)
    command = shlex.join(["python", "recipes/ablate_reward.py", *words])
    finished = {arm: seeds for arm, seeds in evidence.items() if seeds}
    report.write(finished, {arm: arms[arm][1].loss for arm in finished}, config, command=command, directory=out)
    print(f"\ntables: {out / 'ablation.md'}; pictures beside it")


if __name__ == "__main__":
    main()
