"""Simulated raters of the embedded world, who compare the images of a list.

A rater adds Gaussian noise to the oracle's scores of two images and prefers the image with the higher result
(Thurstone's model): P(first) = Phi(gap / sqrt(s_1^2 + s_2^2)). Close scores get noisy labels. The noise s
grows with the caption's number of objects and with an image's flaws, raters weigh the parts of the score differently,
and small differences are ties.
"""

import itertools

import numpy as np
from torch import Tensor

from dinalrm_align.shapes.config import PairsConfig
from dinalrm_align.shapes.oracle import oracle_score
from dinalrm_align.shapes.scene import Scene

WEIGHED = ("faithfulness", "aesthetics/sharpness", "aesthetics/contrast", "aesthetics/centring")
"""Parts of the oracle's score that raters weigh differently."""


def rate_lists(
    images: Tensor, scenes: list[Scene], config: PairsConfig, rngs: list[np.random.Generator]
) -> list[list[tuple[int, int, float]]]:
    """Label every two images of each list, as `compare` does. `images`: (lists * images of a list, 3, S, S), list by
    list. `scenes`, `rngs`: caption and random numbers of each list.
    """
    prompts = [scene.caption for scene in scenes for _ in range(config.images)]
    found: dict[str, Tensor] = {}
    scores = oracle_score(images, prompts, found).view(len(scenes), 1, -1).numpy()
    parts = {name: part.view(len(scenes), -1).numpy() for name, part in found.items()}
    noise = config.rater_noise * (1 + config.noise_of_flaws * (1 - parts["aesthetics"].astype(float)))
    noise = noise * (1 + config.noise_per_object * np.array([[len(scene.items) - 1] for scene in scenes]))
    if config.rater_spread:
        extra = [config.rater_spread * rng.standard_normal((config.raters, len(WEIGHED))) for rng in rngs]
        scores = scores + np.stack(extra) @ np.stack([parts[name] for name in WEIGHED], 1)
    scores = np.broadcast_to(scores, (len(scenes), config.raters, config.images))
    return [compare(*own, config.tie_gap, rng) for *own, rng in zip(scores, noise, rngs)]


def compare(
    scores: np.ndarray, noise: np.ndarray, tie_gap: float, rng: np.random.Generator
) -> list[tuple[int, int, float]]:
    """Compare every two of n images. Every rater adds fresh noise to both scores, and abstains if they then differ by
    less than `tie_gap`.

    `scores`: (raters, n). `noise`: (n,), standard deviation by image. Returns (chosen, rejected, label) by pair: two
    indices, and the share of raters who prefer the chosen image, at least 0.5; one who abstains counts half.
    """
    pairs = []
    for i, j in itertools.combinations(range(len(noise)), 2):
        errors = (noise[[i, j]] * rng.standard_normal((len(scores), 2))).astype(scores.dtype)
        gap = (scores[:, i] + errors[:, 0]) - (scores[:, j] + errors[:, 1])
        label = float(np.where(np.abs(gap) < tie_gap, 0.5, (np.sign(gap) + 1) / 2).mean())
        pairs.append((i, j, label) if label >= 0.5 else (j, i, 1 - label))
    return pairs
