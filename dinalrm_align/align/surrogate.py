"""The surrogate objective of policy gradients on a flow's steps: advantages, ratios, the clipped loss, the KL.

Flow-GRPO, arXiv 2505.05470; GRPO-Guard, arXiv 2510.22319. Pure functions; a step is a `sde.Transition`.
"""

import torch
from torch import Tensor

from dinalrm_align.flow.sde import Transition


def group_advantages(scores: Tensor, std: str, floor: float) -> Tensor:
    """scores (groups, group_size) -> (score - mean of its group) / (std + floor), the same shape, float64.

    std: "group", the standard deviation (of a population) within each group; "global", that of all scores. Raises
    ValueError for another name.
    """
    scores = scores.double()
    match std:
        case "group":
            spread = scores.std(dim=1, keepdim=True, correction=0)
        case "global":
            spread = scores.std(correction=0)
        case _:
            raise ValueError(f"unknown advantage_std {std!r}; known: group, global")
    return (scores - scores.mean(dim=1, keepdim=True)) / (spread + floor)


def clipped_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(-A rho, -A clip(rho, 1 - c, 1 + c)), all (n,): no gain from moving a ratio further than the clip range."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def guarded_ratio(step: Transition, old_mean: Tensor, log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """GRPO-Guard's ratio (arXiv 2510.22319), (n,): exp((lp - lp_old + mean|mu - mu_old|^2 / (2 std^2)) std).

    For a normal step that is exp of the mean of noise x (mu - mu_old): its logarithm is 0 on average, and as large at
    every level. What it multiplies is divided by -delta, so that all steps weigh the same.
    """
    std = step.std.to(log_prob)
    bias = (step.mean - old_mean).square().mean(dim=(1, 2, 3)) / (2 * std.square())
    return torch.exp((log_prob - old_log_prob + bias) * std)


def step_kl(form: str, step: Transition, reference: Transition, difference: Tensor) -> Tensor:
    """How far a step is from the reference's from the same latents, (n,), differentiable in the first.

    mean|mu - mu_reference|^2 / (2 s^2) with form "scale", / (2 std^2) with "std"; with "velocity" the mean square of
    `difference`, velocity less the reference's (n, C, H, W).
    """
    match form:
        case "velocity":
            return difference.square().mean(dim=(1, 2, 3))
        case "scale" | "std":
            spread = step.scale if form == "scale" else step.std
            square = (step.mean - reference.mean).square().mean(dim=(1, 2, 3))
            return square / (2 * spread.to(square).square())
    raise ValueError(f"unknown kl_form {form!r}; known: scale, std, velocity")
