"""Advantages, probability ratios, loss and KL of policy gradients on denoising steps (Flow-GRPO, arXiv 2505.05470)."""

import torch
from torch import Tensor

from dinalrm_align.flow.sde import Transition
from dinalrm_align.train.device import to_device


def group_advantages(scores: Tensor, std: str, floor: float) -> Tensor:
    """Return float64 advantages of scores (groups, group_size): (score - mean of the group) / (std + floor).

    `std`: "group" for the population standard deviation of each group, "global" for that of all scores.
    """
    if std not in ("group", "global"):
        raise ValueError(f"unknown advantage_std {std!r}; known: group, global")
    scores = scores.double()
    spread = scores.std(dim=1, keepdim=True, correction=0) if std == "group" else scores.std(correction=0)
    return (scores - scores.mean(dim=1, keepdim=True)) / (spread + floor)


def clipped_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Return PPO's clipped loss (n,): max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range)), A = advantage."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def guarded_ratio(step: Transition, old_mean: Tensor, log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Return GRPO-Guard's normalised probability ratio of n steps, (n,) (arXiv 2510.22319).

    ratio = exp((log_prob - old_log_prob + mean|step.mean - old_mean|^2 / (2 std^2)) std), where std = step.std. The
    log-ratio has mean 0 and the same scale at every noise level. To give all steps the same weight, the caller must
    divide the loss by -step.delta.
    """
    std = to_device(step.std.to(log_prob.dtype), log_prob.device)
    bias = (step.mean - old_mean).square().mean(dim=(1, 2, 3)) / (2 * std.square())
    return torch.exp((log_prob - old_log_prob + bias) * std)


def step_kl(form: str, step: Transition, reference: Transition, difference: Tensor) -> Tensor:
    """Return the differentiable KL (n,) of the policy's step to the reference's step; both start from the same latents.

    Args:
        form: formula of the KL. "scale": mean|step.mean - reference.mean|^2 / (2 step.scale^2). "std": the same with
            step.std in place of step.scale. "velocity": mean square of `difference`.
        difference: policy velocity - reference velocity, (n, C, H, W).
    """
    if form == "velocity":
        return difference.square().mean(dim=(1, 2, 3))
    if form not in ("scale", "std"):
        raise ValueError(f"unknown kl_form {form!r}; known: scale, std, velocity")
    square = (step.mean - reference.mean).square().mean(dim=(1, 2, 3))
    scale = to_device(getattr(step, form).to(square.dtype), square.device)
    return square / (2 * scale.square())
