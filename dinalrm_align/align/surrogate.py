"""Policy gradients on stochastic denoising steps (Flow-GRPO, arXiv 2505.05470): advantages, ratios, loss and KL."""

import torch
from torch import Tensor

from dinalrm_align.flow.sde import Transition


def group_advantages(scores: Tensor, std: str, floor: float) -> Tensor:
    """Return (score - mean of its group) / (std + floor) for scores (groups, group_size): the same shape, float64.

    std: "group", the population standard deviation within each group, or "global", that of all scores.
    """
    if std not in ("group", "global"):
        raise ValueError(f"unknown advantage_std {std!r}; known: group, global")
    scores = scores.double()
    spread = scores.std(dim=1, keepdim=True, correction=0) if std == "group" else scores.std(correction=0)
    return (scores - scores.mean(dim=1, keepdim=True)) / (spread + floor)


def clipped_loss(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """Return PPO's clipped loss max(-A rho, -A clip(rho, 1 - c, 1 + c)); rho, A and the result are (n,)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def guarded_ratio(step: Transition, old_mean: Tensor, log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Return GRPO-Guard's ratio (arXiv 2510.22319), (n,): exp((lp - lp_old + mean|mu - mu_old|^2 / (2 std^2)) std).

    For a normal distribution this is exp of the mean of noise x (mu - mu_old), so that the log-ratio has mean 0 and the
    same scale at every noise level. Divide the loss by -step.delta afterwards to give all steps the same weight.
    """
    std = step.std.to(log_prob)
    bias = (step.mean - old_mean).square().mean(dim=(1, 2, 3)) / (2 * std.square())
    return torch.exp((log_prob - old_log_prob + bias) * std)


def step_kl(form: str, step: Transition, reference: Transition, difference: Tensor) -> Tensor:
    """Return the KL of a policy step to the reference's step from the same latents, (n,), differentiable in `step`.

    form: "scale", mean|mu - mu_reference|^2 / (2 s^2), with s = step.scale; "std", the same with std in place of s;
    "velocity", the mean square of `difference` (n, C, H, W), the policy's velocity minus the reference's.
    """
    if form == "velocity":
        return difference.square().mean(dim=(1, 2, 3))
    if form not in ("scale", "std"):
        raise ValueError(f"unknown kl_form {form!r}; known: scale, std, velocity")
    square = (step.mean - reference.mean).square().mean(dim=(1, 2, 3))
    return square / (2 * getattr(step, form).to(square).square())
