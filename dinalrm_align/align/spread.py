"""The spread of a reward: the standard deviation of its scores over samples of the base model.

The spread over prompts scales an anchor to the first reward. The spread within prompts is the unit of the KL weight
(`refl.kl_unit` reward_std). Only the latter leaves out the differences between prompts, which can dominate the scores
and which no policy can change.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dinalrm_align.align.rollouts import Sampler
from dinalrm_align.align.signal import has_spread
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.progress import progress

SAMPLES, BATCH = 64, 16
"""Number of samples on which a spread is measured, and how many are scored at once."""

RewardSigma = Callable[[Sequence[torch.Generator]], Tensor | Sequence[float] | None]
"""Maps the RNG streams of B samples to the noise levels at which a latent reward scores them."""


@torch.no_grad()
def base_spreads(
    sampler: Sampler, rewards: Sequence[Reward], reward_sigma: RewardSigma, *, per_prompt: int
) -> list[float]:
    """Return the spread of each reward over 64 base-model samples of the first 64 / per_prompt training prompts.

    Seed and settings of `sampler` determine the samples. All rewards score the same samples. per_prompt: samples of
    each prompt, a divisor of 64; see `spread`. Raises ValueError if all scores of a reward are equal.
    """
    scores = []
    for start in progress(range(0, SAMPLES, BATCH), "spread of the reward"):
        numbers = range(start, start + BATCH)
        conditions = sampler.take([number // per_prompt % len(sampler.conditions) for number in numbers])
        generators = [seeded_generator(sampler.seed, number, 0, 2) for number in numbers]
        noise = sampler.noise(generators)
        with sampler.policy.reference():
            latents = sampler.sample(conditions, noise)
        sigma = reward_sigma(generators)
        scores.append([reward(latents, conditions, sigma=sigma, generator=generators[0]) for reward in rewards])
    return [spread(torch.cat(column).view(-1, per_prompt)) for column in zip(*scores, strict=True)]


def spread(scores: Tensor) -> float:
    """Return the standard deviation of scores (P, S), of S samples for each of P prompts.

    For S = 1 it is taken over the prompts, for S > 1 within the prompts: the root of the mean variance of a row. Raises
    ValueError if the scores are equal up to rounding.
    """
    rows = scores.double() if scores.shape[1] > 1 else scores.double().T
    found = float(rows.var(dim=1).mean().sqrt())
    if not bool(has_spread(rows).any()) or not math.isfinite(found):
        raise ValueError(
            f"reward: got a standard deviation of {found:.3g} over {scores.numel()} base-model samples, mean score "
            f"{float(rows.mean()):.6g}; expected scores that differ, to scale by them: take another reward, or "
            "--refl.kl_unit raw and no anchor"
        )
    return found
