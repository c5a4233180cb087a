"""Train a DiNa-LRM (arXiv 2602.11146): a reward that reads noised latents with the first blocks of a diffusion model.

    python recipes/train_reward.py                             the embedded world, on pairs that it makes itself
    python recipes/train_reward.py --model sd35 --pairs DIR    the paper's settings, train_reward_sd35.yaml, on pairs
                                                               from recipes/prepare_pairs.py

Each update passes chosen and rejected images through the backbone in one forward pass. The images of a prompt share the
noise and the noise level sigma. The preference probability p is a Gaussian CDF of the score difference, with a variance
that grows with sigma, and the loss is 1 - sqrt(p). The reward head and the backbone's LoRA are trained.

Unlike the released code, this recipe evaluates and saves a moving average of the weights and can resume runs. It also
encodes all text once before training, and the noise depends only on seed and step.

A run writes config.yaml, metrics.jsonl, checkpoints/, the accuracy on held-out pairs (accuracy.json, per_concept.md,
accuracy_vs_sigma.png) and the trained reward in reward/.
"""

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.data.formats import folder_layout
from dinalrm_align.models.specs import ModelSpec, check_sides, resolve_model
from dinalrm_align.reward.config import TrainRewardRun
from dinalrm_align.reward.needs import check_sources
from dinalrm_align.train.command import refuse, refusing
from dinalrm_align.train.metrics import open_tracker, track_folder
from dinalrm_align.train.run import begin_run, complete_run, resume_command

RECIPE = Path(__file__)


def resolve(argv: Sequence[str]) -> tuple[TrainRewardRun, str, ModelSpec, Path | None]:
    """Return the settings, the text of config.yaml, the model, and the checkpoint to resume from (or None).

    Without --config, the defaults of a new run come from train_reward_sd35.yaml or train_reward_shapes.yaml.
    """
    given, checkpoint = begin_run(TrainRewardRun, __doc__, argv)
    spec, reason = resolve_model(given.model)
    has_config = any(word.split("=")[0] == "--config" for word in argv)
    defaults = [] if has_config else [RECIPE.with_name(f"train_reward_{spec.kind}.yaml")]
    run, text = complete_run(
        TrainRewardRun, RECIPE, argv, checkpoint, model=spec.name, defaults=defaults,
        name=lambda run: f"train_reward_{Path(spec.name).name}_seed{run.seed}",
    )  # fmt: skip
    if run.pairs is None and spec.kind != "shapes":
        refuse(f"pairs: got none, and {spec.name} has none of its own; pass --pairs with a folder or a jsonl file")
    check_sides(spec, height=run.height, width=run.width)
    print(reason, flush=True)
    return run, text, spec, checkpoint


def train(run: TrainRewardRun, text: str, spec: ModelSpec, checkpoint: Path | None) -> None:
    import torch

    from dinalrm_align.align.publish import push_run
    from dinalrm_align.eval.accuracy import evaluate_pairs
    from dinalrm_align.models.pipeline import load_transformer
    from dinalrm_align.reward import training
    from dinalrm_align.reward.checkpoint import write_reward
    from dinalrm_align.reward.model import build_reward_model
    from dinalrm_align.reward.sharding import shard_model, sharding_asked
    from dinalrm_align.train.checkpoints import check_identity
    from dinalrm_align.train.device import start_accelerator
    from dinalrm_align.train.digest import fingerprint
    from dinalrm_align.train.hub import check_login
    from dinalrm_align.train.identity import settings_by_name
    from dinalrm_align.train.loop import Hook, RunFolder, fit
    from dinalrm_align.train.state import RunState, adamw

    if run.push_to_hub is not None:
        check_login(run.push_to_hub)
    distributed = dict(minutes=run.loop.timeout, tracker=run.tracker)
    accelerator, dtype = start_accelerator(run, spec.dtype, **distributed, autocast=True)
    device, folder = accelerator.device, Path(run.output_dir)
    accelerator.print(f"run {folder} on {device}, base weights in {dtype}")
    open_tracker(accelerator, run.tracker, folder, text, checkpoint)

    reward = training.config_for(run.reward, spec.pipeline, folder / "reward")
    pairs, validation, digests = training.open_training_pairs(
        run, spec, reward, accelerator, dtype=getattr(torch, dtype)
    )
    check_identity(checkpoint, digests)  # before the transformer is loaded
    world = accelerator.num_processes
    accelerator.print(f"one epoch: {len(pairs) // world} batches of {run.batch_size} on each of {world} processes")

    # The reward: a frozen backbone with a LoRA, and a head.
    transformer = load_transformer(spec.pipeline, dtype=getattr(torch, dtype)).to(device)
    identity = {  # a checkpoint with another identity cannot be resumed
        "recipe": "train_reward",
        "seed": str(run.seed),
        "base model": fingerprint(transformer),
        "reward": training.config_digest(reward),
        **digests,
    }
    model = build_reward_model(reward, transformer, seed=run.seed)
    training.start_from(run.init_from if checkpoint is None else None, model)
    del transformer  # frees the blocks that the reward does not use
    if run.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if sharded := sharding_asked():
        shard_model(accelerator, model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def evaluate(step: int) -> dict[str, float]:
        score = functools.partial(training.score_batch, model.eval())
        options = dict(seed=run.accuracy.seed, directory=folder, title=f"update {step}", in_step=sharded)
        return evaluate_pairs(score, validation, run.accuracy.levels(), accelerator, **options)

    def export(step: int) -> None:
        if accelerator.is_main_process:
            write_reward(folder / "reward", reward, model.tuned_tensors())

    with training.RewardTraining(model, pairs, run, accelerator) as method:
        optimizer = adamw(training.parameter_groups(parameters, run.lora_lr), run.optim)
        state = dict(optimizer=optimizer, identity=identity, samples=method.samples, settings=settings_by_name(run))
        fit(
            run.loop,
            run.optim,
            RunState.initial(parameters, run.loop, run.optim, **state),
            method,
            accelerator=accelerator,
            run=RunFolder(folder, text, checkpoint, resume_command(RECIPE, folder)),
            hooks=[Hook(run.accuracy.every, evaluate, at_start=False), Hook(0, export, at_start=False)],
            shown=("loss", "train_accuracy", "grad_norm"),
        )
    track_folder(accelerator, folder / "reward", f"{folder.name}-reward")
    accelerator.end_training()
    weights = run.loop.weights_at(run.loop.steps)
    accelerator.print(f"reward: {folder / 'reward'} (weights: {weights}); accuracy: {folder / 'per_concept.md'}")
    if run.push_to_hub is not None and accelerator.is_main_process:
        push_run(folder, run.push_to_hub)


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        run, text, spec, checkpoint = resolve(sys.argv[1:] if argv is None else list(argv))
        layouts = {folder_layout(Path(path)) for path in (run.pairs, run.validation_pairs) if path}
        encoded = layouts and layouts <= {"latents", "mined"}  # no encoder is called
        check_sources(spec, {}, parts=("transformer",) if encoded else ())
        train(run, text, spec, checkpoint)


if __name__ == "__main__":
    main()
