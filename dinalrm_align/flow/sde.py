"""Stochastic sampling steps of a flow: normal distribution of the next latents, drawing from it, log-probabilities.

A step goes from latents x at noise level sigma to latents x' at a lower level sigma', with Delta = sigma' - sigma. The
velocity v gives the estimates x0 = x - sigma v of the clean latents and x1 = x + (1 - sigma) v of the noise. The step
draws x' = mean + std noise, where noise is standard normal and mean and std depend on the sampler:

    flow_sde    mean = x + v Delta + s^2 Delta x1 / (2 sigma)   s = a sqrt(sigma / (1 - sigma)), std = s sqrt(-Delta)
                Flow-GRPO, arXiv 2505.05470. At sigma = 1, where s would be infinite, 1 - sigmas[1] replaces
                1 - sigma, as in the code of Flow-GRPO; the first step then has std a.
    flow_cps    mean = (1 - sigma') x0 + sigma' cos(a pi / 2) x1     std = sigma' sin(a pi / 2)
                coefficients-preserving sampling, arXiv 2509.05952: x' has the noise level sigma'

Here a stands for the argument `noise_level`. If it is 0, every step is an Euler step of the ODE. As in public
code, the log-probability is the MEAN over C, H and W, not the sum, of the normal log density (flow_sde) or of
-(x' - mean)^2 (flow_cps). Probability ratios are therefore close to 1, and clip ranges are small (1e-6 ... 1e-4).

Coefficients are computed in float64, tensors in float32. Results are differentiable in latents and velocity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.train.device import to_device
from dinalrm_align.train.settings import check_integer, check_number, did_you_mean

SAMPLERS = ("flow_sde", "flow_cps")


@dataclass(frozen=True)
class Transition:
    """Normal distribution of the latents x' after one stochastic step from noise level sigma to sigma'.

    Args:
        mean: mean of x', (B, C, H, W), float32.
        std: standard deviation of x'. The tensors std, scale and delta are (1,) or (B,), float64, on the CPU.
        scale: for flow_sde, a sqrt(sigma / (1 - sigma)), with a = `noise_level`; for flow_cps, equal to std.
        delta: sigma' - sigma, negative.
    """

    sampler: str
    mean: Tensor
    std: Tensor
    scale: Tensor
    delta: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """Return mean + std noise, a draw of x', (B, C, H, W), float32. `noise`: standard normal, (B, C, H, W)."""
        check_latents("noise", noise, like=self.mean)
        return self.mean + per_sample(self.std, self.mean) * noise.float()

    def log_prob(self, latents: Tensor) -> Tensor:
        """Return the log-probability (B,) of `latents`, averaged over C, H, W; ValueError for flow_sde with std 0."""
        check_latents("latents", latents, like=self.mean)
        difference = latents.float() - self.mean
        if self.sampler == "flow_cps":
            return -difference.square().mean(dim=(1, 2, 3))
        if not bool((self.std > 0).all()):
            raise ValueError("std: got 0; expected more: without noise the log-probability is undefined")
        constant = self.std.log() + 0.5 * math.log(2 * math.pi)
        square = (difference / per_sample(self.std, difference)).square().mean(dim=(1, 2, 3))
        return -0.5 * square - to_device(constant.to(square.dtype), square.device)


def transition(
    sampler: str, latents: Tensor, velocity: Tensor, sigmas: Sequence[float], index: int | Tensor, noise_level: float
) -> Transition:
    """Return the distribution of the latents after the step from sigmas[index] to sigmas[index + 1].

    Args:
        sampler: "flow_sde" or "flow_cps".
        latents, velocity: latents at noise level sigmas[index] and the model's velocity there, (B, C, H, W).
        sigmas: noise levels of the whole schedule, not only of this step; strictly decreasing, in [0, 1].
        index: number of the step, from 0 to len(sigmas) - 2: an int, or a tensor (B,) with one index per sample.
        noise_level: scale of the added noise, at least 0; for flow_cps at most 1. 0 gives a deterministic Euler step.
    """
    check_latents("latents", latents)
    check_latents("velocity", velocity, like=latents)
    check_number("noise_level", noise_level, low=0, high=1 if sampler == "flow_cps" else None)
    levels = _levels(sigmas)
    index = _index(index, len(latents), len(levels) - 1)
    sigma, sigma_next = levels[index], levels[index + 1]
    delta = sigma_next - sigma
    match sampler:
        case "flow_sde":
            rest = 1 - torch.where(sigma == 1, levels[1], sigma)
            scale, pull = noise_level * (sigma / rest).sqrt(), noise_level**2 / (2 * rest)  # pull: s^2 / (2 sigma)
            std = scale * (-delta).sqrt()
            on_x, on_v = 1 + pull * delta, delta * (1 + pull * (1 - sigma))
        case "flow_cps":
            scale = std = sigma_next * math.sin(noise_level * math.pi / 2)
            kept = sigma_next * math.cos(noise_level * math.pi / 2)
            # mean = (1 - sigma') (x - sigma v) + kept (x + (1 - sigma) v), collected by x and v
            on_x, on_v = 1 - sigma_next + kept, kept * (1 - sigma) - (1 - sigma_next) * sigma
        case _:
            guess = did_you_mean(sampler, SAMPLERS) or ";"
            raise ValueError(f"unknown sampler {sampler!r}{guess} known: {', '.join(SAMPLERS)}")
    mean = per_sample(on_x, latents) * latents.float() + per_sample(on_v, latents) * velocity.float()
    return Transition(sampler, mean, std, scale, delta)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshape values (1,) or (B,) to (1, 1, 1, 1) or (B, 1, 1, 1), float32, on the device of `like` (B, C, H, W)."""
    return to_device(values.to(torch.float32), like.device).view(-1, 1, 1, 1)


def _levels(sigmas: Sequence[float]) -> Tensor:
    levels = torch.as_tensor(sigmas, dtype=torch.float64)
    falling = levels.dim() == 1 and len(levels) > 1 and bool((levels[1:] < levels[:-1]).all())
    if not falling or levels[0] > 1 or levels[-1] < 0:
        raise ValueError(f"sigmas: got {list(sigmas)!r:.80}; expected falling levels in [0, 1], at least two")
    return levels


def _index(index: int | Tensor, batch: int, steps: int) -> Tensor:
    """Return `index` as int64 (1,) or (batch,) on the CPU; ValueError unless all values are in 0 ... steps - 1."""
    if isinstance(index, Tensor) and (index.is_floating_point() or index.shape != (batch,)):
        raise ValueError(f"index: got {index.dtype} of shape {tuple(index.shape)}; expected ({batch},) integers")
    if not isinstance(index, Tensor):
        check_integer("index", index, high=steps - 1)
        return torch.tensor([index])
    low, high = index.min().item(), index.max().item()
    if low < 0 or high >= steps:
        raise ValueError(f"index: got steps {low} ... {high}; the schedule has 0 ... {steps - 1}")
    return index.long().cpu()
