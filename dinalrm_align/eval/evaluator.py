"""Judge a finished reward on sets of pairs: its scores come from files where they are there, else from the reward.

A set is latents, which every reward reads as they are (rewards over pictures decode them), or pictures: a public test
set by its name (`config.test_sets`), or a jsonl. Scores are kept as they come: a judgement that was stopped goes on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from dinalrm_align.data.source import Encoders, open_pairs
from dinalrm_align.eval.image_scores import Fit, image_scorer, score_image_set
from dinalrm_align.eval.pieces import Pieces
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, PairScores, Score, load_scores, save_scores, score_pairs
from dinalrm_align.eval.test_sets import PictureSet, open_test_set
from dinalrm_align.eval.test_sets_config import TEST_SETS
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.combine import Part, RewardSum
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.training import score_batch
from dinalrm_align.train.digest import digest, fingerprint
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.files import read_json

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

    from dinalrm_align.data.pairs import PairBatch

Gold = Callable[[Tensor, Sequence[str]], Tensor]
"""gold(images (B, 3, H, W) in [0, 1], prompts) -> (B,)"""


@dataclass(frozen=True)
class Candidate:
    """A reward to be judged. identity: tells it from others. load: gives it, when there is something to score. latent:
    it is one latent reward, and is read in several ways.
    """

    identity: str
    load: Callable[[], Part | RewardSum]
    latent: bool = False

    @classmethod
    def from_checkpoint(cls, source: str | Path, transformer: "SD3Transformer2DModel") -> "Candidate":
        """A latent reward's folder or hub id; it shares the transformer's weights."""
        identity = digest(read_checkpoint(source).tensors)
        return cls(identity, lambda: LatentReward.from_pretrained(source, transformer=transformer), latent=True)

    @classmethod
    def of(cls, text: str, reward: Part | RewardSum) -> "Candidate":
        """Any other reward, as it is written (`config.rewards`) and loaded. A server is known by its name alone."""
        return cls(f"{text} {fingerprint(reward)}", lambda: reward)


@dataclass(frozen=True)
class Evaluator:
    """What all rewards that are compared are judged with.

    sets: name -> pairs: a directory of latents, a jsonl, or where a public test set lies. transformer: frozen, whose
    weights latent rewards share; None where none is judged. encoders, size: for pictures, at that (height, width).
    batch_size: groups of latents, or pictures, at once; with noise_seed it settles the noise of latents. fit, on_bad:
    of pictures (`picture_scores`). pictures: the sets that are pictures, as `image_sets` opens them.
    """

    sets: Mapping[str, str]
    transformer: "SD3Transformer2DModel | None"
    encoders: Encoders
    size: tuple[int, int]
    batch_size: int
    noise_seed: int
    fit: Literal["area", "crop"] = "area"
    on_bad: Literal["refuse", "skip"] = "refuse"
    pictures: Mapping[str, PictureSet] = field(default_factory=dict)

    def __call__(
        self,
        reward: Candidate | str | Path,
        readings: Mapping[str, Sequence[NoiseLevels]],
        directory: Path,
        *,
        title: str,
    ) -> dict[str, PairScores]:
        """The scores of `reward` on every set, name -> scores, read in the ways of `readings[name]`; one that is no
        latent reward has one reading, "score". A text or path is a latent reward's checkpoint.

        They are kept in directory/judged_NAME.safetensors. ValueError when such a file holds other readings or noise,
        and as scoring raises.
        """
        if not isinstance(reward, Candidate):
            reward = Candidate.from_checkpoint(reward, self.transformer)
        return {
            name: self._judged(name, reward, readings[name] if reward.latent else [NO_NOISE], directory, title)
            for name in self.sets
        }

    def _judged(
        self, name: str, candidate: Candidate, readings: Sequence[NoiseLevels], directory: Path, title: str
    ) -> PairScores:
        names = sorted({reading.name for reading in readings})
        terms: dict[str, object] = {
            "reward": candidate.identity, "readings": names, "noise_seed": self.noise_seed,
            "batch_size": self.batch_size,
        }  # fmt: skip
        if name in self.pictures:
            terms |= {"set": self.pictures[name].digest(), "size": list(self.size), "fit": self.fit}
        path, faults = scores_file(directory, name), faults_file(directory, name)
        if not path.exists():
            pieces = Pieces(directory / f"judged_{name}.pieces", terms)
            readings = list(dict.fromkeys(readings))
            if name in self.pictures:
                score = image_scorer(
                    candidate.load(), self.encoders, Fit(self.fit, *self.size), readings, self.noise_seed
                )
                scores, found = score_image_set(
                    score, self.pictures[name], readings, batch_size=self.batch_size, on_bad=self.on_bad,
                    title=f"{title}: {name}", pieces=pieces,
                )  # fmt: skip
                write_atomically(faults, json.dumps(found, indent=1) + "\n")
            else:
                score, config = self._score_latents(candidate.load())
                batches = self._batches(name, config)
                scores = score_pairs(
                    score, batches, readings, seed=self.noise_seed, title=f"{title}: {name}", pieces=pieces
                )
            save_scores(scores, path, terms)
            pieces.discard()
        if self.on_bad == "refuse" and faults.exists() and read_json(faults):
            raise ValueError(f"{faults}: pictures were left out when these scores were taken; allow it: --on_bad skip")
        return load_scores(path, terms)

    def _score_latents(self, reward: Part | RewardSum) -> tuple[Score, RewardConfig | None]:
        """What scores a batch of latents with a reward, and the config that says how those must have been made."""
        if isinstance(reward, LatentReward):
            return lambda batch, level, noise: score_batch(reward.model, batch, level, noise), reward.config

        def score(batch: "PairBatch", level: tuple[float, ...], noise: Tensor) -> Tensor:
            if batch.group_prompts is None:
                raise ValueError("these latents keep no prompts as text, which rewards other than dinalrm read")
            latents = batch.latents.float().to(self.encoders.device)
            return reward(
                latents,
                batch.conditions.prompts,
                noise=batch.draw_noise(seeded_generator(self.noise_seed)).to(latents.device),
            )

        return score, None

    def _batches(self, name: str, config: RewardConfig | None) -> "Sequence[PairBatch]":
        reader = config or self.encoders.manifest()
        options = dict(size=self.size, batch_size=self.batch_size)
        return open_pairs(self.sets[name], reader, self.encoders, **options).in_order()

    def gold(self, gold: Gold, decode: Callable[[Tensor], Tensor], config: RewardConfig | None) -> dict[str, float]:
        """Set of latents -> accuracy of a judge of pictures, on pairs read as a reward of `config` reads them.

        How far raters agree with the judge: about what a reward that knew it by heart would reach. gold(images
        (B, 3, H, W), prompts) -> (B,); decode: latents -> images. Sets that keep no prompts, and sets of pictures, are
        left out.
        """
        found = {}
        for name in self.sets.keys() - self.pictures.keys():
            batches = self._batches(name, config)
            if len(batches) and batches[0].group_prompts is not None:
                one = score_pairs(
                    lambda batch, level, noise: gold(decode(batch.latents), list(batch.conditions.prompts)),
                    batches, [NO_NOISE], seed=self.noise_seed, title=f"gold: {name}",
                )  # fmt: skip
                found[name] = float(np.nanmean(one.correct(NO_NOISE.name)))
        return {name: found[name] for name in self.sets if name in found}


def image_sets(sets: Mapping[str, str], unpack_to: Path | None = None) -> dict[str, PictureSet]:
    """Those of name -> path that are pictures: a public test set by its name, or a jsonl. unpack_to, and what is
    raised: see `open_test_set`.
    """
    of_pictures = {name: path for name, path in sets.items() if name in TEST_SETS or Path(path).suffix == ".jsonl"}
    return {name: open_test_set(name, path, unpack_to=unpack_to) for name, path in of_pictures.items()}


def scores_file(directory: Path, name: str) -> Path:
    """Where the scores on the set of that name are kept."""
    return directory / f"judged_{name}.safetensors"


def faults_file(directory: Path, name: str) -> Path:
    """Where the pictures without a score are named, with what is wrong with them."""
    return directory / f"judged_{name}.faults.json"
