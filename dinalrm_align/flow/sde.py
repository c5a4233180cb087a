"""Stochastic steps of a flow: where a step leads as a normal distribution, a draw from it, its log-probability.

From x at sigma to sigma' < sigma, with velocity v, Delta = sigma' - sigma < 0, x0 = x - sigma v (the clean estimate)
and x1 = x + (1 - sigma) v (the noise estimate), a sampler draws x' = mean + std noise:

    flow_sde    mean = x + v Delta + s^2 Delta x1 / (2 sigma)   s = a sqrt(sigma / (1 - sigma)), std = s sqrt(-Delta)
                Flow-GRPO, arXiv 2505.05470. At sigma = 1 the root takes the schedule's second level for sigma, so
                that the first step injects exactly a, as its code does.
    dance_sde   the same with s = a at every level                                DanceGRPO, arXiv 2505.07818
    flow_cps    mean = (1 - sigma') x0 + sigma' cos(a pi / 2) x1     std = sigma' sin(a pi / 2)
                coefficients-preserving sampling, arXiv 2509.05952: x' has the noise that sigma' stands for

a is the noise level. All three follow the flow itself where a = 0. The log-probability is what public code calls so:
the MEAN over all but the batch's dimension, of the normal density's logarithm for the SDEs, of -(x' - mean)^2 alone for
flow_cps. Ratios of the same step are therefore close to 1, and clip ranges small (1e-4 ... 1e-6).

Coefficients are worked out in float64 and tensors in float32. Everything is differentiable in latents and velocity.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dinalrm_align.flow.noise import check_latents, shift_sigma
from dinalrm_align.flow.sampling import schedule_sigmas
from dinalrm_align.train.settings import check_integer, check_number, did_you_mean

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

SAMPLERS = ("flow_sde", "flow_cps", "dance_sde")


@dataclass(frozen=True)
class Transition:
    """What a step draws from: a normal distribution with mean (B, C, H, W), float32, and one std per sample.

    std, scale, delta: (1,) or (B,), float64 on the CPU. scale is the s of the module's docstring, public code's
    `std_dev_t`: std without the factor sqrt(-delta) (with it for flow_cps, which has no s). delta: sigma' - sigma.
    """

    sampler: str
    mean: Tensor
    std: Tensor
    scale: Tensor
    delta: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """x' (B, C, H, W), float32, from standard normal noise of its shape."""
        check_latents("noise", noise, like=self.mean)
        return self.mean + per_sample(self.std, self.mean) * noise.float()

    def log_prob(self, latents: Tensor) -> Tensor:
        """The log-probability (B,) of x' = latents (B, C, H, W), float32, differentiable in the mean; see the module.

        ValueError where an SDE's step draws nothing (std 0): it has no density.
        """
        check_latents("latents", latents, like=self.mean)
        difference = latents.float() - self.mean
        if self.sampler == "flow_cps":
            return -difference.square().mean(dim=(1, 2, 3))
        if not bool((self.std > 0).all()):
            raise ValueError("a step that draws nothing (noise_level 0) has no density; take its log-probability never")
        constant = self.std.log() + 0.5 * math.log(2 * math.pi)
        square = (difference / per_sample(self.std, difference)).square().mean(dim=(1, 2, 3))
        return -0.5 * square - constant.to(square)


def transition(
    sampler: str, latents: Tensor, velocity: Tensor, sigmas: Sequence[float], index: int | Tensor, noise_level: float
) -> Transition:
    """The step from sigmas[index] to sigmas[index + 1].

    Args:
        sampler: flow_sde, flow_cps or dance_sde.
        latents, velocity: (B, C, H, W) at sigmas[index], any floating dtype.
        sigmas: the whole schedule, falling from 1 at most; its second level matters to flow_sde.
        index: the step, 0 ... len(sigmas) - 2; or one per sample, (B,) integers.
        noise_level: a of the module's docstring, at least 0; flow_cps takes at most 1.

    Raises ValueError or TypeError for anything else.
    """
    check_latents("latents", latents)
    check_latents("velocity", velocity, like=latents)
    check_number("noise_level", noise_level, low=0, high=1 if sampler == "flow_cps" else None)
    levels = _levels(sigmas)
    index = _index(index, len(latents), len(levels) - 1)
    sigma, sigma_next = levels[index], levels[index + 1]
    delta = sigma_next - sigma
    x, v = latents.float(), velocity.float()
    match sampler:
        case "flow_sde":
            rest = 1 - torch.where(sigma == 1, levels[1], sigma)
            scale, pull = noise_level * (sigma / rest).sqrt(), noise_level**2 / (2 * rest)  # pull: s^2 / (2 sigma)
        case "dance_sde":
            scale, pull = torch.full_like(sigma, noise_level), noise_level**2 / (2 * sigma)
        case "flow_cps":
            std = sigma_next * math.sin(noise_level * math.pi / 2)
            kept = sigma_next * math.cos(noise_level * math.pi / 2)
            # mean = (1 - sigma') (x - sigma v) + kept (x + (1 - sigma) v), sorted by x and v
            on_x, on_v = 1 - sigma_next + kept, kept * (1 - sigma) - (1 - sigma_next) * sigma
            return Transition(sampler, per_sample(on_x, x) * x + per_sample(on_v, x) * v, std, std, delta)
        case _:
            guess = did_you_mean(sampler, SAMPLERS) or ";"
            raise ValueError(f"unknown sampler {sampler!r}{guess} known: {', '.join(SAMPLERS)}")
    on_x, on_v = 1 + pull * delta, delta * (1 + pull * (1 - sigma))
    mean = per_sample(on_x, x) * x + per_sample(on_v, x) * v
    return Transition(sampler, mean, scale * (-delta).sqrt(), scale, delta)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """values (1,) or (B,) -> (1 or B, 1, 1, 1), float32 on the device of `like` (B, C, H, W)."""
    return values.to(like.device, torch.float32).view(-1, 1, 1, 1)


# ----------------------------------------------------------------------------- schedules


def linear_sigmas(scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> list[float]:
    """1, (N - 1)/N, ..., 1/N, 0, each shifted by the scheduler's shift: num_steps + 1 levels.

    Flow-Factory, DanceGRPO and SRPO sample at these. ValueError for schedulers that shift by picture size.
    """
    check_integer("num_steps", num_steps, low=1)
    if scheduler.config.use_dynamic_shifting:
        raise ValueError("the scheduler has use_dynamic_shifting; expected a fixed shift, as in SD3 and SD3.5")
    levels = torch.linspace(num_steps, 0, num_steps + 1, dtype=torch.float64) / num_steps
    return shift_sigma(levels, scheduler.config.shift).tolist()


SCHEDULES: dict[str, Callable[["FlowMatchEulerDiscreteScheduler", int], list[float]]] = {
    "diffusers": schedule_sigmas,  # what the pipeline itself, and with it flow_grpo, samples at
    "linear": linear_sigmas,
}


def named_sigmas(name: str, scheduler: "FlowMatchEulerDiscreteScheduler", num_steps: int) -> list[float]:
    """The schedule `name` of SCHEDULES, num_steps + 1 levels from 1 to 0; ValueError for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(
            f"unknown schedule {name!r}{did_you_mean(name, SCHEDULES) or ';'} known: {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[name](scheduler, num_steps)


def _levels(sigmas: Sequence[float]) -> Tensor:
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    if levels.dim() != 1 or len(levels) < 2 or not bool((levels[1:] < levels[:-1]).all()) or levels[0] > 1:
        raise ValueError(f"sigmas: got {list(sigmas)!r:.80}; expected falling levels, at least two, 1 at most")
    if levels[-1] < 0:
        raise ValueError(f"sigmas: got {list(sigmas)!r:.80}; expected levels of at least 0")
    return levels


def _index(index: int | Tensor, batch: int, steps: int) -> Tensor:
    """(1,) or (batch,) int64 on the CPU, in 0 ... steps - 1."""
    if isinstance(index, Tensor) and (index.is_floating_point() or index.shape != (batch,)):
        raise ValueError(f"index: got {index.dtype} of shape {tuple(index.shape)}; expected ({batch},) integers")
    if not isinstance(index, Tensor):
        check_integer("index", index, high=steps - 1)
        return torch.tensor([index])
    low, high = index.min().item(), index.max().item()
    if low < 0 or high >= steps:
        raise ValueError(f"index: got steps {low} ... {high}; the schedule has 0 ... {steps - 1}")
    return index.long().cpu()
