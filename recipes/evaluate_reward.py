"""Evaluate a finished reward: accuracy on test sets by protocol and by noise level sigma, and calibration.

    python recipes/evaluate_reward.py                                               # the embedded world's own reward
    python recipes/evaluate_reward.py --reward runs/train_reward_shapes_seed0/reward
    python recipes/evaluate_reward.py --reward pixel                                # or any other named reward
    python recipes/evaluate_reward.py --model sd35 --test_sets '{hpdv3: DIR, hpdv2: DIR, imagereward: DIR,
        genai_bench: hub}' --trained_on HPDv3/train.json                            # the public test sets
    python recipes/evaluate_reward.py --model sd35 --reward hpsv3 --test_sets '{hpdv3: DIR}' --output_dir runs/hpsv3

Accuracy is the share of pairs whose preferred image scores higher. A protocol defines how ties count and how pairs are
averaged; dinalrm_align/eval/test_sets_config.py lists test sets and protocols. Intervals reflect the choice of
captions, but not the training seed (recipes/ablate_reward.py trains several). Calibration compares predicted preference
probabilities with observed frequencies; --loss.likelihood must be the likelihood with which the reward was trained.
"""

import dataclasses
import functools
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.align.resolve import parse_for_model
from dinalrm_align.eval.config import EvaluateRun
from dinalrm_align.eval.test_sets_config import holds_images
from dinalrm_align.models.specs import ModelSpec, check_sides
from dinalrm_align.reward.names import parse_reward
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.train.command import refuse, refusing


def resolve(words: Sequence[str]) -> tuple[EvaluateRun, ModelSpec]:
    """Return the settings and the model. `--help` exits in this function, before torch is imported."""
    config, spec, reason = parse_for_model(EvaluateRun, __doc__, Path(__file__), words)
    spec = spec.with_text_length(config.text_length)
    if spec.kind != "shapes" and not config.test_sets:
        refuse(f"{spec.name} has no test sets of its own; expected --test_sets '{{name: DIR}}'")
    if config.checkpoint is not None or "dinalrm" in {term.name for term in parse_reward(config.reward)}:
        check_sides(spec, size=config.size)
    if config.output_dir is None:
        named = re.sub(r"[^\w.+-]+", "_", config.reward or "dinalrm")[-100:]
        config.output_dir = f"runs/evaluate_{Path(spec.name).name}_{named}"
    print(reason, flush=True)
    return config, spec


def check_files(config: EvaluateRun, spec: ModelSpec) -> None:
    """Raise FileNotFoundError that names all files of the model and the rewards that are missing."""
    reward = config.reward or "dinalrm"
    latents = config.test_sets is None or not all(map(holds_images, config.test_sets, config.test_sets.values()))
    gold = spec.gold if config.gold and latents else None
    parts = () if latents or "dinalrm" in {term.name for term in parse_reward(reward)} else None
    check_sources(spec, {"reward": reward, "gold": gold}, parts=parts)


def evaluate(config: EvaluateRun, spec: ModelSpec, command: str) -> None:
    import torch
    from diffusers import SD3Transformer2DModel

    from dinalrm_align.data.formats.record import Dropped
    from dinalrm_align.data.source import Encoders
    from dinalrm_align.eval import evaluation_report
    from dinalrm_align.eval.ablation import levels_to_evaluate
    from dinalrm_align.eval.evaluator import Candidate, Evaluator, faults_file, open_image_sets
    from dinalrm_align.eval.test_sets import leaked, read_trained
    from dinalrm_align.models.pipeline import load_pipeline, load_transformer
    from dinalrm_align.reward.registry import load_image_scorer, load_reward, text_lengths
    from dinalrm_align.shapes.pairs import ensure_pairs
    from dinalrm_align.train.device import available_device
    from dinalrm_align.train.files import read_json

    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = available_device(default if config.device == "auto" else config.device)
    own = spec.dtype if device.type == "cuda" else "float32"
    dtype = getattr(torch, own if config.dtype == "auto" else config.dtype)
    out = Path(config.output_dir)

    # --------------------------------------------- checkpoint and test sets: checked before anything large is loaded
    @functools.cache
    def transformer() -> SD3Transformer2DModel:
        return load_transformer(spec.pipeline, dtype=dtype).to(device).requires_grad_(False)

    source = config.checkpoint
    candidate = (
        None if source is None else Candidate.from_checkpoint(source or spec.reward, transformer, config.text_length)
    )
    unseen = Dropped(config.on_bad)  # records of the training data that are left out
    trained = None if config.trained_on is None else read_trained(config.trained_on, unseen)
    if unseen.counts:
        print(f"training data: {unseen}")
    image_sets = open_image_sets(config.test_sets or {}, unpack_to=out / "sets", on_bad=config.on_bad)
    if config.test_sets is None:
        pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
        config.test_sets = {
            kind: str(ensure_pairs(kind, out / "pairs" / kind, pipeline, config.shapes_pairs))
            for kind in config.shapes_pairs.held_out_kinds
        }
    has_latents = config.test_sets.keys() > image_sets.keys()

    # ------------------------------------------------------------------------------------------------------ the reward
    lengths = {config.text_length} if config.text_length else text_lengths(config.reward or "dinalrm", spec)
    if len(lengths) > 1:
        refuse(f"reward: its parts read {sorted(lengths)} T5 tokens; expected one number: pass --text_length")
    length = next(iter(lengths), spec.text_length)
    encoders = Encoders(spec.pipeline, text_length=length, device=device, dtype=dtype)
    if candidate is None:
        reads_latents = "dinalrm" in {term.name for term in parse_reward(config.reward)}
        vae, shared = encoders.vae if has_latents else None, transformer() if reads_latents else None
        options = {"dinalrm": {"text_length": config.text_length}} if reads_latents else {}
        place = dict(vae=vae, transformer=shared, device=device, dtype=None if config.dtype == "auto" else dtype)
        reward = load_reward(config.reward, spec=spec, options=options, **place)
        candidate = Candidate.from_reward(config.reward, reward)
    if config.dtype != "auto":  # scores of another dtype in output_dir are refused
        candidate = dataclasses.replace(candidate, identity=f"{candidate.identity} {config.dtype}")

    # ------------------------------------------------------------------- scores, once; then accuracy by every protocol
    size = (config.size or spec.reward_size,) * 2
    settings = config.batch_size, config.noise_seed, config.fit, config.on_bad
    evaluator = Evaluator(config.test_sets, encoders, size, *settings, image_sets)
    gold = {}
    if config.gold and has_latents:
        gold = evaluator.gold_accuracy(load_image_scorer(spec.gold, spec=spec, device=device), candidate.config)
    levels = levels_to_evaluate(config.sigmas, config.ensembles)
    all_scores = evaluator(candidate, {name: levels for name in config.test_sets}, out, title="reward")
    results = []
    for name, scores in all_scores.items():
        faults = faults_file(out, name)
        leak = None if trained is None else leaked(scores, trained, image_sets.get(name))
        found = read_json(faults) if faults.exists() else {}
        results.append(evaluation_report.evaluate_set(name, scores, config, leak=leak, faults=found))
    evaluation_report.write(results, gold, config, command=command, directory=out)
    print((out / "evaluation.md").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    with refusing(stopped="finished scores are stored; run the same command to continue"):
        config, spec = resolve(words)
        check_files(config, spec)
        evaluate(config, spec, shlex.join(["python", "recipes/evaluate_reward.py", *words]))


if __name__ == "__main__":
    main()
