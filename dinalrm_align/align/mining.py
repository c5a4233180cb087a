"""Mining preference pairs: a model's own samples of a list of prompts, ranked as latents by a reward.

The list is divided into shards of `MineConfig.prompts_per_shard` prompts, each written as one file of
`data.mined_pairs`. A shard is a pure function of seed, number and settings, so that existing files are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dinalrm_align.align.candidates import ranked_pairs, scored_candidates
from dinalrm_align.align.mining_config import MineConfig
from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.data.formats.mined import shard_path
from dinalrm_align.data.mined_pairs import MinedPair, write_shard
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward


@dataclass
class Miner:
    """Samples, ranks and writes, without gradient.

    Args:
        sampler: samples with the policy; its own conditions are not used.
        reward: on the policy's device.
        prompts: all of them.
        encode: prompts -> Conditions, called for one shard at a time, since those of all prompts may not fit in memory.
        config: see `MineConfig`.
    """

    sampler: Sampler
    reward: Reward
    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Conditions]
    config: MineConfig

    @property
    def shards(self) -> int:
        """Number of files."""
        return -(-len(self.prompts) // self.config.prompts_per_shard)

    def missing(self, folder: Path) -> list[int]:
        """Numbers of the shards that are not in the folder."""
        return [number for number in range(self.shards) if not shard_path(folder, number).is_file()]

    def prompts_of(self, number: int) -> range:
        """Indices of the prompts of shard `number`."""
        size = self.config.prompts_per_shard
        return range(number * size, min((number + 1) * size, len(self.prompts)))

    def mine(self, number: int) -> list[MinedPair]:
        """The pairs of shard `number`, in the order of its prompts."""
        config, indices = self.config, self.prompts_of(number)
        conditions = self.encode([self.prompts[index] for index in indices])
        generators = [seeded_generator(self.sampler.seed, index, 4) for index in indices]
        latents, scores = scored_candidates(
            self.sampler, self.reward, conditions, generators, count=config.candidates,
            reward_sigma=config.reward_sigma, batch_size=config.batch_size,
        )  # fmt: skip
        return [
            pair
            for row, index in enumerate(indices)
            for pair in self._pairs(index, conditions.take([row]), latents[row], scores[row])
        ]

    def write(self, folder: Path, number: int) -> int:
        """Mine shard `number` and write its file atomically; the number of its pairs."""
        pairs = self.mine(number)
        write_shard(shard_path(folder, number), pairs, dtype=self.config.dtype)
        return len(pairs)

    def _pairs(self, index: int, conditions: Conditions, latents: Tensor, scores: Tensor) -> Iterator[MinedPair]:
        empty = self.sampler.negative
        negative = (empty.prompt_embeds[0], empty.pooled_prompt_embeds[0]) if self.config.negative else None
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
                negative=negative,
            )
