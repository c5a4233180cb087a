"""Sample from a flow: schedules of noise levels, one Euler step, a rollout of all steps.

`rollout` takes the model as a callable `velocity(latents (B, C, H, W), sigma: float) -> (B, C, H, W)`, float32. The
callable itself must apply guidance, prompts and adapters. During sampling sigma falls from 1 (noise) to 0 (clean).
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinalrm_align.flow.noise import check_latents, shift_sigma
from dinalrm_align.train.settings import check_integer, check_number, did_you_mean

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

Velocity = Callable[[Tensor, float], Tensor]


def schedule_sigmas(scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> list[float]:
    """Return the noise levels at which diffusers samples with `scheduler`: num_steps + 1 floats, falling from 1 to 0.

    Example (shift 3, 4 steps): 1, 0.8577, 0.6022, 0.0089, 0. diffusers shifts the lowest positive level twice;
    `linear_sigmas` shifts every level once. Raises ValueError if the scheduler's shift depends on image size.
    """
    _check_schedule(scheduler, num_steps)
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.tolist()


def linear_sigmas(scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> list[float]:
    """Return the N + 1 noise levels 1, (N - 1)/N, ..., 1/N, 0, shifted by the scheduler's shift; N = num_steps.

    Flow-Factory, DanceGRPO and SRPO use this schedule. Raises ValueError if the shift depends on image size.
    """
    _check_schedule(scheduler, num_steps)
    levels = torch.linspace(num_steps, 0, num_steps + 1, dtype=torch.float64) / num_steps
    return shift_sigma(levels, scheduler.config.shift).tolist()


SCHEDULES: dict[str, Callable[["FlowMatchEulerDiscreteScheduler", int], list[float]]] = {
    "diffusers": schedule_sigmas,  # as in diffusers' pipeline and flow_grpo
    "linear": linear_sigmas,
}


def named_sigmas(name: str, scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> list[float]:
    """Return the num_steps + 1 noise levels of the schedule "diffusers" or "linear"; ValueError for another name."""
    if name not in SCHEDULES:
        guess = did_you_mean(name, SCHEDULES) or ";"
        raise ValueError(f"unknown schedule {name!r}{guess} known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name](scheduler, num_steps)


def _check_schedule(scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> None:
    check_integer("num_steps", num_steps, low=1)
    if scheduler.config.use_dynamic_shifting:
        raise ValueError("use_dynamic_shifting: got true; expected a scheduler with a fixed shift, as in SD3 and SD3.5")


def ode_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Take one Euler step: return latents + (sigma_next - sigma) velocity, (B, C, H, W), float32, differentiable."""
    check_latents("latents", latents)
    check_latents("velocity", velocity, like=latents)
    for name, level in (("sigma", sigma), ("sigma_next", sigma_next)):
        check_number(name, level, low=0, high=1)
    return latents.float() + (sigma_next - sigma) * velocity.float()


def rollout(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate the flow with Euler steps from sigmas[0] to sigmas[-1], differentiably.

    Takes latents (B, C, H, W) at noise level sigmas[0] and returns latents at sigmas[-1], float32. Raises ValueError
    unless `sigmas` is strictly decreasing.
    """
    steps = list(itertools.pairwise(sigmas))
    if not sigmas or not all(sigma > sigma_next for sigma, sigma_next in steps):
        raise ValueError(f"sigmas: got {list(sigmas)!r:.80}; expected falling levels, from 1 (noise) to 0 (clean)")
    for sigma, sigma_next in steps:
        latents = ode_step(latents, velocity(latents, sigma), sigma, sigma_next)
    return latents


def seeded_noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Draw standard normal noise (B, C, H, W), float32. generators[i] draws sample i, which has `shape` (C, H, W)."""
    if not generators or not all(isinstance(generator, torch.Generator) for generator in generators):
        raise TypeError(f"generators: got {generators!r:.80}; expected one torch.Generator per sample, at least one")
    drawn = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
    return torch.stack(drawn)
