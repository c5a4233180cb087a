"""Several samples of each prompt, scored as latents: what preference pairs are picked from. Nothing is decoded."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinalrm_align.flow.sampling import Velocity, rollout, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.cost import PhaseMeter

Reward = Callable[..., Tensor]
"""reward(latents, prompts=..., sigma=..., noise=...) -> (B,): a LatentReward, a ClipReward."""


@torch.no_grad()
def scored_candidates(
    velocity_for: Callable[[Conditions], Velocity],
    reward: Reward,
    conditions: Conditions,
    generators: Sequence[torch.Generator],
    *,
    count: int,
    latent_shape: tuple[int, int, int],
    sigmas: Sequence[float],
    device: torch.device,
    reward_sigma: Sequence[float] | None = None,
    batch_size: int | None = None,
    meter: PhaseMeter | None = None,
) -> tuple[Tensor, Tensor]:
    """`count` samples of each of the B prompts, (B, n, C, H, W) float32, and their scores, (B, n); both on `device`.

    velocity_for: conditions of a batch -> its velocity. conditions: one per prompt, on any device. generators: one per
    prompt, drawn from in order: the noise of its samples, then the noise that the reward reads all of them with, so
    that the reward's own noise has no say in their order. batch_size: pictures sampled and scored at once; None: all.
    """
    meter = meter or PhaseMeter(device)
    noise = torch.cat([seeded_noise(latent_shape, [generator] * count) for generator in generators])
    reward_noise = seeded_noise(latent_shape, generators).repeat_interleave(count, dim=0)
    rows = [row for row in range(len(conditions)) for _ in range(count)]
    latents, scores = [], []
    for start in range(0, len(rows), batch_size or len(rows)):
        part = slice(start, start + (batch_size or len(rows)))
        some = conditions.take(rows[part], device)
        with meter.phase("rollout"):
            latents.append(rollout(velocity_for(some), noise[part].to(device), sigmas))
        with meter.phase("reward"):
            read_with = reward_noise[part].to(device)
            scores.append(reward(latents[-1], prompts=some.prompts, sigma=reward_sigma, noise=read_with))
    return torch.cat(latents).unflatten(0, (-1, count)), torch.cat(scores).view(-1, count)


def ranked_pairs(scores: Sequence[float], number: int, min_gap: float) -> list[tuple[int, int]]:
    """(chosen, rejected) of one prompt's candidates: best and worst, second best and second worst, and so on.

    At most `number` of them and half as many as there are candidates; the first whose scores differ by less than
    min_gap, or not at all, ends the list. Of equal scores the earlier candidate counts as better.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    pairs = []
    for chosen, rejected in list(zip(order, reversed(order)))[: min(number, len(order) // 2)]:
        gap = scores[chosen] - scores[rejected]
        if gap < min_gap or gap == 0:
            break
        pairs.append((chosen, rejected))
    return pairs
