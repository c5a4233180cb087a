"""Mine preference pairs: sample a model and rank the samples by a latent reward, without decoding images.

    python recipes/mine_pairs.py                         the embedded world, or SD3.5-M if its weights are found
    python recipes/mine_pairs.py --model sd35 --prompts my_prompts.txt --mine.candidates 8
    python recipes/mine_pairs.py --lora runs/refl_shapes_dinalrm_seed0/lora --output_dir runs/second_round

Each prompt is sampled several times. The best and the worst sample become a pair of latents, stored with the prompt's
embeddings. Two programs train on the pairs: `python recipes/dpo_sd35.py --dpo.mode offline --pairs FOLDER`, and
verl-omni with `data.train_files=FOLDER/pairs` (dinalrm_align/data/mined_pairs.py lists the columns). The recipe needs
pyarrow: pip install 'dinalrm-align[data]'.

After a stop, the same command resumes: complete files are kept, and the pairs are those of an uninterrupted run.
"""

import dataclasses
import importlib.util
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from dinalrm_align.align.mining_config import MineRun
from dinalrm_align.align.resolve import parse_for_model
from dinalrm_align.models.specs import ModelSpec, check_sides
from dinalrm_align.reward.needs import Need, check_sources, lora_need, missing_reward
from dinalrm_align.train.command import refuse, refusing


def settings_and_model(argv: Sequence[str] | None) -> tuple[MineRun, ModelSpec, Path]:
    """Return the settings, the model, and the folder to which the pairs are written."""
    run, spec, reason = parse_for_model(MineRun, __doc__, Path(__file__), argv)
    if importlib.util.find_spec("pyarrow") is None:
        refuse("pairs are written as parquet, which needs the package pyarrow: pip install 'dinalrm-align[data]'")
    if run.reward != "dinalrm" and not Path(run.reward).is_dir() and "/" not in run.reward:
        refuse(f"unknown reward {run.reward!r}; known: dinalrm, or the folder or hub id of a latent reward")
    check_sides(spec, height=run.height or spec.height, width=run.width or spec.width)
    spec = spec.with_text_length(run.text_length)
    print(reason, flush=True)
    name = f"pairs_{Path(spec.name).name}_{Path(run.reward).name}_seed{run.seed}"
    return run, spec, Path(run.output_dir or Path("runs") / name).absolute()


def mine(run: MineRun, spec: ModelSpec, folder: Path) -> None:
    import torch
    from tqdm import tqdm

    from dinalrm_align import LatentReward
    from dinalrm_align.align.mining import Miner
    from dinalrm_align.align.policy import Policy
    from dinalrm_align.align.rollouts import Sampler
    from dinalrm_align.data.hub_prompts import load_prompts
    from dinalrm_align.data.mined_pairs import MinedPairs, write_manifest
    from dinalrm_align.data.pairs import PairManifest
    from dinalrm_align.flow.sampling import schedule_sigmas
    from dinalrm_align.models.pipeline import load_pipeline
    from dinalrm_align.models.text import Conditions, PromptEncoder
    from dinalrm_align.train.cost import PhaseMeter
    from dinalrm_align.train.device import start_accelerator
    from dinalrm_align.train.digest import digest, fingerprint, text_digest

    accelerator, dtype = start_accelerator(run, spec.dtype, minutes=7 * 24 * 60)  # ranks wait for the slowest
    device = accelerator.device
    prompts = load_prompts(run.prompts or spec.train_prompts)[: run.max_prompts]

    # The sampled model and the reward share their base weights. The VAE is never called.
    pipeline = load_pipeline(spec.pipeline, dtype=getattr(torch, dtype)).to(device)
    vae = pipeline.vae.config
    reward = LatentReward.from_pretrained(spec.reward if run.reward == "dinalrm" else run.reward, pipeline=pipeline)
    facts = {"base model": fingerprint(pipeline.transformer), "reward": fingerprint(reward)}
    encoder = PromptEncoder(pipeline, text_length=spec.text_length, device=device)
    lengths = reward.text_lengths - {spec.text_length}

    policy = Policy(pipeline.transformer, run.policy, seed=run.seed)
    if run.lora is not None:
        policy.load_lora(run.lora)
        facts["lora"] = digest(policy.parameters)[:16]
    settings = run.mine
    scale = spec.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    factor = pipeline.vae_scale_factor
    empty = Conditions.encode(encoder, [""])
    sampler = Sampler(
        policy=policy, conditions=empty, negative=empty, guidance_scale=scale, seed=run.seed, meter=PhaseMeter(device),
        sigmas=schedule_sigmas(pipeline.scheduler, settings.num_steps or spec.num_steps),
        latent_shape=(
            pipeline.transformer.config.in_channels, (run.height or spec.height) // factor,
            (run.width or spec.width) // factor,
        ),
    )  # fmt: skip
    # Prompts are encoded shard by shard, so that only those of one file are in memory.
    miner = Miner(sampler, reward, prompts, lambda some: Conditions.encode(encoder, some, lengths), settings)
    facts |= {
        "prompts": text_digest("\n".join(prompts)), "seed": run.seed, "latent_shape": sampler.latent_shape,
        "sigmas": sampler.sigmas, "guidance_scale": scale, "weights": dtype, **dataclasses.asdict(settings),
    }  # fmt: skip

    if accelerator.is_main_process:
        manifest = PairManifest(vae.scaling_factor, vae.shift_factor or 0.0, encoder.text_length)
        write_manifest(folder, manifest, shards=miner.shards, mining=facts)
    accelerator.wait_for_everyone()
    missing = miner.missing(folder)
    accelerator.print(f"pairs in {folder}: {len(prompts)} prompts, {miner.shards - len(missing)} files there already")
    done = len(prompts) - sum(len(miner.prompts_of(number)) for number in missing)
    bar = tqdm(total=len(prompts), initial=done, unit="prompt", disable=not accelerator.is_main_process)
    accelerator.wait_for_everyone()  # every rank has looked before one writes
    with bar, policy.reference() if run.lora is None else nullcontext():
        for number in missing[accelerator.process_index :: accelerator.num_processes]:
            miner.write(folder, number)
            bar.update(len(miner.prompts_of(number)) * accelerator.num_processes)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        pairs = MinedPairs(folder, batch_size=1)
        gaps = torch.tensor(pairs.scores)
        means = ", ".join(f"{name} {value:.3f}" for name, value in zip(("chosen", "rejected"), gaps.mean(dim=0)))
        print(f"{len(gaps)} pairs of {len(set(pairs.prompts))} prompts; mean score {means}")
        command = ["python", str(Path(__file__).with_name("dpo_sd35.py")), "--model", spec.name]
        print(f"train on them: {shlex.join([*command, '--dpo.mode', 'offline', '--pairs', str(folder)])}")


def main(argv: Sequence[str] | None = None) -> None:
    with refusing(stopped="complete files are kept, and the same command resumes from there"):
        run, spec, folder = settings_and_model(argv)
        source = spec.reward if run.reward == "dinalrm" else run.reward
        others = [Need("latent reward", source, missing_reward, "--reward DIR")]
        check_sources(spec, {}, others=[*others, *([lora_need(run.lora, "--lora DIR")] if run.lora else [])])
        mine(run, spec, folder)


if __name__ == "__main__":
    main()
