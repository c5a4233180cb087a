"""Scores and advantages within groups. A group is the samples of one prompt.

A latent reward scores noised latents, so its score depends on the noise. All samples of a group are scored with the
same noise draws, so that the noise does not affect their comparison. The module also measures how much
variance the scores would gain if each sample had its own noise draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinalrm_align.align.anchor import ANCHOR
from dinalrm_align.align.config import GroupRolloutConfig
from dinalrm_align.align.signal import has_spread
from dinalrm_align.align.surrogate import group_advantages
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.reward.protocol import Reward
from dinalrm_align.train.device import to_device

REWARDS = 12
"""First key of the generators that draw the reward's noise."""
STATISTICS = ("reward", "group_variance", "reward_noise_variance", "dropped_groups", "advantage_size")
"""Statistics of a rollout, means over its samples or groups:
reward                  score
group_variance          variance of the scores within a group
reward_noise_variance   variance that separate noise for each sample would have added; needs two draws
dropped_groups          share of groups with equal scores; updates leave them out, unless nft.keep_equal is true
advantage_size          absolute advantage
"""

ScoreParts = Callable[..., Mapping[str, Tensor]]
"""score_parts(latents, conditions, *, sigma, noise) -> dict: name of a reward -> scores (B,)"""


@dataclass(frozen=True)
class RolloutAdvantages:
    """Advantages of the N samples of one rank, and statistics of the rollout over all ranks.

    Args:
        advantages: (N,) float32, after clipping.
        kept: (N,) bool, False if all scores in the sample's group are equal; updates leave these samples out.
        statistics: metrics of the rollout by name (`STATISTICS`), NaN where not measured. If the rollout
            uses a second reward, the key "anchor" holds the mean score by that reward.
    """

    advantages: Tensor
    kept: Tensor
    statistics: dict[str, float]


def check_whole_groups(reward: Reward, name: str, sample_batch: int, group_size: int) -> None:
    """Raise ValueError if the reward must score whole groups and `sample_batch` is not a multiple of `group_size`."""
    if reward.wants_groups and sample_batch % group_size:
        raise ValueError(f"{name}.sample_batch: got {sample_batch}; expected a multiple of group_size {group_size}")


@torch.no_grad()
def group_scores(
    score_parts: ScoreParts,
    latents: Tensor,
    conditions: Conditions,
    keys: Sequence[tuple[int, ...]],
    *,
    draws: int,
    sigma: Sequence[float] | None,
) -> dict[str, Tensor]:
    """Score the final latents (B, C, H, W) of B samples, with noise draws that the samples of a group share.

    Returns a dict: name of the reward -> scores (draws, B), float64 on the CPU.

    Args:
        keys: for each sample, the RNG key of its group. Samples with equal keys get the same noise draws.
        sigma: noise levels at which the reward scores; None: the reward's default levels.
    """
    found = []
    for draw in range(draws):
        generators = [seeded_generator(REWARDS, *key, draw) for key in keys]
        noise = to_device(seeded_noise(tuple(latents.shape[1:]), generators), latents.device)
        found.append(score_parts(latents, conditions, sigma=sigma, noise=noise))
    scores = {name: torch.stack([parts[name] for parts in found]).double().cpu() for name in found[0]}
    for name, values in scores.items():
        if values.shape != (draws, len(latents)) or not bool(values.isfinite().all()):
            raise ValueError(
                f"{name}: got scores of shape {tuple(values.shape[1:])}, {int(values.isnan().sum())} of them NaN; "
                f"expected ({len(latents)},), finite"
            )
    return scores


def rollout_advantages(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    config: GroupRolloutConfig,
    gather: Callable[[Tensor], Tensor],
    rank: int = 0,
    normalise: bool = False,
) -> RolloutAdvantages:
    """Return the advantages of this rank's N samples. The advantages by several rewards are weighted and summed.

    Args:
        scores: dict, name of a reward -> scores (draws, N) of this rank. Samples of a group must be adjacent.
        weights: dict, name of a reward -> weight of its advantages.
        gather: a function that takes a tensor (N, draws) of this rank and returns all ranks' tensors, concatenated.
        normalise: whether to normalise the sum to mean 0 and standard deviation 1 over the rollout on all ranks, as
            GDPO does (arXiv 2601.05242). The size of the advantages then does not depend on the number of rewards.
    """
    if scores.keys() != weights.keys():
        raise ValueError(f"the reward has the parts {sorted(scores)}, its weights are for {sorted(weights)}")
    count = next(iter(scores.values())).shape[1]
    scores = {name: gather(draws.T.contiguous()).T for name, draws in scores.items()}
    advantages, varied = 0.0, False
    for name, draws in scores.items():
        grouped = draws.mean(dim=0).view(-1, config.group_size)
        own = group_advantages(grouped, config.advantage_std, config.advantage_floor)
        advantages = advantages + weights[name] * own
        varied = varied | has_spread(grouped)
    if normalise:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + config.advantage_floor)
    advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip).float().flatten()
    total = sum(weights[name] * draws for name, draws in scores.items() if name != ANCHOR)
    grouped = total.mean(dim=0).view(-1, config.group_size)
    noise_variance = total.var(dim=0).mean().item() / len(total) if len(total) > 1 else float("nan")
    values = (
        grouped.mean().item(),
        grouped.var(dim=1, correction=0).mean().item(),
        noise_variance,
        1 - varied.double().mean().item(),
        advantages.abs().mean().item(),
    )
    kept = varied.repeat_interleave(config.group_size)
    own = slice(rank * count, (rank + 1) * count)
    statistics = dict(zip(STATISTICS, values, strict=True))
    if ANCHOR in scores:
        statistics[ANCHOR] = scores[ANCHOR].mean().item()
    return RolloutAdvantages(advantages[own], kept[own], statistics)
