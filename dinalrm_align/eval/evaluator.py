"""Score test sets with a finished reward. Scores are stored, so a repeated evaluation loads them.

A test set is a data set of latents, a public test set of images (`test_sets_config`), or a jsonl of images. For image
rewards, latents are decoded. Images are scored one by one, in an order that does not depend on the pairs
(`ImageSet.order`). The noise of an image is seeded by (seed, prompt, draw), so images of one prompt and size share the
same noise.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dinalrm_align.data.batches import PairSource
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.data.source import Encoders, open_pairs
from dinalrm_align.eval.scores import (
    NO_NOISE,
    Level,
    NoiseLevels,
    PairScores,
    Piece,
    Pieces,
    ScoreLevels,
    check_finite_scores,
    level_by_level,
    load_scores,
    save_scores,
    score_pairs,
    shared_features,
)
from dinalrm_align.eval.test_sets import ImageSet, open_test_set
from dinalrm_align.eval.test_sets_config import holds_images
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.models.images import image_tensor, open_image
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.checkpoint import read_checkpoint
from dinalrm_align.reward.config import RewardConfig
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.digest import digest, fingerprint, text_digest
from dinalrm_align.train.files import discard_folder, read_json, write_atomically

DECODED = 4  # latents decoded at once for the gold score
PIECE = 8  # batches of images per file of partial results
MULTIPLE = 16  # image sides are multiples of this: SD3's VAE downsampling (8) times its patch size (2)

OnBad = Literal["refuse", "skip"]
"""What to do about a record or image that cannot be read: raise ValueError, or leave out its pairs."""
ImageScorer = Callable[[Sequence[Image.Image], Sequence[str]], Mapping[str, np.ndarray]]
"""(B images of any size, B prompts) -> `NoiseLevels.name` -> (B,) scores."""


@dataclass(frozen=True)
class Fit:
    """Callable that resizes an image for a latent reward (LANCZOS).

    how="area" keeps the aspect ratio: the area becomes about height x width, and the sides are rounded to multiples of
    16. how="crop" scales the image until it covers height x width, and crops the centre.
    """

    how: Literal["area", "crop"]
    height: int
    width: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the resized image, (3, H, W) in [0, 1]."""
        if self.how == "crop":
            fitted = ImageOps.fit(image, (self.width, self.height), method=Image.Resampling.LANCZOS)
        else:
            scale = (self.height * self.width / (image.width * image.height)) ** 0.5
            sides = [max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in image.size]
            fitted = image.resize(sides, Image.Resampling.LANCZOS)
        return image_tensor([fitted])[0]


def image_scorer(reward: Reward, encoders: Encoders, fit: Fit, levels: Sequence[NoiseLevels], seed: int) -> ImageScorer:
    """Return a function that scores images.

    levels: noise levels at which a latent reward returns raw scores. If `levels` is [NO_NOISE], any reward returns one
    score: the weighted sum of its parts. In this sum, a latent reward, also one on a server, uses the noise level and
    scale of its config, and an image reward sees the images unresized.

    Raises ValueError if a latent reward was trained with other encoders, or for a sum on a server. The returned
    function raises ValueError if the reward cannot score images.
    """
    parts, weights = reward.named_parts, reward.weights
    for part in parts.values():
        if part.reads_noise and part.scores_images and part.sigmas is None:
            got = f"got {part.name!r}, a sum whose parts a server would score on equal images"
            raise ValueError(f"reward: {got}; name the served parts one by one: A + 0.2*B")
    for part in reward.noise_parts:
        encoders.manifest().check(part.config)

    def latent_scores(
        part: Reward, score: Callable[..., Tensor], levels: Sequence[NoiseLevels], images: Sequence[Image.Image],
        prompts: Sequence[str],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        scores = {level.name: np.empty(len(images), np.float32) for level in levels}
        pixels = [fit(image) for image in images]
        for size in dict.fromkeys(image.shape for image in pixels):
            rows = [row for row, image in enumerate(pixels) if image.shape == size]
            latents = encoders.encode_images(torch.stack([pixels[row] for row in rows])).to(part.device)
            texts = [prompts[row] for row in rows]
            text = Conditions(texts, *encoders.encode_prompts(texts)) if part.noise_parts else texts
            for level in levels:
                noise = torch.stack([noise_by_prompt(texts, latents.shape[1:], seed, draw) for draw in level.draws])
                found = score(latents, text, sigma=list(level.sigmas), noise=noise)
                scores[level.name][rows] = found.cpu().numpy()
        return scores

    def part_score(part: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        if part.sigmas is None:
            return part.score_images(list(images), list(prompts)).cpu().numpy()
        sigma = part.sigmas[1]
        level = NoiseLevels.at(*(sigma if isinstance(sigma, Sequence) else [sigma]))
        return latent_scores(part, part, [level], images, prompts)[level.name]

    @torch.no_grad()
    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        if levels != [NO_NOISE]:
            return latent_scores(reward, reward.raw, levels, images, prompts)
        return {NO_NOISE.name: sum(weights[name] * part_score(part, images, prompts) for name, part in parts.items())}

    return score


def noise_by_prompt(prompts: Sequence[str], shape: Sequence[int], seed: int, draw: int) -> Tensor:
    """Draw standard normal noise (B, *shape) on the CPU. Equal prompts get equal noise."""
    keys = [int(text_digest(prompt), 16) for prompt in prompts]
    distinct = list(dict.fromkeys(keys))
    drawn = seeded_noise(tuple(shape), [seeded_generator(seed, key, draw) for key in distinct])
    return drawn[[distinct.index(key) for key in keys]]


def score_image_set(
    score: ImageScorer,
    images: ImageSet,
    levels: Sequence[NoiseLevels],
    *,
    batch_size: int,
    on_bad: OnBad,
    title: str,
    pieces: Pieces,
) -> tuple[PairScores, dict[str, str]]:
    """Score all images of a test set. Returns the scores, and a dict: name of an unscored image -> reason.

    pieces: store of partial results. Raises ValueError for a NaN or infinite score, or if no pair is scored. With
    on_bad "refuse", a missing or unreadable image raises ValueError too.
    """
    missing = images.missing()
    if missing and on_bad == "refuse":
        got = f"{len(missing)} of {len(images.images)} images are missing, as {missing[:3]}"
        raise ValueError(f"{images.name}: {got}; add them, or leave out their pairs with --on_bad skip")
    names = [level.name for level in levels]
    order, size = images.order, PIECE * batch_size
    table = np.full((len(names), len(order)), np.nan, np.float32)
    faults: dict[str, str] = {}

    def score_batch(rows: Sequence[int], found: dict[str, str]) -> np.ndarray:
        """Return scores (levels, rows), NaN for unreadable images. `found` collects: image name -> reason."""
        scores = np.full((len(names), len(rows)), np.nan, np.float32)
        opened: dict[int, Image.Image] = {}
        for column, image in enumerate(images.images[row] for row in rows):
            try:
                opened[column] = open_image(image.read(), image.name)
            except (OSError, ValueError) as error:
                if on_bad == "refuse":
                    how = "replace it, or leave out its pairs with --on_bad skip"
                    raise ValueError(f"{images.name}: image {image.name}: {error}; {how}") from error
                found[image.name] = str(error)
        if opened:
            by_level = score(list(opened.values()), [images.images[rows[column]].prompt for column in opened])
            for line, name in enumerate(names):
                check_finite_scores(by_level[name], name, images.name)
                scores[line, list(opened)] = by_level[name]
        return scores

    def score_piece(rows: Sequence[int]) -> Piece:
        found: dict[str, str] = {}
        parts = (rows[first : first + batch_size] for first in range(0, len(rows), batch_size))
        return {"scores": np.concatenate([score_batch(part, found) for part in parts], axis=1)}, found

    with tqdm(total=len(order), desc=title, unit=" images", dynamic_ncols=True) as bar:
        for number, start in enumerate(range(0, len(order), size)):
            rows = order[start : start + size]
            arrays, found = pieces.get(number, functools.partial(score_piece, rows))
            table[:, rows] = arrays["scores"]
            faults |= found
            bar.update(len(rows))
    return _pair_scores(images, dict(zip(names, table, strict=True)), faults), faults


def _pair_scores(images: ImageSet, scores: dict[str, np.ndarray], faults: Mapping[str, str]) -> PairScores:
    """Return the scores of the pairs whose two images both have scores. Raises ValueError if there is no such pair."""
    scored = np.isfinite(next(iter(scores.values())))
    kept = scored[images.chosen] & scored[images.rejected]
    if not kept.any():
        fault = next(iter(faults.values()), "")
        raise ValueError(f"{images.name}: none of {len(kept)} pairs has scores of both images ({fault})")
    prompts: dict[str, int] = {}
    caption = [prompts.setdefault(images.images[row].prompt, len(prompts)) for row in images.chosen]
    columns = {name: vars(images)[name] for name in ("chosen", "rejected", "label", "group")}
    names = tuple(image.name for image in images.images)
    found = PairScores(scores, **columns, caption=np.array(caption), prompts=tuple(prompts), images=names)
    return found.subset(kept)


@dataclass(frozen=True)
class Candidate:
    """A reward to evaluate. `load` returns the reward, and is called only if no scores are stored.

    identity: text that identifies the reward; it is stored with the scores. config: config of a single
    latent reward, which is scored at several noise levels; None for any other reward.
    """

    identity: str
    load: Callable[[], Reward]
    config: RewardConfig | None = None

    @classmethod
    def from_checkpoint(
        cls, source: str | Path, transformer: Callable[[], torch.nn.Module], text_length: int | None = None
    ) -> "Candidate":
        """Describe the latent reward at a folder or hub id. `transformer`: function that returns the base model.

        `text_length`: T5 tokens per prompt, in place of the number in the checkpoint's config.
        """
        checkpoint = read_checkpoint(source)
        config = replace(checkpoint.config, text_length=text_length or checkpoint.config.text_length)

        def load() -> LatentReward:
            return LatentReward.from_pretrained(source, transformer=transformer(), text_length=text_length)

        return cls(digest(checkpoint.tensors), load, config)

    @classmethod
    def from_reward(cls, text: str, reward: Reward) -> "Candidate":
        """Describe a loaded reward. `text`: name of the reward. A reward on a server is identified by its name only."""
        return cls(f"{text} {fingerprint(reward)}", lambda: reward)


@dataclass(frozen=True)
class Evaluator:
    """Callable that scores rewards on test sets. All rewards get the same noise.

    Args:
        sets: name of a test set -> directory of latents, jsonl, or folder of a public test set.
        encoders: networks that encode images and decode latents.
        size: (height, width) to which images are resized for latent rewards.
        batch_size: images, or groups of latents, per batch. It affects which noise is drawn for latents.
        fit, on_bad: how images are resized (see `Fit`), and what happens to unreadable images and records (`OnBad`).
        image_sets: the test sets in `sets` that hold images, opened by `open_image_sets`.
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
        """Return a dict: name of a test set -> scores. They are loaded from `directory`, or computed and stored there.

        levels: name of a test set -> noise levels at which a latent reward is scored. Any other reward gives one score
        per image, named "score". Raises ValueError if the stored scores were computed with different settings.
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
            terms["text_length"] = self.encoders.encode_prompts.text_length
        else:
            pairs = self._pairs(name, candidate.config)
            terms["set"] = pairs.digest()
        path, faults = scores_file(directory, name), faults_file(directory, name)
        if not path.exists():
            pieces = Pieces(directory / f"scores_{name}.pieces", terms)
            options = {"title": f"{title}: {name}", "pieces": pieces}
            if name in self.image_sets:
                fit, images = Fit(self.fit, *self.size), self.image_sets[name]
                score = image_scorer(candidate.load(), self.encoders, fit, levels, self.noise_seed)
                options |= {"batch_size": self.batch_size, "on_bad": self.on_bad}
                scores, found = score_image_set(score, images, levels, **options)
                dropped = images.dropped
            else:
                score, batches, dropped, found = self._latent_scorer(candidate), pairs.in_order(), pairs.dropped, {}
                scores = score_pairs(score, batches, levels, seed=self.noise_seed, **options)
            found |= {message: reason for reason, messages in dropped.messages.items() for message in messages}
            write_atomically(faults, json.dumps(found, indent=1) + "\n")
            save_scores(scores, path, terms)
            discard_folder(pieces.folder)
        if self.on_bad == "refuse" and faults.exists() and read_json(faults):
            raise ValueError(f"{faults}: these scores leave out images or records; to accept that, pass --on_bad skip")
        scores = load_scores(path, terms)
        if (scores.label == 0.5).all():
            raise ValueError(f"test set {name}: raters tie all {len(scores.label)} pairs; expected a preference")
        return scores

    def _latent_scorer(self, candidate: Candidate) -> ScoreLevels:
        """Return a function that scores a batch: raw scores for a latent reward, scaled scores for any other reward."""
        reward = candidate.load()
        if candidate.config:
            return shared_features(reward.model)

        def score(batch: PairBatch, level: Level, noise: Tensor) -> Tensor:
            if batch.group_prompts is None:
                raise ValueError("prompts: got latents without them; expected text, which this reward reads")
            latents = batch.latents.float().to(self.encoders.device)
            noise = batch.draw_noise(seeded_generator(self.noise_seed)).to(latents.device)
            return reward(latents, batch.conditions.to(latents.device), noise=noise)

        return level_by_level(score)

    def _pairs(self, name: str, config: RewardConfig | None) -> PairSource:
        options = dict(size=self.size, batch_size=self.batch_size, on_bad=self.on_bad)
        return open_pairs(self.sets[name], config or self.encoders.manifest(), self.encoders, **options)

    def gold_accuracy(
        self, gold: Callable[[Tensor, Sequence[str]], Tensor], config: RewardConfig | None
    ) -> dict[str, float]:
        """Return the accuracy of a gold score on decoded latents, for each test set of latents that stores prompts.

        The gold accuracy is an upper bound for rewards. It is below 1 because labels are noisy. gold: function
        (images (B, 3, H, W), prompts) -> (B,) scores. config: config of the evaluated reward if it is a latent reward,
        else None.
        """

        def score(batch: PairBatch, level: Level, noise: Tensor) -> Tensor:
            parts = batch.latents.to(self.encoders.device).split(DECODED)
            images = torch.cat([decode_latents(self.encoders.vae, part) for part in parts])
            return gold(images, list(batch.conditions.prompts))

        accuracies = {}
        for name in (name for name in self.sets if name not in self.image_sets):
            batches = self._pairs(name, config).in_order()
            if len(batches) and batches[0].group_prompts is not None:
                scores = score_pairs(
                    level_by_level(score), batches, [NO_NOISE], seed=self.noise_seed, title=f"gold: {name}"
                )
                accuracies[name] = scores.accuracy(NO_NOISE.name)
        return accuracies


def open_image_sets(
    sets: Mapping[str, str], unpack_to: Path | None = None, on_bad: OnBad = "refuse"
) -> dict[str, ImageSet]:
    """Open the test sets that hold images: public test sets and jsonl files. `sets`: name of a test set -> path."""
    paths = {name: path for name, path in sets.items() if holds_images(name, path)}
    return {name: open_test_set(name, path, unpack_to=unpack_to, on_bad=on_bad) for name, path in paths.items()}


def scores_file(directory: Path, name: str) -> Path:
    return directory / f"scores_{name}.safetensors"


def faults_file(directory: Path, name: str) -> Path:
    return directory / f"scores_{name}.faults.json"
