"""Reward training in two ways, in pairs per second: text encoded in advance and one forward for all images, against
text encoded at every step and separate forwards for chosen and rejected images (the released code's way).

python examples/evidence/text_in_the_loop.py

Measures steps of LoRA and head on the embedded world's networks, on this machine, with random latents and without
loading. A step has 8 images: 4 plain pairs, or 2 ranked lists of 4, whose 12 pairs one forward serves, while separate
forwards compute each image once per pair.
"""

import itertools
import statistics
import time

import torch

from dinalrm_align import LatentReward
from dinalrm_align.data.pairs import PairBatch
from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.pipeline import load_pipeline
from dinalrm_align.models.specs import MODELS
from dinalrm_align.models.text import Conditions, PromptEncoder
from dinalrm_align.reward.config import LossConfig
from dinalrm_align.reward.losses import preference_loss
from dinalrm_align.reward.model import build_reward_model
from dinalrm_align.reward.training import NoisedPairs, preference_step
from dinalrm_align.train.config import OptimConfig
from dinalrm_align.train.state import adamw

IMAGES, ROUNDS, WARM_UP = 8, 8, 2
spec, loss_config, generator = MODELS["shapes"], LossConfig(), torch.Generator().manual_seed(0)
pipeline = load_pipeline(spec.pipeline, dtype=torch.float32)
config = LatentReward.from_pretrained(spec.reward, pipeline=pipeline).config
model = build_reward_model(config, pipeline.transformer).train()
optimizer = adamw([{"params": [p for p in model.parameters() if p.requires_grad]}], OptimConfig())
prompts = read_prompts(spec.train_prompts)[:IMAGES]
latents, noise = (torch.randn(IMAGES, 16, 16, 16, generator=generator) for _ in range(2))
sigma = torch.rand(IMAGES, generator=generator)
known = PromptEncoder(pipeline, text_length=spec.text_length)


def pairs_of(size: int) -> PairBatch:
    """Groups of `size` images and all their pairs, with cached text."""
    group = torch.arange(IMAGES) // size
    conditions = Conditions.encode(known, prompts[: IMAGES // size]).take(group.tolist())
    lists = [range(first, first + size) for first in range(0, IMAGES, size)]
    pairs = [pair for images in lists for pair in itertools.combinations(images, 2)]
    chosen, rejected = torch.tensor(pairs).T
    return PairBatch(latents, conditions, chosen, rejected, torch.ones(len(pairs)), group)


def in_advance(size: int) -> torch.Tensor:
    batch = pairs_of(size)
    return preference_step(model, NoisedPairs(batch, noise[batch.group], sigma[batch.group]), loss_config)[0]


def in_the_loop() -> torch.Tensor:
    """Four plain pairs."""
    batch = pairs_of(2)
    text = PromptEncoder(pipeline, text_length=spec.text_length)(prompts[: batch.num_groups])  # empty cache
    drawn = sigma[: batch.num_groups], noise[: batch.num_groups]
    scores = [model(latents[rows], *text, *drawn) for rows in (batch.chosen, batch.rejected)]
    return preference_loss(*scores, drawn[0], batch.label, config=loss_config).mean()


def seconds(loss, *arguments: int) -> float:
    began = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss(*arguments).backward()
    optimizer.step()
    return time.perf_counter() - began


print(f"plain pairs, both ways: loss {in_advance(2).item():.6f} and {in_the_loop().item():.6f}")
rounds = [(seconds(in_the_loop), seconds(in_advance, 2), seconds(in_advance, 4)) for _ in range(ROUNDS + WARM_UP)]
loop, plain, lists = (
    pairs / statistics.median(column[WARM_UP:]) for pairs, column in zip((4, 4, 12), zip(*rounds, strict=True))
)
print(f"text in the loop, two forwards:             {loop:6.1f} pairs/s")
print(f"text in advance, one forward, plain pairs:  {plain:6.1f} pairs/s, ratio {plain / loop:.2f}")
print(f"text in advance, one forward, lists of 4:   {lists:6.1f} pairs/s, ratio {lists / loop:.2f}")
