"""HPSv3++ (arXiv 2606.14657): Qwen3-VL-8B, and a head that reads a generator's capability and the RL iteration.

The hidden state h at the token <|Reward|> gives the estimated capability c in (0, 1) of the model that produced the
image. The RL iteration i in [0, 1] is given. Both scale and shift h, and HPSv3's head reads the result:

    (gamma, beta) = film(encode(c, i)),      (mu, log sigma) = rank_head((1 + gamma) h + beta),      score = mu

i is 0 for ranking and evaluation, the default. For RL the authors raise it linearly from 0.3 to 1. Scores at different
i are not comparable: a run of this package keeps i fixed, so that its held-out scores can be compared.

The weights are hpsv3++.pth (17.6 GB) of hub id Junjun2333/HPSv3-PlusPlus (Apache-2.0), config and tokenizer those of
Qwen/Qwen3-VL-8B-Instruct (Apache-2.0). The released code, github.com/PlantPotatoOnMoon/HPSv3-PlusPlus, states no
licence: its instruction, which is not HPSv3's, is read from the user's copy and verified by its hash.

Three differences from the released code (7bdbebc) change scores only by rounding errors: images are resized in torch
without rounding to bytes, the capability is computed in float32, and the unused output layer is dropped. A fourth
difference changes scores: the released code estimates one capability per batch. Here each image is scored alone, which
equals the released code at batch size 1. Images are resized twice, as in the released code: to multiples of 28 pixels,
then of 32. The gradient is that of mu in the image, through the capability too.
"""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Qwen3VLConfig, Qwen3VLModel

from dinalrm_align.models.preprocess import normalise, resize
from dinalrm_align.reward.pixel.hpsv3 import SCRIPT, HPSv3Reward, Release, fitted_size, patches_of, rank_head
from dinalrm_align.train.settings import check_number

SOURCE, WEIGHTS, BASE = "Junjun2333/HPSv3-PlusPlus", "hpsv3++.pth", "Qwen/Qwen3-VL-8B-Instruct"
NAMES = {r"lm_head\.weight$": None, r"(cond_encoder|film_gen|cap_encoder|rm_head)\.": r"rm_head.\1."}
FACTOR = 28
"""The first resize is to multiples of this number of pixels, as for Qwen2-VL."""
CONDITION = 256
"""Width of the condition's embedding."""
HALF = (0.5, 0.5, 0.5)
"""Qwen3-VL's mean and standard deviation of each colour channel."""
SHA256 = (
    "4b760179e6eeec994804cc37e30968d0132bedeea81989ca7b045f8a2051397d",
    "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a",
)
"""SHA-256 hashes of the instruction (1317 characters) and of the text after it (HPSv3's)."""
HOW_TO_GET = (
    f"pass template=, the path of hpsv3/dataset/{SCRIPT} in https://github.com/PlantPotatoOnMoon/HPSv3-PlusPlus (not "
    "that of the PyPI package hpsv3) or of a JSON file with its two texts, or put it beside the weights"
)


class ConditionedHead(nn.Module):
    """Maps a hidden state (width,) to (mu, log sigma), (2,), given the RL iteration. Parameters: as in the release."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cap_encoder = nn.ModuleDict(
            {
                "proj": nn.Linear(width, CONDITION),
                "pool_attn": nn.Linear(
                    CONDITION, 1
                ),  # weights the images of a batch; no part of a single image's score
                "out_proj": nn.Linear(CONDITION, 1),
            }
        )
        self.cond_encoder = nn.Sequential(nn.Linear(2, CONDITION), nn.GELU(), nn.Linear(CONDITION, CONDITION))
        self.film_gen = nn.Sequential(nn.Linear(CONDITION, width), nn.ReLU(), nn.Linear(width, 2 * width))
        self.rm_head = rank_head(width)
        # a buffer, so that rewards at other iterations have other fingerprints
        self.register_buffer("iteration", torch.zeros(1), persistent=False)

    def capability(self, hidden: Tensor) -> Tensor:
        """Return the estimated capability (1,), in (0, 1), of the model that produced the image. hidden: (width,)."""
        return torch.sigmoid(self.cap_encoder["out_proj"](self.cap_encoder["proj"](hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        condition = torch.cat([self.capability(hidden), self.iteration.to(hidden.dtype)])
        gamma, beta = self.film_gen(self.cond_encoder(condition)).chunk(2)
        return self.rm_head(hidden * (1 + gamma) + beta)


class HPSv3PlusPlusReward(HPSv3Reward):
    """A frozen HPSv3++ reward of latents or images. Load one with `from_pretrained`."""

    release = Release(
        "HPSv3++", WEIGHTS, BASE, "tokenizer_config.json", Qwen3VLConfig, Qwen3VLModel, ConditionedHead, NAMES, SHA256,
        HOW_TO_GET, opening="",
    )  # fmt: skip

    @classmethod
    def from_pretrained(cls, source: str | Path = SOURCE, *, iteration: float = 0.0, **options: Any) -> Self:
        """Load hpsv3++.pth. options: as in `HPSv3Reward.from_pretrained`.

        iteration: RL iteration in [0, 1]; see `set_iteration`.
        """
        reward = super().from_pretrained(source, **options)
        reward.set_iteration(iteration)
        return reward

    def set_iteration(self, iteration: float) -> None:
        """Set the RL iteration of all further scores: 0 for ranking, 0.3 ... 1 for the course of an RL run.

        A pickled copy has the iteration that the reward was loaded with. Raises ValueError outside [0, 1].
        """
        check_number("iteration", iteration, low=0, high=1)
        self.head.iteration.fill_(iteration)

    def _patches(self, image: Tensor, *, patch: int, merge: int, frames: int) -> tuple[Tensor, tuple[int, int]]:
        image = resize(image, fitted_size(*image.shape[-2:], factor=FACTOR, pixels=self.pixels))
        unit = patch * merge
        size = tuple(max(unit, round(side / unit) * unit) for side in image.shape[-2:])
        return patches_of(normalise(resize(image, size), HALF, HALF), patch=patch, merge=merge, frames=frames)

    def _positions(self, tokens: Tensor, grid: Tensor) -> Tensor:
        kinds = (tokens == self.model.config.image_token_id).int()
        return self.model.get_rope_index(tokens, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
