"""Mining preference pairs: a model's own samples of a list of prompts, ranked by a reward as latents.

The list is cut into shards of `MineConfig.prompts_per_shard` prompts, each written as one file of `data.mined_pairs`. A
shard is a pure function of the seed, its number and the settings, so that files which are there need not be made again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinalrm_align.align.candidates import Reward, ranked_pairs, scored_candidates
from dinalrm_align.align.mining_config import MineConfig
from dinalrm_align.data.mined_pairs import MinedPair, shard_path, write_shard
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import Velocity
from dinalrm_align.models.text import Conditions


@dataclass
class Miner:
    """Samples, ranks, and writes, without gradient.

    velocity_for: conditions of a batch -> their velocity, guidance included, on `device` as `reward` is. prompts: all
    of them. encode: prompts -> their conditions, asked for one shard at a time, since those of all prompts may not fit
    in memory. negative: of one empty prompt. sigmas: of sampling. latent_shape: (C, H, W).
    """

    velocity_for: Callable[[Conditions], Velocity]
    reward: Reward
    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Conditions]
    negative: Conditions
    sigmas: Sequence[float]
    latent_shape: tuple[int, int, int]
    device: torch.device
    config: MineConfig
    seed: int

    @property
    def shards(self) -> int:
        """How many files the prompts make."""
        return -(-len(self.prompts) // self.config.prompts_per_shard)

    def missing(self, folder: Path) -> list[int]:
        """The shards that are not in the folder yet."""
        return [number for number in range(self.shards) if not shard_path(folder, number).is_file()]

    def prompts_of(self, number: int) -> range:
        """Which prompts shard `number` takes."""
        size = self.config.prompts_per_shard
        return range(number * size, min((number + 1) * size, len(self.prompts)))

    def mine(self, number: int) -> list[MinedPair]:
        """The pairs of shard `number`, in the order of its prompts."""
        config, indices = self.config, self.prompts_of(number)
        conditions = self.encode([self.prompts[index] for index in indices])
        latents, scores = scored_candidates(
            self.velocity_for, self.reward, conditions, [seeded_generator(self.seed, index, 4) for index in indices],
            count=config.candidates, latent_shape=self.latent_shape, sigmas=self.sigmas, device=self.device,
            reward_sigma=config.reward_sigma, batch_size=config.batch_size,
        )  # fmt: skip
        return [
            pair
            for row, index in enumerate(indices)
            for pair in self._pairs(index, conditions.take([row]), latents[row], scores[row])
        ]

    def write(self, folder: Path, number: int) -> int:
        """Mine shard `number` and write it into the folder, whole or not at all; the number of its pairs."""
        pairs = self.mine(number)
        write_shard(shard_path(folder, number), pairs, dtype=self.config.dtype)
        return len(pairs)

    def _pairs(self, index: int, conditions: Conditions, latents: Tensor, scores: Tensor) -> Iterator[MinedPair]:
        negative = (self.negative.prompt_embeds[0], self.negative.pooled_prompt_embeds[0])
        ranked = scores.tolist()
        for chosen, rejected in ranked_pairs(ranked, self.config.pairs_per_prompt, self.config.min_gap):
            yield MinedPair(
                prompt=conditions.prompts[0],
                index=index,
                latents=latents,
                scores=ranked,
                chosen=chosen,
                rejected=rejected,
                prompt_embeds=conditions.prompt_embeds[0],
                pooled_prompt_embeds=conditions.pooled_prompt_embeds[0],
                negative=negative if self.config.negative else None,
            )
