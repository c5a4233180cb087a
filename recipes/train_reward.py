"""Train a DiNa-LRM (arXiv 2602.11146): a reward that reads noised latents with the first blocks of a diffusion model.

    python recipes/train_reward.py                                        # the embedded world, on pairs it makes itself
    python recipes/train_reward.py --model sd35 --pairs DIR               # the paper's recipe (train_reward_sd35.yaml),
                                                                          # DIR as recipes/prepare_pairs.py writes it

One update: pictures of a prompt share one noise and one noise level sigma; all of them, chosen and rejected, go through
the backbone in ONE forward; the gap of two scores becomes a probability under a rater whose variance grows with sigma,
and one minus the square root of the probability of what was preferred is the loss. LoRA and head are trained.

Differences from the released code: the moving average of the weights really runs, and is what is evaluated and saved;
runs resume; text is encoded once, beforehand; noise is a function of seed and step.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.models.specs import ModelSpec, resolve_model
from dinalrm_align.reward.training_config import TrainRewardRun
from dinalrm_align.train.command import parse, refuse, refusing
from dinalrm_align.train.files import reading
from dinalrm_align.train.tracking import check_tracker, open_tracker, tracker_options

HERE = Path(__file__).parent


def settle(argv: Sequence[str]) -> tuple[TrainRewardRun, str, ModelSpec, str, Path | None]:
    """The run's settings, the same as YAML, the model, why that one, and the checkpoint to resume.

    Beneath what is typed lie the settings of the run to resume; or, without a --config, those of the model's kind.
    output_dir is the folder of the run, whichever way it was chosen.
    """
    config, _ = parse(TrainRewardRun, __doc__, argv)  # --help ends here, before anything heavy is imported
    from dinalrm_align.train.checkpoints import checkpoint_to_resume, new_run_folder, run_of, settings_of

    checkpoint, beneath = None, []
    if config.resume:
        checkpoint = checkpoint_to_resume(Path(config.resume))
        folder, beneath = run_of(checkpoint), [settings_of(checkpoint)]
        if config.output_dir is not None and Path(config.output_dir).resolve() != folder.resolve():
            refuse(f"a run goes on in its own folder {folder}: leave --output_dir {config.output_dir} out")
        config, _ = parse(TrainRewardRun, __doc__, argv, beneath)
    spec, reason = resolve_model(config.model)
    if checkpoint is None:
        folder = new_run_folder(config.output_dir, f"train_reward_{Path(spec.name).name}_seed{config.seed}")
        if not any(word.split("=")[0] == "--config" for word in argv):
            beneath = [HERE / f"train_reward_{spec.kind}.yaml"]
    # What "auto" and the defaults came to is written down, so that a resumed run is the same run.
    settled = [*argv, "--model", spec.name, "--output_dir", str(folder), "--resume", "null"]
    config, text = parse(TrainRewardRun, __doc__, settled, beneath)
    check_tracker(config.tracker)
    if config.pairs is None and spec.kind != "shapes":
        refuse(f"{spec.name} has no pairs of its own: pass --pairs with a directory of latents or a jsonl of pictures")
    return config, text, spec, reason, checkpoint


def make_shapes_pairs(config: TrainRewardRun, spec: ModelSpec, directory: Path) -> None:
    """Let the embedded world write pairs to train on and pairs to be judged by, unless they are there."""
    import torch

    from dinalrm_align.models.pipeline import load_pipeline
    from dinalrm_align.shapes.pairs import ensure_pairs

    pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
    for kind in ("train", "concepts"):
        ensure_pairs(kind, directory / kind, pipeline, config.shapes_pairs)


def _base_model_id(pipeline: str, folder: Path) -> str:
    """What the reward in `folder` calls its base model: a hub id, or a path from there, so that both can be moved."""
    return os.path.relpath(pipeline, folder) if Path(pipeline).is_dir() else pipeline


def train(config: TrainRewardRun, text: str, spec: ModelSpec, reason: str, checkpoint: Path | None) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import gather_object, set_seed
    from diffusers import AutoencoderKL

    from dinalrm_align.data.pairs import PairBatch
    from dinalrm_align.data.prefetch import Prefetched
    from dinalrm_align.data.source import Encoders, open_pairs
    from dinalrm_align.eval.accuracy import merge, metrics, pairwise_tallies, write_report
    from dinalrm_align.flow.noise import seeded_generator
    from dinalrm_align.models.pipeline import load_transformer
    from dinalrm_align.reward.checkpoint import save_checkpoint
    from dinalrm_align.reward.model import build_reward_model
    from dinalrm_align.reward.sharding import shard_base, sharding_asked
    from dinalrm_align.reward.training import NoisedPairs, draw_levels, preference_step, score_batch
    from dinalrm_align.train.device import available_device
    from dinalrm_align.train.digest import fingerprint, text_digest
    from dinalrm_align.train.distributed import waiting
    from dinalrm_align.train.durable import write_atomically
    from dinalrm_align.train.loop import Closures, Hook, RunFolder, fit
    from dinalrm_align.train.optim import adamw
    from dinalrm_align.train.state import RunState

    # ------------------------------------------------------------------------------------- where: device and folder
    if config.device != "auto":
        available_device(config.device)
    on_gpu = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    dtype = (spec.dtype if on_gpu else "float32") if config.dtype == "auto" else config.dtype
    run = Path(config.output_dir)
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if on_gpu and dtype != "float32" else "no",
        kwargs_handlers=[waiting(config.loop.timeout)],
        **tracker_options(config.tracker, run),
    )
    set_seed(config.seed % 2**31, device_specific=True)  # of dropout and all else that draws globally
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    accelerator.print(f"{reason}\nrun {run} on {device}, base weights in {dtype}")
    open_tracker(accelerator, config.tracker, run, text, checkpoint)

    # ---------------------------------------------------------------------- what: pairs, and a reward to train on them
    with reading("VAE", spec.pipeline):
        vae = AutoencoderKL.load_config(spec.pipeline, subfolder="vae")
    reward = dataclasses.replace(
        config.reward,
        base_model_id=_base_model_id(spec.pipeline, run / "reward"),
        vae_scaling_factor=vae["scaling_factor"],
        vae_shift_factor=vae.get("shift_factor") or 0.0,
    )
    train_path, validation_path = config.pairs, config.validation_pairs
    if train_path is None:
        if accelerator.is_main_process:
            make_shapes_pairs(config, spec, run / "pairs")
        accelerator.wait_for_everyone()
        train_path, validation_path = run / "pairs" / "train", validation_path or run / "pairs" / "concepts"
    size = (config.height or spec.height, config.width or spec.width)
    weights_dtype = getattr(torch, dtype)
    encoders = Encoders(spec.pipeline, text_length=reward.text_length, device=device, dtype=weights_dtype)
    options = dict(size=size, batch_size=config.batch_size, seed=config.seed)
    held_out = 0 if validation_path else config.held_out_prompts
    pairs = open_pairs(train_path, reward, encoders, held_out_prompts=held_out, on_bad=config.on_bad, **options)
    if validation_path:
        judged = open_pairs(validation_path, reward, encoders, **options).in_order()
    else:
        judged = pairs.validation()
    accelerator.print(f"an epoch is {len(pairs) // world} batches of {config.batch_size} for each of {world} processes")

    transformer = load_transformer(spec.pipeline, dtype=weights_dtype).to(device)
    settings = {name: value for name, value in reward.to_dict().items() if name != "base_model_id"}  # where it lies
    identity = {  # a checkpoint of another run is not resumed from
        "recipe": "train_reward",
        "seed": str(config.seed),
        "base model": fingerprint(transformer),
        "reward": text_digest(json.dumps(settings, sort_keys=True)),
        "list of pairs": pairs.digest(),
    }
    model = build_reward_model(reward, transformer, seed=config.seed)
    del transformer  # and with it the blocks that the reward does not use
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if sharded := sharding_asked():  # FSDP: the frozen backbone is spread over the processes
        shard_base(accelerator, None, [model.trunk])
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_head = {name: p for name, p in parameters.items() if name.startswith("head.")}
    of_lora = [p for name, p in parameters.items() if name not in of_head]
    lora_lr = config.optim.lr if config.lora_lr is None else config.lora_lr
    groups = [{"params": list(of_head.values())}] + ([{"params": of_lora, "lr": lora_lr}] if of_lora else [])
    state = RunState.initial(
        parameters,
        config.loop,
        config.optim,
        optimizer=adamw(groups, config.optim),
        identity=identity,
        samples=config.batch_size * config.loop.accumulate * world,
    )

    # ------------------------------------------------------------------------------------------------- how: one update
    def read(micro_step: int) -> PairBatch:
        batch = pairs.batch_at(micro_step, rank, world)
        return batch.pinned() if device.type == "cuda" and pairs.reads_files_only else batch

    # Pictures are encoded by the device that trains: only what lies encoded on disk is read ahead.
    batches = Prefetched(read, ahead=config.prefetch if pairs.reads_files_only else 0)

    def batch_at(micro_step: int) -> NoisedPairs:
        batch = batches(micro_step).to(device)
        first = (micro_step * world + rank) * config.batch_size  # the number of a group decides what is drawn for it
        generators = [seeded_generator(config.seed, first + group) for group in range(batch.num_groups)]
        return draw_levels(batch, config.train_sigma, generators)

    def step(drawn: NoisedPairs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return preference_step(model.train(), drawn, config.loss)

    def evaluate(at: int) -> dict[str, float]:
        """Accuracy on the held-out pairs: accuracy.json, per_concept.md, accuracy_vs_sigma.png."""
        model.eval()

        def score(batch: PairBatch, level: tuple[float, ...], noise: torch.Tensor) -> torch.Tensor:
            return score_batch(model, batch, level, noise)

        levels, left_over = config.accuracy.levels(), len(judged) % world
        with accelerator.autocast():
            part = pairwise_tallies(score, judged, levels, seed=config.accuracy.seed, rank=rank, world=world)
            if sharded and 0 < left_over <= rank:
                pairwise_tallies(score, [judged[0]], levels)  # for nothing: all processes call the backbone as often
        tallies = merge(gather_object([part]))
        if accelerator.is_main_process:
            write_report(tallies, run, title=f"update {at}")
        return metrics(tallies)

    def export(at: int) -> None:
        if accelerator.is_main_process:
            save_checkpoint(run / "reward", reward, model.tuned_tensors())

    if accelerator.is_main_process and checkpoint is None:
        write_atomically(run / "config.yaml", text)
    with batches:
        fit(
            config.loop,
            config.optim,
            state,
            Closures(batch_at, step, count=lambda drawn: drawn.count),
            accelerator=accelerator,
            run=RunFolder(run, checkpoint=checkpoint, resume_command=f"python recipes/train_reward.py --resume {run}"),
            hooks=[Hook(config.accuracy.every, evaluate, at_start=False), Hook(0, export, at_start=False)],
            shown=("loss", "train_accuracy", "grad_norm"),
        )
    accelerator.end_training()
    accelerator.print(f"the reward is in {run / 'reward'}, its accuracy in {run / 'per_concept.md'}")


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        train(*settle(sys.argv[1:] if argv is None else list(argv)))


if __name__ == "__main__":
    main()
