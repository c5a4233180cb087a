"""Sampling from a flow: the noise schedule, one Euler step, a rollout. Plain functions over a velocity callable.

A velocity is `velocity(latents (B, C, H, W), sigma: float) -> (B, C, H, W)`, float32; guidance, prompts and adapters
are the caller's and live in its closure. Conventions of `noise`: sigma falls from 1 (noise) to 0 (clean latents).
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.train.settings import check_integer, check_number

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

Velocity = Callable[[Tensor, float], Tensor]


def schedule_sigmas(scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> list[float]:
    """The num_steps + 1 levels that a pipeline with this scheduler samples at, from 1 to 0. `scheduler` is not touched.

    They are diffusers' own, for parity: with shift 3 and 4 steps 1, 0.8577, 0.6022, 0.0089, 0, where the shift is
    applied to a range whose lower end is shifted already (the textbook's 1, 0.9, 0.75, 0.5, 0 differ). Raises
    ValueError for fewer than one step and for schedulers that shift by picture size.
    """
    check_integer("num_steps", num_steps, low=1)
    if scheduler.config.use_dynamic_shifting:
        raise ValueError("the scheduler has use_dynamic_shifting; expected a fixed shift, as in SD3 and SD3.5")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_steps)
    return scheduler.sigmas.tolist()


def ode_step(latents: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """Euler's step of d latents / d sigma = velocity to sigma_next: (B, C, H, W), float32, differentiable."""
    check_latents("latents", latents)
    check_latents("velocity", velocity, like=latents)
    for name, level in (("sigma", sigma), ("sigma_next", sigma_next)):
        check_number(name, level, low=0, high=1)
    return latents.float() + (sigma_next - sigma) * velocity.float()


def rollout(velocity: Velocity, latents: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Follow the flow from latents (B, C, H, W) at sigmas[0] through all of `sigmas` to latents at sigmas[-1].

    Differentiable through every step unless the caller turns gradients off. Raises ValueError unless sigmas fall.
    """
    if not sigmas or any(not sigma > sigma_next for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True)):
        raise ValueError(f"sigmas: got {list(sigmas)!r:.80}; expected falling levels, from 1 (noise) to 0 (clean)")
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        latents = ode_step(latents, velocity(latents, sigma), sigma, sigma_next)
    return latents


def seeded_noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """One standard normal sample of `shape` (C, H, W) per generator -> (B, C, H, W), float32, on the generators'
    device.

    A sample depends on its own generator, not on its place in the batch or on the batch's size.
    """
    if not generators or not all(isinstance(generator, torch.Generator) for generator in generators):
        raise TypeError(f"generators: got {generators!r:.80}; expected one torch.Generator per sample, at least one")
    return torch.stack([torch.randn(shape, generator=generator, device=generator.device) for generator in generators])
