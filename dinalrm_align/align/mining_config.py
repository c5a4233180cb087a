"""Settings of `recipes/mine_pairs.py`, which mines preference pairs. Imports no torch."""

from dataclasses import dataclass, field
from typing import Literal

from dinalrm_align.align.config import PolicyRun
from dinalrm_align.train import settings


@dataclass
class MineConfig:
    """Settings of the samples that are drawn for each prompt, and of the pairs that are chosen from them.

    Args:
        candidates: samples per prompt.
        pairs_per_prompt: largest number of pairs per prompt; must be at most candidates / 2. The first pair is the best
            and the worst sample, the next pair is the second best and the second worst, and so on.
        min_gap: lowest score difference of a pair, in the reward's units. Pairs with a smaller difference are left out.
        num_steps: denoising steps; by default the model's own number.
        guidance_scale: guidance scale of the samples; by default the model's own.
        reward_sigma: noise level or levels (an ensemble) at which the reward scores; by default the reward's own.
        batch_size: images sampled and scored at once.
        prompts_per_shard: number of prompts whose pairs go into one file; a resumed run mines only the missing files.
        dtype: dtype of the latents and embeddings in the files.
        negative: store the empty prompt's embeddings with every pair, for trainers that use guidance in the loss.
    """

    candidates: settings.IntAboveOne = 8
    pairs_per_prompt: settings.PositiveInt = 1
    min_gap: settings.NonNegativeFloat = 0.0
    num_steps: settings.PositiveInt | None = None
    guidance_scale: settings.NonNegativeFloat | None = None
    reward_sigma: list[settings.ClosedUnitInterval] | None = None
    batch_size: settings.PositiveInt = 32
    prompts_per_shard: settings.PositiveInt = 16
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    negative: bool = True

    def __post_init__(self) -> None:
        settings.check_fields(self, "mine")
        settings.check_levels("mine.reward_sigma", self.reward_sigma)
        if self.pairs_per_prompt > self.candidates // 2:
            limit = f"at most half of mine.candidates, {self.candidates}"
            raise ValueError(f"mine.pairs_per_prompt: got {self.pairs_per_prompt}; expected {limit}")


@dataclass
class MineRun(PolicyRun):
    """Settings of `recipes/mine_pairs.py`.

    Args:
        reward: latent reward that ranks the samples: dinalrm (the default), or the folder or hub id of a latent reward.
        output_dir: folder of the pairs; by default one under runs/, named after model, reward and seed. Pairs that are
            already in the folder are kept if they were mined with the same settings.
        lora: LoRA to sample with, such as a run's lora/ folder: a file or folder written by this package, diffusers or
            peft, or the hub id of such a folder. policy.rank must be at least its rank.
        max_prompts: use only the first max_prompts prompts; by default all.
        mine: settings of the samples and the pairs.
    """

    lora: settings.Source | None = None
    max_prompts: settings.PositiveInt | None = None
    mine: MineConfig = field(default_factory=MineConfig)
