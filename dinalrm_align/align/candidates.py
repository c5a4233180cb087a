"""Sample every prompt several times, score the samples with a reward, and rank them to form preference pairs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.align.signal import has_spread
from dinalrm_align.flow.sampling import Velocity, rollout, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.device import to_device


@torch.no_grad()
def scored_candidates(
    sampler: Sampler,
    reward: Reward,
    conditions: Conditions,
    generators: Sequence[torch.Generator],
    *,
    count: int,
    reward_sigma: Sequence[float] | None = None,
    batch_size: int | None = None,
    velocity_for: Callable[[Conditions], Velocity] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw `count` samples of each of B prompts, and score the samples with the reward.

    Returns latents (B, count, C, H, W) float32 and scores (B, count), on the policy's device.

    Args:
        conditions: text conditions of the B prompts, on any device.
        generators: one per prompt. Each draws the initial noise of the prompt's samples, and then one noise tensor
            for the reward. All samples of a prompt are scored with this tensor, so noise does not change their ranking.
        reward_sigma: noise levels sigma at which the reward scores the latents; None: the reward's default levels.
        batch_size: number of samples drawn and scored at once; None: all.
        velocity_for: a function that returns the velocity for a batch's conditions; default: `sampler.velocity_for`.
    """
    velocity_for = velocity_for or sampler.velocity_for
    noise = torch.cat([seeded_noise(sampler.latent_shape, [generator] * count) for generator in generators])
    reward_noise = seeded_noise(sampler.latent_shape, generators).repeat_interleave(count, dim=0)
    rows = [row for row in range(len(conditions)) for _ in range(count)]
    latents, scores = [], []
    for start in range(0, len(rows), batch_size or len(rows)):
        part = slice(start, start + (batch_size or len(rows)))
        batch = conditions.take(rows[part], sampler.device)
        with sampler.meter.phase("rollout"):
            latents.append(rollout(velocity_for(batch), to_device(noise[part], sampler.device), sampler.sigmas))
        with sampler.meter.phase("reward"):
            score = reward(latents[-1], batch, sigma=reward_sigma, noise=to_device(reward_noise[part], sampler.device))
            scores.append(score)
    return torch.cat(latents).unflatten(0, (-1, count)), torch.cat(scores).view(-1, count)


def ranked_pairs(scores: Sequence[float], number: int, min_gap: float) -> list[tuple[int, int]]:
    """Return index pairs (chosen, rejected) of one prompt's images: best and worst, second best and second worst, ...

    The list has at most `number` pairs, and no image is in two pairs. It ends before the first pair of images
    whose scores are equal up to rounding or differ by less than min_gap. Among equal scores, the lower index ranks
    higher.
    """
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    pairs = []
    for chosen, rejected in list(zip(order, reversed(order)))[: min(number, len(order) // 2)]:
        gap = scores[chosen] - scores[rejected]
        if gap < min_gap or not has_spread(torch.tensor([scores[chosen], scores[rejected]], dtype=torch.float64)):
            break
        pairs.append((chosen, rejected))
    return pairs
