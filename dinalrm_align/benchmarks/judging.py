"""Judge a finished reward on sets of pairs: its scores come from files where they are there, else from the reward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from dinalrm_align.benchmarks.judged import Judged, Reading, judge, load_judged, save_judged
from dinalrm_align.checkpoint import fetch, read_checkpoint
from dinalrm_align.config.reward import RewardConfig
from dinalrm_align.data.source import Encoders, open_pairs
from dinalrm_align.digest import digest
from dinalrm_align.preference import score_batch
from dinalrm_align.reward import LatentReward

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

Gold = Callable[[Tensor, Sequence[str]], Tensor]
"""gold(images (B, 3, H, W) in [0, 1], prompts) -> (B,)"""


@dataclass(frozen=True)
class Judge:
    """What all rewards that are compared are judged with.

    sets: name -> pairs, a directory or a jsonl. transformer: frozen, whose weights the rewards share. encoders, size:
    for pairs that are pictures, at that (height, width). batch_size: groups at once; with noise_seed it settles the
    noise.
    """

    sets: Mapping[str, str]
    transformer: "SD3Transformer2DModel"
    encoders: Encoders
    size: tuple[int, int]
    batch_size: int
    noise_seed: int

    def __call__(
        self, reward: str | Path, readings: Mapping[str, Sequence[Reading]], directory: Path, *, title: str
    ) -> dict[str, Judged]:
        """The scores of `reward` on every set, name -> scores, read in the ways of `readings[name]`.

        They are kept in directory/judged_NAME.safetensors. ValueError when such a file holds other readings or noise.
        """
        return {name: self._judged(name, reward, readings[name], directory, title) for name in self.sets}

    def _judged(
        self, name: str, reward: str | Path, readings: Sequence[Reading], directory: Path, title: str
    ) -> Judged:
        names = sorted({reading.name for reading in readings})
        weights = digest(read_checkpoint(fetch(reward)).tensors)
        terms = {
            "reward": weights, "readings": names, "noise_seed": self.noise_seed, "batch_size": self.batch_size,
        }  # fmt: skip
        path = judged_file(directory, name)
        if not path.exists():
            model = LatentReward.from_pretrained(reward, transformer=self.transformer).model
            options = dict(size=self.size, batch_size=self.batch_size)
            scores = judge(
                lambda batch, level, noise: score_batch(model, batch, level, noise),
                open_pairs(self.sets[name], model.config, self.encoders, **options).in_order(),
                readings, seed=self.noise_seed, title=f"{title}: {name}",
            )  # fmt: skip
            save_judged(scores, path, terms)
        return load_judged(path, terms)

    def gold(self, gold: Gold, decode: Callable[[Tensor], Tensor], config: RewardConfig) -> dict[str, float]:
        """Set -> accuracy of a judge of pictures, on pairs read as a reward of `config` reads them.

        How far raters agree with the judge: about what a reward that knew it by heart would reach. gold(images
        (B, 3, H, W), prompts) -> (B,); decode: latents -> images. Sets that keep no prompts are left out.
        """
        found = {}
        for name, path in self.sets.items():
            options = dict(size=self.size, batch_size=self.batch_size)
            batches = open_pairs(path, config, self.encoders, **options).in_order()
            if len(batches) and batches[0].prompts is not None:
                one = judge(
                    lambda batch, level, noise: gold(decode(batch.latents), [batch.prompts[g] for g in batch.group]),
                    batches, [Reading.at(0.0)], seed=self.noise_seed, title=f"gold: {name}",
                )  # fmt: skip
                found[name] = float(np.nanmean(one.correct("0")))
        return found


def judged_file(directory: Path, name: str) -> Path:
    """Where the scores on the set of that name are kept."""
    return directory / f"judged_{name}.safetensors"
