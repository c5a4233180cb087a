"""Scores of single pictures by any reward, kept in pieces: what a public test set is judged with.

A picture is scored by itself, in an order that knows nothing of pairs (`PictureSet.order`), with noise that depends on
(seed, its prompt, the draw) and its size alone: pictures of one prompt and size share their noise.
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
from dinalrm_align.eval.pieces import Pieces
from dinalrm_align.eval.scores import NO_NOISE, NoiseLevels, PairScores
from dinalrm_align.eval.test_sets import PictureSet
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.images import image_tensor, open_image
from dinalrm_align.reward.callables import LatentFunction
from dinalrm_align.reward.combine import Part, RewardSum
from dinalrm_align.reward.inputs import check_picture_size
from dinalrm_align.reward.latent import LatentReward
from dinalrm_align.train.digest import text_digest

PIECE = 8
"""Batches in a piece that is kept."""
MULTIPLE = 16
"""Sides that SD3's VAE and patches divide."""

ImageScorer = Callable[[Sequence[Image.Image], Sequence[str]], Mapping[str, np.ndarray]]
"""(B pictures of any sizes, B prompts) -> reading's name -> (B,) scores."""


@dataclass(frozen=True)
class Fit:
    """How a picture is brought to a size that a latent reward reads; LANCZOS. how: "area", its own aspect at the area
    of height x width, sides rounded to multiples of 16; "crop", scaled to cover height x width, centre-cropped.
    """

    how: Literal["area", "crop"]
    height: int
    width: int

    def __call__(self, picture: Image.Image) -> Tensor:
        """(3, H, W) in [0, 1]."""
        if self.how == "crop":
            fitted = ImageOps.fit(picture, (self.width, self.height), method=Image.Resampling.LANCZOS)
        else:
            scale = (self.height * self.width / (picture.width * picture.height)) ** 0.5
            sides = [max(1, round(scale * side / MULTIPLE)) * MULTIPLE for side in picture.size]
            fitted = picture.resize(sides, Image.Resampling.LANCZOS)
        return image_tensor([fitted])[0]


def image_scorer(
    reward: Part | RewardSum, encoders: Encoders, fit: Fit, readings: Sequence[NoiseLevels], seed: int
) -> ImageScorer:
    """What scores pictures with a reward. A latent reward encodes the fitted picture once and gives its raw score in
    each of `readings`; a reward over pictures sees the picture itself; a sum adds up its parts, latent ones with their
    own scale at their own level, and has one reading, as rewards over pictures have.

    encoders: of the latent reward's base model. ValueError for a callable over latents, which cannot judge pictures,
    and where the encoders are not those that a latent reward was trained with.
    """
    if isinstance(reward, LatentFunction):
        raise ValueError(f"{reward.name} reads latents and cannot judge pictures; name a reward that reads images")
    if isinstance(reward, LatentReward):
        encoders.manifest().check(reward.config)
        return lambda pictures, prompts: _score_latent(reward, encoders, fit, readings, seed, pictures, prompts)
    if isinstance(reward, RewardSum):
        named = zip(reward.names, reward.parts, strict=True)
        parts = {name: _part(part, encoders, fit, seed) for name, part in named}

        def add_up(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
            scores = {name: part(pictures, prompts)[NO_NOISE.name] for name, part in parts.items()}
            return {NO_NOISE.name: sum(reward.weights[name] * score for name, score in scores.items())}

        return add_up
    return lambda pictures, prompts: {NO_NOISE.name: reward.score_images(list(pictures), list(prompts)).cpu().numpy()}


def _part(part: Part, encoders: Encoders, fit: Fit, seed: int) -> ImageScorer:
    """A part of a sum, read in its one way."""
    if not isinstance(part, LatentReward):
        return image_scorer(part, encoders, fit, [NO_NOISE], seed)
    config = part.config
    level = config.sigma if config.image_sigma is None else config.image_sigma
    reading = NoiseLevels.at(*(level if isinstance(level, Sequence) else [level]))
    raw = image_scorer(part, encoders, fit, [reading], seed)

    def scaled(pictures: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        return {NO_NOISE.name: raw(pictures, prompts)[reading.name] * config.score_scale + config.score_bias}

    return scaled


@torch.no_grad()
def _score_latent(
    reward: LatentReward,
    encoders: Encoders,
    fit: Fit,
    readings: Sequence[NoiseLevels],
    seed: int,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
) -> dict[str, np.ndarray]:
    fitted = [fit(picture) for picture in pictures]
    scores = {reading.name: np.empty(len(pictures), np.float32) for reading in readings}
    for size in dict.fromkeys(pixels.shape for pixels in fitted):
        rows = [row for row, pixels in enumerate(fitted) if pixels.shape == size]
        pixels = torch.stack([fitted[row] for row in rows])
        check_picture_size(pixels, reward.model.trunk, 8)
        latents = encoders.encode_images(pixels).to(reward.device)
        texts = [prompts[row] for row in rows]
        embeds = [each.to(reward.device) for each in encoders.encode_prompts(texts)]
        for reading in readings:
            noise = torch.stack([draw_noise(texts, latents.shape[1:], seed, draw) for draw in reading.draws])
            raw = reward.model(latents, *embeds, reading.sigmas, noise.to(reward.device))
            scores[reading.name][rows] = raw.float().cpu().numpy()
    return scores


def draw_noise(prompts: Sequence[str], shape: Sequence[int], seed: int, draw: int) -> Tensor:
    """(B, *shape) standard normal, on the CPU: one draw a prompt."""
    keys = [int(text_digest(prompt), 16) for prompt in prompts]
    drawn = {key: torch.randn(*shape, generator=seeded_generator(seed, key, draw)) for key in dict.fromkeys(keys)}
    return torch.stack([drawn[key] for key in keys])


def score_image_set(
    score: ImageScorer,
    judged: PictureSet,
    readings: Sequence[NoiseLevels],
    *,
    batch_size: int,
    on_bad: Literal["refuse", "skip"],
    title: str,
    pieces: Pieces,
) -> tuple[PairScores, dict[str, str]]:
    """Score every picture of the set and put the scores to its pairs; and name -> fault of pictures without a score.

    on_bad: what becomes of a picture that is missing or cannot be read: ValueError with its name, or its pairs are left
    out. pieces: where scores are kept as they come. ValueError too when a score is not finite, and no pair is left.
    """
    missing = judged.missing()
    if missing and on_bad == "refuse":
        raise ValueError(
            f"{judged.name}: {len(missing)} of {len(judged.pictures)} pictures are not there, as {missing[:3]}; put "
            "them where their set says, or leave their pairs out: --on_bad skip"
        )
    order, names = judged.order, [reading.name for reading in readings]
    table = np.full((len(names), len(order)), np.nan, np.float32)
    faults: dict[str, str] = {}
    size = PIECE * batch_size
    with tqdm(total=len(order), desc=title, unit=" pictures", dynamic_ncols=True) as bar:
        for number in range(-(-len(order) // size)):
            rows = order[number * size : (number + 1) * size]
            kept = pieces.load(number)
            if kept is None:
                kept = _score_piece(score, judged, rows, names, batch_size, on_bad, bar)
                pieces.save(number, *kept)
            else:
                bar.update(len(rows))
            arrays, words = kept
            table[:, rows] = arrays["scores"]
            faults |= words
    return _to_pairs(judged, dict(zip(names, table, strict=True)), faults), faults


def _score_piece(
    score: ImageScorer,
    judged: PictureSet,
    rows: Sequence[int],
    names: Sequence[str],
    batch_size: int,
    on_bad: str,
    bar: tqdm,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """scores (R, rows), NaN for pictures that cannot be read, and the faults of those."""
    scores, faults = np.full((len(names), len(rows)), np.nan, np.float32), {}
    for start in range(0, len(rows), batch_size):
        places, pictures = [], []
        part = rows[start : start + batch_size]
        for place, row in enumerate(part, start=start):
            picture = judged.pictures[row]
            try:
                pictures.append(open_image(picture.read(), picture.name))
                places.append(place)
            except (OSError, ValueError) as error:
                if on_bad == "refuse":
                    how = "replace it, or leave its pairs out: --on_bad skip"
                    raise ValueError(f"{judged.name}: picture {picture.name}: {error}; {how}") from error
                faults[picture.name] = str(error)
        if pictures:
            found = score(pictures, [judged.pictures[rows[place]].prompt for place in places])
            for line, name in enumerate(names):
                if not np.isfinite(found[name]).all():
                    raise ValueError(f"{judged.name}: scores at {name} are NaN or infinite; look at the weights")
                scores[line, places] = found[name]
        bar.update(len(part))
    return {"scores": scores}, faults


def _to_pairs(judged: PictureSet, scores: dict[str, np.ndarray], faults: Mapping[str, str]) -> PairScores:
    """The pairs whose pictures both have scores."""
    there = np.isfinite(next(iter(scores.values())))
    kept = there[judged.chosen] & there[judged.rejected]
    if not kept.any():
        fault = next(iter(faults.values()), "")
        raise ValueError(f"{judged.name}: none of {len(kept)} pairs has both its pictures ({fault})")
    prompts: dict[str, int] = {}
    caption = np.array([prompts.setdefault(judged.pictures[row].prompt, len(prompts)) for row in judged.chosen])
    return PairScores(
        scores,
        chosen=judged.chosen[kept],
        rejected=judged.rejected[kept],
        label=judged.label[kept],
        caption=caption[kept],
        group=judged.group[kept],
        prompts=tuple(prompts),
        pictures=tuple(picture.name for picture in judged.pictures),
    )
