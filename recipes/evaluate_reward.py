"""How good is a finished reward? Accuracy on test sets under named protocols, ways of reading it, and calibration.

    python recipes/evaluate_reward.py                                               # the embedded world's own reward
    python recipes/evaluate_reward.py --reward runs/train_reward_shapes_seed0/reward
    python recipes/evaluate_reward.py --reward pixel                                # or any reward that has a name
    python recipes/evaluate_reward.py --model sd35 --size 1024 --judged '{hpdv3: DIR, hpdv2: DIR, imagereward: DIR,
        genai_bench: hub}' --trained_on HPDv3/train.json                            # the public test sets
    python recipes/evaluate_reward.py --model sd35 --reward hpsv3 --judged '{hpdv3: DIR}' --output_dir runs/hpsv3

Accuracy: how often the picture a rater preferred scores higher; what becomes of ties, and over what is averaged, is the
protocol's (dinalrm_align/config/test_sets.py lists them and the sets). Intervals are over captions: one reward says
nothing of other seeds (recipes/ablate_reward.py trains several). Latent rewards encode pictures, and are read at every
noise level and as an ensemble; rewards over pictures see them as they are. Calibration: whether the probabilities that
the reward's likelihood (--loss.likelihood, as it was trained) gives to preferences are the observed frequencies.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.eval.config import EvaluateRun
from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.train.command import parse, refuse, refusing


def settle(words: Sequence[str]) -> tuple[EvaluateRun, ModelSpec]:
    """The settings and the model."""
    config, _ = parse(EvaluateRun, __doc__, words)  # --help ends here, before anything heavy is imported
    with refusing():
        spec, reason = resolve_model(config.model)
    if spec.kind != "shapes" and not config.judged:
        refuse(f"{spec.name} has no pairs of its own: pass --judged '{{name: DIR}}'")
    print(reason, flush=True)
    return config, spec


def evaluate(config: EvaluateRun, spec: ModelSpec, command: str) -> None:
    import torch

    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval import evaluation_report as report
    from dinalrm_align.eval.evaluator import Candidate, Evaluator, faults_file, image_sets
    from dinalrm_align.eval.inference import common_readings, ensemble_readings
    from dinalrm_align.eval.leakage import leaked, read_trained
    from dinalrm_align.eval.test_set_report import evaluate_set
    from dinalrm_align.models.pipeline import load_pipeline, load_transformer
    from dinalrm_align.models.vae import decode_latents
    from dinalrm_align.reward.checkpoint import read_checkpoint
    from dinalrm_align.reward.registry import load_judge, load_reward
    from dinalrm_align.shapes.pairs import JUDGED, ensure_pairs
    from dinalrm_align.train.device import available_device
    from dinalrm_align.train.files import read_json

    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = available_device(found if config.device == "auto" else config.device)
    dtype = getattr(torch, spec.dtype) if device.type == "cuda" else torch.float32
    out = Path(config.output_dir)

    # ------------------------------------------------------- on what, and what: found before anything large is loaded
    checkpoint, about = config.checkpoint, None
    if checkpoint is not None:
        checkpoint = checkpoint or spec.reward
        about = read_checkpoint(checkpoint).config
    trained = None if config.trained_on is None else read_trained(config.trained_on)
    pictures = image_sets(config.judged or {}, unpack_to=out / "sets")
    if config.judged is None:
        pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
        config.judged = {
            kind: str(ensure_pairs(kind, out / "pairs" / kind, pipeline, config.shapes_pairs)) for kind in JUDGED
        }
    latents = config.judged.keys() - pictures.keys()

    # ----------------------------------------------------------------------------------------- the reward, by any name
    transformer, text_length = None, spec.text_length if about is None else about.text_length
    if config.reads_latents:
        transformer = load_transformer(spec.pipeline, dtype=dtype).to(device).requires_grad_(False)
    encoders = Encoders(spec.pipeline, text_length=text_length, device=device, dtype=dtype)
    if checkpoint is not None:
        candidate = Candidate.from_checkpoint(checkpoint, transformer)
    else:
        vae = encoders.vae if latents else None  # rewards over pictures see them as they are, without a VAE
        reward = load_reward(config.reward, spec=spec, vae=vae, transformer=transformer, device=device)
        candidate = Candidate.of(config.reward, reward)

    # -------------------------------------------------------------------- how: every picture once, then every protocol
    side = (config.size, config.size) if config.size else (spec.height, spec.width)
    evaluator = Evaluator(
        config.judged, transformer, encoders, side, config.batch_size, config.noise_seed, config.fit, config.on_bad,
        pictures,
    )  # fmt: skip
    readings = [*common_readings(config.sigmas, config.ensembles[0]), *ensemble_readings(config.ensembles)]
    agreed = {}
    if config.gold and latents:
        agreed = evaluator.gold(
            load_judge(spec.gold, spec=spec, device=device),
            lambda batch: torch.cat([decode_latents(encoders.vae, part) for part in batch.to(device).split(4)]),
            about,
        )
    scores = evaluator(candidate, {name: readings for name in config.judged}, out, title="reward")

    found = []
    for name, judged in scores.items():
        faults = read_json(faults_file(out, name)) if faults_file(out, name).exists() else {}
        found.append(
            evaluate_set(
                name,
                judged,
                report.headline_readings(config, judged),
                protocol=config.protocol.get(name),
                leak=None if trained is None else leaked(judged, trained, pictures.get(name)),
                faults=faults,
                draws=config.bootstrap,
            )  # fmt: skip
        )
    report.write(found, agreed, config, command=command, directory=out)
    print((out / "evaluation.md").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        config, spec = settle(words)
        with refusing():
            evaluate(config, spec, shlex.join(["python", "recipes/evaluate_reward.py", *words]))
    except KeyboardInterrupt:
        print("\nstopped: scores that were taken are kept, and the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
