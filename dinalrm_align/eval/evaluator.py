"""Scores of a finished reward on every test set, stored as they are taken; stored scores are loaded.

A test set holds latents (image rewards decode them) or images: a public test set by its name (`test_sets_config`), or a
jsonl.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dinalrm_align.data.source import Encoders, open_pairs
from dinalrm_align.eval.image_scores import Fit, OnBad, image_scorer, score_image_set
from dinalrm_align.eval.scores import (
    NO_NOISE,
    Level,
    NoiseLevels,
    PairScores,
    Pieces,
    Score,
    load_scores,
    save_scores,
    score_pairs,
)
from dinalrm_align.eval.test_sets import ImageSet, open_test_set
from dinalrm_align.eval.test_sets_config import TEST_SETS
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.reward.training import score_batch
from dinalrm_align.train.digest import digest, fingerprint
from dinalrm_align.train.files import read_json, write_atomically

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

    from dinalrm_align.data.pairs import PairBatch

DECODED = 4  # latents decoded at once for the gold score


@dataclass(frozen=True)
class Candidate:
    """A reward to evaluate, loaded only when there is something to score.

    identity: stored with the scores; equal for equal weights. config: of a single latent reward, which is scored at
    several noise levels; None for any other reward.
    """

    identity: str
    load: Callable[[], Reward]
    config: RewardConfig | None = None

    @classmethod
    def from_checkpoint(cls, source: str | Path, transformer: "Callable[[], SD3Transformer2DModel]") -> "Candidate":
        """A latent reward by its folder or hub id. transformer: returns the base model, whose weights it shares."""
        checkpoint = read_checkpoint(source)

        def load() -> LatentReward:
            return LatentReward.from_pretrained(source, transformer=transformer())

        return cls(digest(checkpoint.tensors), load, checkpoint.config)

    @classmethod
    def from_reward(cls, text: str, reward: Reward) -> "Candidate":
        """Any loaded reward and the text that names it. A remote reward is identified by its name only."""
        return cls(f"{text} {fingerprint(reward)}", lambda: reward)


@dataclass(frozen=True)
class Evaluator:
    """Scores rewards on test sets, all with the same noise.

    Args:
        sets: name -> a directory of latents, a jsonl, or the folder of a public test set.
        encoders: for images, and to decode latents.
        size: (height, width) of images for latent rewards.
        batch_size: groups of latents, or images, per batch; RNG streams of latents depend on it.
        fit, on_bad: for images, see `image_scores`.
        image_sets: of `open_image_sets`.
    """

    sets: Mapping[str, str]
    encoders: Encoders
    size: tuple[int, int]
    batch_size: int
    noise_seed: int
    fit: Literal["area", "crop"] = "area"
    on_bad: OnBad = "refuse"
    image_sets: Mapping[str, ImageSet] = field(default_factory=dict)

    def __call__(
        self, candidate: Candidate, levels: Mapping[str, Sequence[NoiseLevels]], directory: Path, *, title: str
    ) -> dict[str, PairScores]:
        """Scores on every set by its name, stored in directory/judged_NAME.safetensors.

        levels: of each set, for a latent reward; any other reward has one score per image, "score". Raises ValueError
        when stored scores were taken with other settings.
        """
        return {
            name: self._scores(name, candidate, levels[name] if candidate.config else [NO_NOISE], directory, title)
            for name in self.sets
        }

    def _scores(
        self, name: str, candidate: Candidate, levels: Sequence[NoiseLevels], directory: Path, title: str
    ) -> PairScores:
        levels = list(dict.fromkeys(levels))
        terms: dict[str, object] = {
            "reward": candidate.identity, "readings": sorted(level.name for level in levels),
            "noise_seed": self.noise_seed, "batch_size": self.batch_size,
        }  # fmt: skip
        if name in self.image_sets:
            terms |= {"set": self.image_sets[name].digest(), "size": list(self.size), "fit": self.fit}
        path, faults = scores_file(directory, name), faults_file(directory, name)
        if not path.exists():
            pieces = Pieces(directory / f"judged_{name}.pieces", terms)
            options = {"title": f"{title}: {name}", "pieces": pieces}
            if name in self.image_sets:
                fit, images = Fit(self.fit, *self.size), self.image_sets[name]
                score = image_scorer(candidate.load(), self.encoders, fit, levels, self.noise_seed)
                options |= {"batch_size": self.batch_size, "on_bad": self.on_bad}
                scores, found = score_image_set(score, images, levels, **options)
                write_atomically(faults, json.dumps(found, indent=1) + "\n")
            else:
                batches = self._batches(name, candidate.config)
                scores = score_pairs(self._latent_scorer(candidate), batches, levels, seed=self.noise_seed, **options)
            save_scores(scores, path, terms)
            pieces.discard()
        if self.on_bad == "refuse" and faults.exists() and read_json(faults):
            raise ValueError(f"{faults}: these scores leave out images; to accept that, pass --on_bad skip")
        return load_scores(path, terms)

    def _latent_scorer(self, candidate: Candidate) -> Score:
        """Raw scores of a latent reward at the noise levels; scores of any other reward at its own."""
        reward = candidate.load()

        def score(batch: "PairBatch", level: Level, noise: Tensor) -> Tensor:
            if candidate.config:
                return score_batch(reward.model, batch, level, noise)
            if batch.group_prompts is None:
                raise ValueError("prompts: got latents without them; expected text, which this reward reads")
            latents = batch.latents.float().to(self.encoders.device)
            noise = batch.draw_noise(seeded_generator(self.noise_seed)).to(latents.device)
            return reward(latents, batch.conditions.to(latents.device), noise=noise)

        return score

    def _batches(self, name: str, config: RewardConfig | None) -> "Sequence[PairBatch]":
        reader = config or self.encoders.manifest()
        return open_pairs(self.sets[name], reader, self.encoders, size=self.size, batch_size=self.batch_size).in_order()

    def gold_accuracy(
        self, gold: Callable[[Tensor, Sequence[str]], Tensor], config: RewardConfig | None
    ) -> dict[str, float]:
        """Accuracy of a gold score of decoded latents, by set: an upper bound for rewards under label noise.

        gold: (images (B, 3, H, W), prompts) -> (B,). config: of the latent reward. Sets of images and sets without
        prompts are left out.
        """

        def score(batch: "PairBatch", level: Level, noise: Tensor) -> Tensor:
            parts = batch.latents.to(self.encoders.device).split(DECODED)
            images = torch.cat([decode_latents(self.encoders.vae, part) for part in parts])
            return gold(images, list(batch.conditions.prompts))

        accuracies = {}
        for name in (name for name in self.sets if name not in self.image_sets):
            batches = self._batches(name, config)
            if len(batches) and batches[0].group_prompts is not None:
                scores = score_pairs(score, batches, [NO_NOISE], seed=self.noise_seed, title=f"gold: {name}")
                accuracies[name] = scores.accuracy(NO_NOISE.name)
        return accuracies


def open_image_sets(sets: Mapping[str, str], unpack_to: Path | None = None) -> dict[str, ImageSet]:
    """The sets of name -> path that hold images: public test sets and jsonl files, by `open_test_set`."""
    paths = {name: path for name, path in sets.items() if name in TEST_SETS or Path(path).suffix == ".jsonl"}
    return {name: open_test_set(name, path, unpack_to=unpack_to) for name, path in paths.items()}


def scores_file(directory: Path, name: str) -> Path:
    """The stored scores of a set."""
    return directory / f"judged_{name}.safetensors"


def faults_file(directory: Path, name: str) -> Path:
    """Names of the images without a score, and the reasons."""
    return directory / f"judged_{name}.faults.json"
