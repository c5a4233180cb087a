"""ReFL: align Stable Diffusion 3.5 Medium, or the small embedded world, to a reward that reads latents.

    python recipes/refl_sd35.py --reward dinalrm              SD3.5-M if its weights are at hand, else the small world
    python recipes/refl_sd35.py --reward pixel --seed 1       the same through the VAE and a CLIP-style reward
    python recipes/refl_sd35.py --resume runs/refl_shapes_dinalrm_seed0

Each update samples without gradient to a random late step, takes one step with gradient, scores the clean latents that
it points to, and climbs the score (arXiv 2304.05977; with --refl.grad_steps K it is DRaFT-K). As in DiNa-LRM's own runs
(arXiv 2602.11146), and unlike the original, the reward reads latents: no VAE is in the graph.

A run leaves config.yaml, metrics.jsonl, curves.png, grid_*.png of the same prompts and seeds before, during and after,
before_after.png, lora/ for StableDiffusion3Pipeline.load_lora_weights, checkpoints/ and summary.json.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.config.check import did_you_mean
from dinalrm_align.config.command import parse, refuse, refusing
from dinalrm_align.config.refl import ReflRun
from dinalrm_align.models import ModelSpec, load_gold, resolve_model

SD35_SETTINGS = Path(__file__).with_name("refl_sd35.yaml")


def settle(argv: Sequence[str]) -> tuple[ReflRun, str, ModelSpec, Path | None]:
    """The settings, the same as YAML, the model, and the checkpoint to resume."""
    run, _ = parse(ReflRun, __doc__, argv)  # --help ends here, before anything heavy is imported
    from dinalrm_align.resume import checkpoint_to_resume, new_run_folder, run_of, settings_of

    checkpoint, beneath = None, []
    if run.resume is not None:
        checkpoint = checkpoint_to_resume(Path(run.resume))
        if run.output_dir and Path(run.output_dir).resolve() != run_of(checkpoint):
            refuse(f"--resume goes on in {run_of(checkpoint)}: leave out --output_dir {run.output_dir}")
        beneath = [settings_of(checkpoint)]
        run, _ = parse(ReflRun, __doc__, argv, beneath)
    if run.reward not in ("dinalrm", "pixel") and not Path(run.reward).is_dir() and "/" not in run.reward:
        near = did_you_mean(run.reward, ("dinalrm", "pixel")) or ";"
        refuse(f"unknown reward {run.reward!r}{near} known: dinalrm, pixel, or a latent one's folder or hub id")
    if run.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        refuse("--tracker wandb needs the package wandb: pip install 'dinalrm-align[wandb]'")
    if run.model == "auto" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        refuse("--model auto: each of several processes would choose for itself; name the model")
    spec, reason = resolve_model(run.model)
    print(reason, flush=True)
    if checkpoint is None and spec.kind == "sd35":
        beneath = [SD35_SETTINGS]
    name = f"refl_{Path(spec.name).name}_{Path(run.reward).name}_seed{run.seed}"
    folder = run_of(checkpoint) if checkpoint else new_run_folder(run.output_dir, name)
    # What "auto" and the defaults came to is written down, so that a resumed run is the same run.
    settled = [*argv, "--model", spec.name, "--output_dir", str(folder), "--resume", "null"]
    return *parse(ReflRun, __doc__, settled, beneath), spec, checkpoint


def align(run: ReflRun, text: str, spec: ModelSpec, checkpoint: Path | None) -> None:
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    from dinalrm_align import LatentReward
    from dinalrm_align.align.evaluation import HeldOut
    from dinalrm_align.align.refl import Refl
    from dinalrm_align.cost import PhaseMeter
    from dinalrm_align.data.prompts import read_captioned_pictures, read_prompts
    from dinalrm_align.device import available_device
    from dinalrm_align.digest import fingerprint, text_digest
    from dinalrm_align.durable import write_atomically
    from dinalrm_align.encode import PromptEncoder, decode_latents, encode_images, load_pipeline
    from dinalrm_align.loop import Hook, adamw, fit
    from dinalrm_align.pixel.clip import ClipReward
    from dinalrm_align.policy import Conditions, Policy
    from dinalrm_align.report import plot_run
    from dinalrm_align.sampling import schedule_sigmas

    if run.device != "auto":
        available_device(run.device)
    accelerator = Accelerator(
        cpu=run.device == "cpu", mixed_precision="no", log_with=None if run.tracker == "none" else run.tracker
    )
    set_seed(run.seed % 2**31, device_specific=True)  # of all that draws globally
    device, folder = accelerator.device, Path(run.output_dir)
    dtype = run.dtype if run.dtype != "auto" else spec.dtype if device.type == "cuda" else "float32"
    width, height = run.width or spec.width, run.height or spec.height
    gold = load_gold(spec, device=device)
    prompts = read_prompts(Path(run.prompts or spec.train_prompts))
    heldout = read_prompts(Path(run.eval_prompts or spec.heldout_prompts))
    samples = [heldout[index % len(heldout)] for index in range(run.evaluation.samples)]
    pictures = read_captioned_pictures(Path(run.refl.pretrain_pictures)) if run.refl.pretrain_pictures else None
    gold(torch.zeros(len(samples), 3, height, width), samples)  # it may know neither this size nor these prompts
    accelerator.print(f"run in {folder}: reward {run.reward}, {len(prompts)} prompts, {dtype} on {device}")
    accelerator.init_trackers("dinalrm_align")

    # The base model, frozen. The reward shares its weights, so it is made before the policy wraps them.
    pipeline = load_pipeline(spec.pipeline, dtype=getattr(torch, dtype)).to(device)
    if run.reward == "pixel":
        reward = ClipReward.from_pretrained(spec.pixel, processor=spec.pixel_processor, vae=pipeline.vae, device=device)
    else:
        reward = LatentReward.from_pretrained(spec.reward if run.reward == "dinalrm" else run.reward, pipeline=pipeline)

    identity = {  # a checkpoint of another run is not resumed from
        "recipe": "refl_sd35", "seed": str(run.seed), "base model": fingerprint(pipeline.transformer),
        "reward": fingerprint(reward), "list of prompts": text_digest("\n".join(prompts)),
    }  # fmt: skip

    # Every prompt is encoded once, for policy and reward; then the text encoders are let go.
    encoder = PromptEncoder(pipeline, text_length=spec.text_length, device=device)
    if isinstance(reward, LatentReward) and reward.config.text_length == spec.text_length:
        encoder = reward.encoder
    elif isinstance(reward, LatentReward):
        Conditions.encode(reward.encoder, [*prompts, *samples])  # to fill its cache
    train, judged, negative = (Conditions.encode(encoder, part) for part in (prompts, samples, [""]))
    if pictures is not None:
        images = [image.resize((width, height)) for image in pictures[0]]
        latents = torch.cat([encode_images(pipeline.vae, [image]).cpu() for image in images])
        pictures = latents, Conditions.encode(encoder, pictures[1])
    pipeline.text_encoder = pipeline.text_encoder_2 = pipeline.text_encoder_3 = None
    torch.cuda.empty_cache()

    policy = Policy(pipeline.transformer, run.policy, seed=run.seed)
    if run.refl.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
        reward.enable_gradient_checkpointing()
    factor = pipeline.vae_scale_factor
    shape = (pipeline.transformer.config.in_channels, height // factor, width // factor)
    meter = PhaseMeter(device)
    refl = Refl(
        policy=policy, reward=reward, config=run.refl, meter=meter, latent_shape=shape,
        sigmas=schedule_sigmas(pipeline.scheduler, run.refl.num_steps or spec.num_steps),
        guidance_scale=spec.guidance_scale if run.refl.guidance_scale is None else run.refl.guidance_scale,
        conditions=train, negative=negative, pictures=pictures,
        seed=run.seed, rank=accelerator.process_index, num_processes=accelerator.num_processes,
    )  # fmt: skip
    if run.refl.pretrain_weight > 0 and pictures is None:
        refl.pictures = refl.reference_samples(run.refl.pretrain_samples)
    held_out = HeldOut(
        velocity_for=refl.velocity_for, conditions=judged, latent_shape=shape, guidance_scale=spec.guidance_scale,
        sigmas=schedule_sigmas(pipeline.scheduler, spec.num_steps), reward=reward, gold=gold,
        decode=lambda latents: torch.cat([decode_latents(pipeline.vae, part) for part in latents.split(4)]),
        config=run.evaluation, accelerator=accelerator, output_dir=folder,
    )  # fmt: skip

    def export(step: int) -> None:
        if accelerator.is_main_process:
            policy.save_lora(folder / "lora")
            plot_run(folder)

    fit(
        run.loop, run.optim, parameters=policy.parameters,
        optimizer=adamw([{"params": list(policy.parameters.values())}], run.optim),
        batch_at=refl.batch_at, step=refl.step, accelerator=accelerator, output_dir=folder, resume=checkpoint,
        hooks=[
            Hook(run.evaluation.every, held_out),
            Hook(run.loop.checkpoint_every, export, at_start=False, at_stop=True),
        ],
        identity=identity, settings=text,
        meter=meter, profile_every=run.profile_every, shown=("reward", "gold", "kl", "grad_norm"),
        resume_command=f"python {sys.argv[0]} --resume {folder}",
    )  # fmt: skip

    accelerator.end_training()
    if accelerator.is_main_process:
        plot_run(folder)
        scores = held_out.summarise(run.loop.steps)
        settings = {"model": spec.name, "reward": run.reward, "seed": run.seed, "updates": run.loop.steps}
        write_atomically(folder / "summary.json", json.dumps({**settings, "samples": len(samples), **scores}, indent=2))
        print(f"pictures: {folder / 'before_after.png'}; curves: {folder / 'curves.png'}; LoRA: {folder / 'lora'}")
        for name, score in scores.items():
            gain = f"gain {score['gain']:+.4f}, standard error of the paired difference {score['standard_error']:.4f}"
            print(f"{name} {score['before']:.4f} -> {score['after']:.4f}: {gain}")


def main(argv: Sequence[str] | None = None) -> None:
    with refusing():
        align(*settle(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
