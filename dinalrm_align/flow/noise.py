"""Flow-matching conventions of the package: noise level sigma, timestep, adding noise, and densities of sigma.

SD3 and SD3.5 use rectified flow (Esser et al., "Scaling Rectified Flow Transformers", arXiv 2403.03206):

    x_sigma  = (1 - sigma) x0 + sigma noise         x0: scaled VAE latents; noise: standard normal
    velocity = d x_sigma / d sigma = noise - x0     output of the transformer
    timestep = 1000 sigma                           input of the transformer

sigma lies in [0, 1]: 0 is clean, 1 is pure noise. `add_noise`, `denoised` and `timestep_of` compute in float32 for any
input dtype: bfloat16 would round a timestep of 857.14 to 856, and would lose the noise at a low sigma.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.train.checks import check
from dinalrm_align.train.device import to_device
from dinalrm_align.train.settings import check_integer, check_number

NUM_TRAIN_TIMESTEPS = 1000

SigmaDensity = Callable[..., Tensor]  # density(n, *, generator, **params) -> (n,) float32 in [0, 1]


def seeded_generator(*keys: int) -> torch.Generator:
    """Return a CPU generator seeded by a sequence of non-negative integers, such as (seed, step, rank)."""
    entropy = (len(keys), *keys)  # numpy pads with zeros: without the length (0, 1) and (0, 1, 0) would collide
    for key in keys:
        check_integer("key of a seeded generator", key)
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)


def as_sigma(sigma: Tensor | float) -> Tensor:
    """Return sigma as a float32 tensor of unchanged shape and device; ValueError unless all values are in [0, 1]."""
    if not isinstance(sigma, Tensor):
        check_number("sigma", sigma, low=0, high=1)
        return torch.tensor(sigma, dtype=torch.float32)
    if sigma.is_complex() or sigma.dtype == torch.bool or sigma.is_meta or sigma.numel() == 0:
        where = f"{sigma.dtype} of shape {tuple(sigma.shape)} on {sigma.device}"
        raise TypeError(f"sigma: got {where}; expected a float, or a floating tensor that holds values")
    check(torch.stack(sigma.detach().aminmax()), _judge_sigma)
    return sigma.float()


def _judge_sigma(ends: list[float]) -> None:
    low, high = ends
    if not (low >= 0 and high <= 1):
        raise ValueError(f"sigma: got values in [{low:.4g}, {high:.4g}]; expected [0, 1]")


def check_latents(name: str, latents: Tensor, like: Tensor | None = None) -> None:
    """Raise TypeError if `latents` is not floating-point; raise ValueError if it is not 4-D or not shaped as `like`."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        got = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise TypeError(f"{name}: got {got}; expected a floating tensor (B, C, H, W)")
    if latents.dim() != 4 or (like is not None and latents.shape != like.shape):
        expected = "(B, C, H, W)" if like is None else f"{tuple(like.shape)}, the shape of the latents"
        raise ValueError(f"{name}: got shape {tuple(latents.shape)}; expected {expected}")


def expand_sigma(sigma: Tensor | float, latents: Tensor) -> Tensor:
    """Return sigma in float32, with shape (1, 1, 1, 1) for a single value or (B, 1, 1, 1) for B values."""
    sigma = to_device(as_sigma(sigma), latents.device).reshape(-1)
    if sigma.numel() not in (1, latents.shape[0]):
        raise ValueError(f"sigma: got {sigma.numel()} values for {len(latents)} latents; expected one, or one each")
    return sigma.view(-1, *(1,) * (latents.dim() - 1))


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """Return (1 - sigma) latents + sigma noise, (B, C, H, W), float32, differentiable. `sigma`: a float or (B,)."""
    check_latents("latents", latents)
    check_latents("noise", noise, like=latents)
    sigma = expand_sigma(sigma, latents)
    return (1 - sigma) * latents.float() + sigma * noise.float()


def denoised(x_sigma: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """Return x_sigma - sigma velocity, the one-step estimate of clean latents (B, C, H, W), float32, differentiable."""
    check_latents("x_sigma", x_sigma)
    check_latents("velocity", velocity, like=x_sigma)
    return x_sigma.float() - expand_sigma(sigma, x_sigma) * velocity.float()


def timestep_of(sigma: Tensor | float) -> Tensor:
    """Return the timestep that the transformer takes, 1000 sigma, as float32 in the shape of sigma."""
    return as_sigma(sigma) * NUM_TRAIN_TIMESTEPS


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Return shift sigma / (1 + (shift - 1) sigma), the resolution shift of arXiv 2403.03206, equation 23."""
    check_number("shift", shift)
    if shift <= 0:
        raise ValueError(f"shift: got {shift}; expected more than 0")
    return shift * sigma / (1 + (shift - 1) * sigma)


def scheduler_sigmas(num_train_timesteps: int = NUM_TRAIN_TIMESTEPS, shift: float = 3.0) -> Tensor:
    """Return the training noise levels of FlowMatchEulerDiscreteScheduler: (num_train_timesteps,), decreasing."""
    check_integer("num_train_timesteps", num_train_timesteps, low=1)
    sigmas = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32) / num_train_timesteps
    return shift_sigma(sigmas, shift)


def snap_sigma(sigma: Tensor | float, table: Tensor) -> Tensor:
    """Replace each sigma (any shape) by the nearest level in `table` (n,). If two are equally near, the first is used.

    The result is float32, on the device of sigma. The released DiNa-LRM code scores only at `scheduler_sigmas`.
    """
    sigma = as_sigma(sigma)
    if not isinstance(table, Tensor) or table.dim() != 1 or table.numel() == 0:
        got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"table: got {got}; expected levels (n,), as from `scheduler_sigmas`")
    table = table.to(sigma.device)
    return table[(sigma[..., None] - table).abs().argmin(dim=-1)]


# ----------------------------------------------------------------------------- densities of sigma for training


def uniform(n: int, *, generator: torch.Generator) -> Tensor:
    """Draw n values sigma ~ U(0, 1), as in DiNa-LRM (arXiv 2602.11146)."""
    return torch.rand(n, generator=generator, device=generator.device)


def logit_normal(n: int, *, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Draw n values sigma = sigmoid(N(mean, std^2)), by default centred at 1/2 (arXiv 2403.03206, equation 19)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=generator.device))


def mode(n: int, *, generator: torch.Generator, scale: float = 1.29) -> Tensor:
    """Draw n values sigma = 1 - u - scale (cos^2(pi u / 2) - 1 + u), u ~ U(0, 1) (arXiv 2403.03206, equation 20).

    scale: must lie in [-1, 1.75]; positive values favour the middle of [0, 1], negative values the ends.
    """
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"mode density: scale: got {scale}; expected [-1, 1.75], where u to sigma is monotone")
    u = torch.rand(n, generator=generator, device=generator.device)
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


def beta(n: int, *, generator: torch.Generator, a: float = 1.0, b: float = 1.0) -> Tensor:
    """Draw n values sigma ~ Beta(a, b) with numpy, because torch's Beta takes no generator; `generator` seeds numpy."""
    for name, value in (("a", a), ("b", b)):
        if not 0 < value < math.inf:
            raise ValueError(f"beta density: {name}: got {value}; expected more than 0")
    seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
    sigma = np.random.default_rng(seed).beta(a, b, size=n)
    return torch.from_numpy(sigma).to(generator.device, torch.float32)


def constant(n: int, *, generator: torch.Generator, value: float = 0.4) -> Tensor:
    """Return n copies of `value`, (n,), on the generator's device. Draws no random numbers."""
    return torch.full((n,), float(value), device=generator.device)


DENSITIES: dict[str, SigmaDensity] = {draw.__name__: draw for draw in (uniform, logit_normal, mode, beta, constant)}


def sample_sigma(density: str | SigmaDensity, n: int, *, generator: torch.Generator, **params: float) -> Tensor:
    """Draw n noise levels (n,), float32 in [0, 1], on the generator's device.

    Args:
        density: "uniform", "logit_normal", "mode", "beta", "constant", or a callable
            `density(n, generator=..., **params) -> (n,)`.
        params: parameters of the density: mean and std (logit_normal), scale (mode), a and b (beta), value (constant).

    Raises ValueError for an unknown name, and if the drawn values do not have shape (n,) or lie outside [0, 1].
    """
    draw = DENSITIES.get(density) if isinstance(density, str) else density
    if not callable(draw):
        raise ValueError(f"unknown sigma density {density!r:.80}; known: {', '.join(DENSITIES)}, or pass a callable")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}; expected one as from `seeded_generator`")
    check_integer("n", n, low=1)
    for name, value in params.items():
        check_number(f"sigma density {density!r}: {name}", value)
    sigma = draw(n, generator=generator, **params).float()
    if sigma.shape != (n,) or not bool(((sigma >= 0) & (sigma <= 1)).all()):
        raise ValueError(
            f"sigma density {density!r} with {params}: got shape {tuple(sigma.shape)}, "
            f"range [{sigma.min():.4g}, {sigma.max():.4g}]; expected ({n},) in [0, 1]"
        )
    return sigma
