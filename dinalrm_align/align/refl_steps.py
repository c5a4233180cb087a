"""The steps of ReFL and its variants as pure functions: which steps carry the gradient, and the estimate of x0."""

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.flow.noise import add_noise, denoised, sample_sigma
from dinalrm_align.flow.sampling import Velocity, ode_step, rollout, seeded_noise
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.device import to_device


def draw_starts(starts: range, count: int, generator: torch.Generator) -> list[int]:
    """Draw `count` different indices of the first step with gradient. Each is uniform in `starts`."""
    left = list(starts)
    return [left.pop(int(torch.randint(len(left), (), generator=generator))) for _ in range(count)]


def rollout_states(
    velocity_for: Callable[[Conditions], Velocity],
    conditions: Conditions,
    noise: Tensor,
    sigmas: Sequence[float],
    stops: Sequence[Collection[int]],
) -> list[dict[int, Tensor]]:
    """Sample from noise (B, C, H, W); return {n: latents (C, H, W) after n steps} of each sample, for n in its `stops`.

    The samples run in one batch. A sample leaves the batch after its last stop.
    """
    found: list[dict[int, Tensor]] = [{} for _ in stops]
    latents, rows, done = noise, range(len(stops)), 0
    for stop in sorted(set().union(*stops)):
        if len(staying := [row for row in rows if max(stops[row]) >= stop]) < len(rows):
            latents, rows = latents[[rows.index(row) for row in staying]], staying
        latents = rollout(velocity_for(conditions.take(rows)), latents, sigmas[done : stop + 1])
        for row, own in zip(rows, latents, strict=True):
            if stop in stops[row]:
                found[row][stop] = own
        done = stop
    return found


def velocity_kl(velocity: Tensor, reference: Velocity | None, latents: Tensor, sigma: float) -> Tensor:
    """Return the mean (B,) of |velocity - reference(latents, sigma)|^2 over C, H, W. Without a reference, zeros."""
    if reference is None:
        return torch.zeros(len(latents), device=latents.device)
    return (velocity - reference(latents, sigma)).square().mean(dim=(1, 2, 3))


def gradient_steps(
    velocity: Velocity, reference: Velocity | None, latents: Tensor, sigmas: Sequence[float], start: int, count: int
) -> tuple[Tensor, Tensor]:
    """Take `count` steps with gradient from latents (B, C, H, W) at sigmas[start].

    Returns x0_hat (B, C, H, W), the last step's estimate of the clean latents, and the velocity KL (B,), the mean of
    |velocity - reference|^2 over C, H, W and the steps. Both are float32 and differentiable in the parameters of
    `velocity`. `reference` gets the same latents as `velocity`, detached; if it is None, the KL is 0.
    """
    kl = torch.zeros(len(latents), device=latents.device)
    for index in range(start, start + count):
        v = velocity(latents, sigmas[index])
        kl = kl + velocity_kl(v, reference, latents.detach(), sigmas[index]) / count
        if index < start + count - 1:
            latents = ode_step(latents, v, sigmas[index], sigmas[index + 1])
    return denoised(latents, v, sigmas[start + count - 1]), kl


def draw_trained(stop: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw DRTune's steps with gradient: `count` evenly spaced indices in [0, stop], with a random first index."""
    interval = (stop + 1) // count
    first = int(torch.randint(stop + 1 - (count - 1) * interval, (), generator=generator))
    return tuple(first + place * interval for place in range(count))


def drtune_steps(
    velocity: Velocity,
    free: Velocity,
    reference: Velocity | None,
    latents: Tensor,
    sigmas: Sequence[float],
    first: int,
    stop: int,
    trained: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """DRTune (arXiv 2405.00760): take all steps from sigmas[first] to sigmas[stop] and estimate the clean latents.

    The estimate is x0_hat = latents + sum_i (sigma_(i+1) - sigma_i) v_i - sigma_stop v_stop. The velocity v_i of a step
    i in `trained` comes from `velocity` and carries a gradient. The velocity of a step that is not in `trained`
    comes from `free` and is detached. The input of the network is detached at every step, so that the gradient of one
    step passes through no other step.

    Returns x0_hat (B, C, H, W) and the mean (B,) of |velocity - reference|^2 over the steps in `trained`.
    """
    kl = torch.zeros(len(latents), device=latents.device)
    for index in range(first, stop + 1):
        x = latents.detach()
        if index in trained:
            v = velocity(x, sigmas[index])
            kl = kl + velocity_kl(v, reference, x, sigmas[index]) / len(trained)
        else:
            with torch.no_grad():
                v = free(x, sigmas[index])
        if index < stop:
            latents = ode_step(latents, v, sigmas[index], sigmas[index + 1])
    return denoised(latents, v, sigmas[stop]), kl


def renoised_steps(
    velocity: Velocity, reference: Velocity | None, latents: Tensor, noise: Tensor, sigma: float
) -> tuple[Tensor, Tensor]:
    """DRaFT-LV (arXiv 2309.17400): noise finished samples, and denoise them in one step that carries the gradient.

    Returns the estimated clean latents (B, C, H, W) and each sample's mean |velocity - reference|^2, (B,). To
    lower the variance of the gradient, pass each sample n times, with n different noises.

    `latents`: finished samples (B, C, H, W). `noise`: Gaussian noise, which takes the samples to noise level `sigma`.
    """
    x = add_noise(latents.detach(), noise, sigma)
    return gradient_steps(velocity, reference, x, [sigma], 0, 1)


def direct_align_steps(
    velocity: Velocity, reference: Velocity | None, latents: Tensor, noise: Tensor, sigma: float, sigma_next: float
) -> tuple[Tensor, Tensor]:
    """Add known noise to samples, take one step, and subtract the remaining noise: Direct-Align (arXiv 2509.06942).

    Known noise is added to a finished sample x0 up to noise level sigma. One step to sigma_next < sigma gives x'. The
    noise in x' is known, so x0_hat = (x' - sigma_next noise) / (1 - sigma_next) is nearly clean at any sigma. With the
    true velocity, x0_hat equals x0.

    Returns x0_hat (B, C, H, W) and each sample's mean |velocity - reference|^2, (B,).
    `latents`, `noise`: the finished samples x0 and the known noise, (B, C, H, W), without gradient.
    """
    x = add_noise(latents.detach(), noise, sigma)
    v = velocity(x, sigma)
    kl = velocity_kl(v, reference, x, sigma)
    return (ode_step(x, v, sigma, sigma_next) - sigma_next * noise) / (1 - sigma_next), kl


def reward_loss(score: Tensor, form: str, target: float) -> Tensor:
    """Return mean(target - score) for form "linear", or mean(relu(target - score)) for form "relu"; score is (B,)."""
    gap = target - score
    match form:
        case "linear":
            return gap.mean()
        case "relu":
            return F.relu(gap).mean()
    raise ValueError(f"reward loss: got {form!r}; expected linear or relu")


def flow_matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], latents: Tensor, generators: Sequence[torch.Generator]
) -> Tensor:
    """Return the scalar flow-matching loss of SD3's pretraining: mean |velocity(x_sigma, sigma) - (noise - x0)|^2.

    As in SD3 training, sigma is logit-normal(0, 1). `latents`: (B, C, H, W), clean, with the VAE's scaling applied.
    `generators`: one CPU generator per sample.
    """
    noise = to_device(seeded_noise(tuple(latents.shape[1:]), generators), latents.device)
    sigma = torch.cat([sample_sigma("logit_normal", 1, generator=generator) for generator in generators])
    sigma = to_device(sigma, latents.device)
    return (velocity(add_noise(latents, noise, sigma), sigma) - (noise - latents)).square().mean()
