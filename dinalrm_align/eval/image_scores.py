"""Scores of single images by any reward, as the public test sets are evaluated.

Every image is scored separately, in an order that does not depend on the pairs (`ImageSet.order`). RNG streams are
keyed by (seed, prompt, draw), so images of one prompt and size share their noise.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dinalrm_align.data.source import Encoders
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, PairScores, Pieces, check_finite
from dinalrm_align.eval.test_sets import ImageSet
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.images import image_tensor, open_image
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.digest import text_digest

PIECE = 8
"""Batches per stored piece."""
MULTIPLE = 16  # divisor of image sides: SD3's VAE (8) times its patches (2)

OnBad = Literal["refuse", "skip"]
"""What to do about an image that is missing or cannot be read: raise ValueError, or leave out its pairs."""
ImageScorer = Callable[[Sequence[Image.Image], Sequence[str]], Mapping[str, np.ndarray]]
"""(B images of any size, B prompts) -> `NoiseLevels.name` -> (B,) scores."""


@dataclass(frozen=True)
class Fit:
    """How images are resized (LANCZOS) for a latent reward.

    how: "area" keeps the aspect ratio at the area height x width, with sides rounded to multiples of 16; "crop" scales
    the image to cover height x width and crops the centre.
    """

    how: Literal["area", "crop"]
    height: int
    width: int

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, H, W) in [0, 1]."""
        if self.how == "crop":
            fitted = ImageOps.fit(image, (self.width, self.height), method=Image.Resampling.LANCZOS)
        else:
            scale = (self.height * self.width / (image.width * image.height)) ** 0.5
            sides = [max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in image.size]
            fitted = image.resize(sides, Image.Resampling.LANCZOS)
        return image_tensor([fitted])[0]


def image_scorer(reward: Reward, encoders: Encoders, fit: Fit, levels: Sequence[NoiseLevels], seed: int) -> ImageScorer:
    """Raw scores of a latent reward at `levels`; or, where these are [NO_NOISE], the weighted sum of the parts of any
    reward: latent rewards at their config's level and scale, image rewards on the images as they are.

    encoders, fit: of the images that latent rewards read. Raises ValueError when a latent reward was trained with other
    encoders; and, when called, for a reward that cannot score images.
    """
    parts, weights = reward.named_parts, reward.weights
    for part in reward.noise_parts:
        encoders.manifest().check(part.config)

    def raw_scores(
        part: LatentReward, levels: Sequence[NoiseLevels], images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> dict[str, np.ndarray]:
        scores = {level.name: np.empty(len(images), np.float32) for level in levels}
        pixels = [fit(image) for image in images]
        for size in dict.fromkeys(image.shape for image in pixels):
            rows = [row for row, image in enumerate(pixels) if image.shape == size]
            latents = encoders.encode_images(torch.stack([pixels[row] for row in rows])).to(part.device)
            texts = [prompts[row] for row in rows]
            conditions = Conditions(texts, *encoders.encode_prompts(texts))
            for level in levels:
                noise = torch.stack([draw_noise(texts, latents.shape[1:], seed, draw) for draw in level.draws])
                raw = part.raw(latents, conditions, sigma=list(level.sigmas), noise=noise)
                scores[level.name][rows] = raw.cpu().numpy()
        return scores

    def part_score(part: Reward, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        if not part.noise_parts:
            return part.score_images(list(images), list(prompts)).cpu().numpy()
        config = part.config
        sigma = config.sigma if config.image_sigma is None else config.image_sigma
        level = NoiseLevels.at(*(sigma if isinstance(sigma, Sequence) else [sigma]))
        return raw_scores(part, [level], images, prompts)[level.name] * config.score_scale + config.score_bias

    @torch.no_grad()
    def score(images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        if levels != [NO_NOISE]:
            return raw_scores(reward, levels, images, prompts)
        return {NO_NOISE.name: sum(weights[name] * part_score(part, images, prompts) for name, part in parts.items())}

    return score


def draw_noise(prompts: Sequence[str], shape: Sequence[int], seed: int, draw: int) -> Tensor:
    """(B, *shape) standard normal on the CPU, equal for equal prompts."""
    keys = [int(text_digest(prompt), 16) for prompt in prompts]
    drawn = {key: torch.randn(*shape, generator=seeded_generator(seed, key, draw)) for key in dict.fromkeys(keys)}
    return torch.stack([drawn[key] for key in keys])


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
    """Score all images of a set. Returns the scores, and the reason for each image without a score by its name.

    Images are stored in `pieces` as they are scored. Raises ValueError for scores that are not finite, when no pair is
    left, and for unreadable images unless `on_bad` is "skip".
    """
    missing = images.missing()
    if missing and on_bad == "refuse":
        got = f"{len(missing)} of {len(images.images)} images are missing, as {missing[:3]}"
        raise ValueError(f"{images.name}: {got}; add them, or leave out their pairs with --on_bad skip")
    names = [level.name for level in levels]
    order, size = images.order, PIECE * batch_size
    table = np.full((len(names), len(order)), np.nan, np.float32)
    faults: dict[str, str] = {}
    with tqdm(total=len(order), desc=title, unit=" images", dynamic_ncols=True) as bar:
        for number, start in enumerate(range(0, len(order), size)):
            rows = order[start : start + size]
            piece = pieces.load(number)
            if piece is None:
                scores, found = [], {}
                for first in range(0, len(rows), batch_size):
                    scores.append(_score_batch(score, images, rows[first : first + batch_size], names, on_bad, found))
                    bar.update(len(scores[-1][0]))
                piece = {"scores": np.concatenate(scores, axis=1)}, found
                pieces.save(number, piece)
            else:
                bar.update(len(rows))
            table[:, rows] = piece[0]["scores"]
            faults |= piece[1]
    return _pair_scores(images, dict(zip(names, table, strict=True)), faults), faults


def _score_batch(
    score: ImageScorer,
    images: ImageSet,
    rows: Sequence[int],
    names: Sequence[str],
    on_bad: OnBad,
    faults: dict[str, str],
) -> np.ndarray:
    """Scores (levels, rows), NaN for images that cannot be read; those are added to `faults`."""
    scores = np.full((len(names), len(rows)), np.nan, np.float32)
    opened: dict[int, Image.Image] = {}
    for column, row in enumerate(rows):
        image = images.images[row]
        try:
            opened[column] = open_image(image.read(), image.name)
        except (OSError, ValueError) as error:
            if on_bad == "refuse":
                how = "replace it, or leave out its pairs with --on_bad skip"
                raise ValueError(f"{images.name}: image {image.name}: {error}; {how}") from error
            faults[image.name] = str(error)
    if opened:
        found = score(list(opened.values()), [images.images[rows[column]].prompt for column in opened])
        for line, name in enumerate(names):
            check_finite(found[name], name, images.name)
            scores[line, list(opened)] = found[name]
    return scores


def _pair_scores(images: ImageSet, scores: dict[str, np.ndarray], faults: Mapping[str, str]) -> PairScores:
    """The pairs whose images both have scores."""
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
