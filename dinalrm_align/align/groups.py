"""Samples compared within groups: their scores at common reward noise, and the advantages that come of them.

A reward of noised latents is noisy itself. A group shares its draws, so that what is compared are the samples; the
variance that separate draws would have added is measured beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dinalrm_align.align.surrogate import group_advantages
from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.flow.sampling import seeded_noise

NO_SPREAD = 1e-6
"""Standard deviation up to which the scores of a group are taken for equal: rounding alone makes as much."""
REWARDS = 12
"""Key of the reward's noise."""
STATISTICS = ("reward", "group_variance", "reward_noise_variance", "dropped_groups", "advantage_size")
"""What is told of a rollout's scores, means over its samples or groups: the score; its variance within a group; the
variance that a draw of the reward's noise for every sample, in place of every group, would have added to that, where
there are two draws or more to tell; the share of groups left out; the advantage's absolute value.
"""

ANCHOR = "anchor"
"""The part that steadies a reward (`align.anchor`): it has a say in the advantages, and is told of by itself."""

Parts = Callable[..., Mapping[str, Tensor]]
"""parts(latents, prompts=..., sigma=..., noise=...) -> name to (B,): the scores that a weighted sum adds up"""


class GroupConfig(Protocol):
    """The settings read here; see `config.grpo.GrpoConfig`."""

    group_size: int
    reward_draws: int
    reward_sigma: list[float] | None
    advantage_std: Literal["group", "global"]
    advantage_floor: float
    advantage_clip: float


@dataclass(frozen=True)
class Judged:
    """Of the N samples of one process: advantages (N,) float32, clipped; kept (N,) bool, false where all scores of the
    group are the same. Of all processes: statistics by name, those of `STATISTICS`, NaN where not measured, and the
    mean score of an anchor.
    """

    advantages: Tensor
    kept: Tensor
    statistics: dict[str, float]


def as_parts(reward: Callable[..., Tensor]) -> Parts:
    """A reward of one part, "reward"."""

    def parts(latents: Tensor, **told: object) -> dict[str, Tensor]:
        return {"reward": reward(latents, **told)}

    return parts


@torch.no_grad()
def group_scores(
    parts: Parts, latents: Tensor, prompts: Sequence[str], keys: Sequence[tuple[int, ...]], config: GroupConfig
) -> dict[str, Tensor]:
    """Scores of final latents (B, C, H, W) by part and draw: (reward_draws, B) float64 on the CPU.

    keys: of each sample's group; samples of one key share their draws. Raises ValueError for scores of another shape,
    or not finite.
    """
    draws = []
    for draw in range(config.reward_draws):
        generators = [seeded_generator(REWARDS, *key, draw) for key in keys]
        noise = seeded_noise(tuple(latents.shape[1:]), generators).to(latents.device)
        draws.append(parts(latents, prompts=prompts, sigma=config.reward_sigma, noise=noise))
    scores = {name: torch.stack([draw[name] for draw in draws]).double().cpu() for name in draws[0]}
    for name, values in scores.items():
        if values.shape != (len(draws), len(latents)) or not bool(values.isfinite().all()):
            raise ValueError(
                f"{name}: got scores of shape {tuple(values.shape[1:])}, {int(values.isnan().sum())} of them NaN; "
                f"expected ({len(latents)},), finite"
            )
    return scores


def judge_groups(
    scores: Mapping[str, Tensor],
    weights: Mapping[str, float],
    config: GroupConfig,
    gather: Callable[[Tensor], Tensor],
    rank: int = 0,
) -> Judged:
    """Advantages of N samples, the groups one after another: the weighted sum of those by each part.

    scores: (draws, N) by part, of process `rank`. gather: (N, draws) of this process -> those of all, in their order.
    What is worked out is worked out of all of them.
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
        varied = varied | (grouped.std(dim=1, correction=0) > NO_SPREAD)
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
    return Judged(advantages[own], kept[own], statistics)
