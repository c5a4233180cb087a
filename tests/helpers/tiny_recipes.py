"""A world of random weights, and both recipes on it: runs of a second, through their real command lines."""

import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from paths import RECIPES

from dinalrm_align.data.latent_pairs import LatentPairsWriter
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.models.text import PromptEncoder
from dinalrm_align.reward.checkpoint import write_reward
from dinalrm_align.reward.config import LoraConfig, RewardConfig
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.shapes.stack import StackConfig, build_pipeline

PROMPTS = ("a small red circle on white", "a large blue square on gray", "two small green crosses on black")
TRAINING = ("--device=cpu", "--loop.steps=4", "--loop.checkpoint_every=1", "--loop.ema_decay=0.5", "--loop.keep_last=2")
QUICK_PAIRS = (
    "--shapes_pairs.generators={few: {num_steps: [1, 1], guidance_scale: [1, 1]}, spoiled: {render: spoiled}}",
    "--shapes_pairs.outside={}",
)
TAPS = dict(num_layers=2, visual_taps=(1, 2), text_taps=(1, 2))


@dataclass(frozen=True)
class Recipe:
    """One recipe; arguments: of a new run, all but its folder."""

    name: str
    main: Callable[[Sequence[str]], None]
    arguments: tuple[str, ...]


def make_world(folder: Path, *, seed: int = 0) -> None:
    """A tiny pipeline with random weights, a reward on it, preference pairs, and a file of prompts."""
    pipeline = build_pipeline(StackConfig.tiny(), seed=seed)
    pipeline.save_pretrained(folder / "pipeline")
    config = RewardConfig(
        base_model_id="../pipeline", lora=LoraConfig(2, 2), text_length=16, vae_scaling_factor=1.0,
        vae_shift_factor=0.0, **TAPS,
    )  # fmt: skip
    model = build_reward_model(config, pipeline.transformer.requires_grad_(False), seed=seed + 1)
    write_reward(folder / "dinalrm", config, model.tuned_tensors())
    embeds, pooled = PromptEncoder(str(folder / "pipeline"), text_length=16)(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    with LatentPairsWriter(folder / "pairs", PairManifest(1.0, 0.0, 16)) as writer:
        for group in range(12):
            row = group % len(PROMPTS)
            latents = torch.randn(2, 16, 8, 8, generator=generator)
            writer.add(PROMPTS[row], latents, prompt_embeds=embeds[row], pooled_prompt_embeds=pooled[row])
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))


def recipes(world: Path) -> list[Recipe]:
    """Four updates with a checkpoint after each; with dropout, which draws from the global random state."""
    refl = (
        f"--model={world}", f"--prompts={world / 'prompts.txt'}", f"--eval_prompts={world / 'prompts.txt'}",
        "--policy.rank=2", "--refl.batch_size=1", "--refl.num_steps=2", "--gradient_checkpointing=false",
        "--profile_every=0", "--evaluation.samples=2", "--evaluation.shown=1", "--evaluation.every=0", *TRAINING,
    )  # fmt: skip
    reward = (
        f"--model={world}", f"--pairs={world / 'pairs'}", "--batch_size=2", "--held_out_prompts=1",
        "--loop.accumulate=2", "--reward.num_layers=2", "--reward.visual_taps=[1,2]", "--reward.text_taps=[1,2]",
        "--reward.lora.rank=2", "--reward.head.dropout=0.1", "--optim.warmup_steps=2", "--accuracy.sigmas=[0.3]",
        "--accuracy.ensemble=[]", *TRAINING,
    )  # fmt: skip
    return [
        Recipe(name, runpy.run_path(str(RECIPES / f"{name}.py"))["main"], arguments)
        for name, arguments in (("refl_sd35", refl), ("train_reward", reward))
    ]


def ablation(world: Path, folder: Path) -> list[str]:
    """Arguments of ablate_reward, all but the arms: two updates of a very small reward, output in FOLDER/out."""
    (folder / "training.yaml").write_text(
        "batch_size: 4\nloop: {ema_decay: 0.0, checkpoint_every: 2}\noptim: {lr: 1.0e-2}\n"
        "reward: {num_layers: 2, visual_taps: [1, 2], text_taps: [1, 2], text_length: 16, "
        "head: {width: 16, num_attn_heads: 2}, lora: {rank: 2}}\n"
    )
    return [
        f"--model={world}", f"--training={folder / 'training.yaml'}", f"--output_dir={folder / 'out'}", "--device=cpu",
        "--seeds=[0]", "--steps=2", "--sigmas=[0.0,0.4,0.8]", "--ensembles=[[0.2,0.4]]", "--draws=4",
        "--shapes_pairs.groups=8", "--shapes_pairs.heldout_groups=6", "--shapes_pairs.per_concept=1",
        "--shapes_pairs.per_shifted=1", *QUICK_PAIRS,
    ]  # fmt: skip


def stand_in(figure: object, path: Path, **options: object) -> None:
    """An image in place of a drawn figure: drawing would be most of the time of a run."""
    path.write_bytes(b"an image")


def step_of(checkpoint: Path | None) -> int:
    """The update that a checkpoint was written after; -1 for none."""
    return -1 if checkpoint is None else int(checkpoint.name.removeprefix("step_"))
