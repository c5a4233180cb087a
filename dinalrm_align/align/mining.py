"""Mine preference pairs: sample a list of prompts with a model, and rank the latents by a reward.

The list of prompts is divided into shards of `MineConfig.prompts_per_shard` prompts. The pairs of each shard are
written to one file, in the format of `data.mined_pairs`. The contents of a file depend only on seed, shard number and
settings. A resumed run therefore keeps the existing files.
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
    """Mines preference pairs: samples each prompt several times, ranks the samples by a reward, and writes the pairs.

    The prompts are divided into shards of consecutive prompts. The pairs of a shard go into one file.

    Args:
        sampler: draws the samples. The field `sampler.conditions` is not used, because `encode` makes the conditions.
        reward: ranks the sampled latents; must be on the policy's device.
        prompts: the prompts of all shards.
        encode: a function from prompts to `Conditions`. It is called for the prompts of one shard at a time, because
            the embeddings of all prompts may not fit in memory.
    """

    sampler: Sampler
    reward: Reward
    prompts: Sequence[str]
    encode: Callable[[Sequence[str]], Conditions]
    config: MineConfig

    @property
    def shards(self) -> int:
        """Number of shards. A shard consists of consecutive prompts; the pairs of a shard go into one file."""
        return -(-len(self.prompts) // self.config.prompts_per_shard)

    def missing(self, folder: Path) -> list[int]:
        """Return the numbers of the shards whose file does not exist in `folder` yet."""
        return [number for number in range(self.shards) if not shard_path(folder, number).is_file()]

    def prompts_of(self, number: int) -> range:
        """Return the prompt indices of shard `number`."""
        size = self.config.prompts_per_shard
        return range(number * size, min((number + 1) * size, len(self.prompts)))

    def mine(self, number: int) -> list[MinedPair]:
        """Sample the prompts of shard `number`, rank the samples, and return the pairs in the order of the prompts."""
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
        """Mine the pairs of shard `number`, write them to one file atomically, and return the number of pairs."""
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
