"""Argument checks for latent rewards. Error messages name the argument, the value passed and the value expected."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dinalrm_align.reward.backbones import Backbone

LATENTS = "scaled latents (B, C, H, W), as the transformer sees them"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_latents_fit(latents: Tensor, backbone: Backbone, device: torch.device) -> None:
    """Raise unless `latents` is a floating-point tensor on `device` whose channels and size fit the backbone."""
    if not isinstance(latents, Tensor):
        got = type(latents).__name__
        raise TypeError(f"latents: got {got}, expected a tensor of {LATENTS}; score_images takes images")
    shape = tuple(latents.shape)
    if latents.dim() != 4 or latents.dtype not in FLOATING or shape[0] == 0 or latents.layout != torch.strided:
        raise ValueError(f"latents: got {latents.dtype} of shape {shape}; expected at least one, floating: {LATENTS}")
    if shape[1] != backbone.in_channels:
        raise ValueError(
            f"latents: got {shape[1]} channels, the backbone takes {backbone.in_channels}; use latents of the VAE that "
            "this reward was trained with"
        )
    if any(size % backbone.patch_size or size == 0 for size in shape[2:]):
        raise ValueError(
            f"latents: got height x width {shape[2]} x {shape[3]}; expected multiples of the patch size "
            f"{backbone.patch_size}: crop them, or sample at a size that the VAE factor times it divides"
        )
    if max(shape[2:]) > backbone.max_size:
        raise ValueError(
            f"latents: got height x width {shape[2]} x {shape[3]}; the backbone has positions for at most "
            f"{backbone.max_size} x {backbone.max_size}: use a lower resolution"
        )
    if latents.device != device:
        raise ValueError(f"latents are on {latents.device}, the reward is on {device}: move one of them")


def check_images_fit(images: Tensor, backbone: Backbone, factor: int) -> None:
    """Raise ValueError if images (B, 3, H, W) are too large for the backbone. factor: VAE downscaling factor."""
    limit, (height, width) = backbone.max_size * factor, images.shape[2:]
    if max(height, width) > limit:
        raise ValueError(f"images: got height x width {height} x {width}; expected at most {limit}: resize them first")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError if `tensor` contains NaN or infinity, or is on the meta device."""
    if tensor.is_meta:
        raise ValueError(f"{name}: got a tensor on meta, which holds no values; expected one on the CPU or a GPU")
    if not bool(torch.isfinite(tensor.detach()).all()):
        bad = int((~torch.isfinite(tensor.detach())).sum())
        raise ValueError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; expected finite numbers "
            "(float16 overflows in T5 and in the VAE: use bfloat16 or float32)"
        )


def check_text_choice(
    prompts: Sequence[str] | str | None, prompt_embeds: Tensor | None, pooled_prompt_embeds: Tensor | None
) -> None:
    """Raise ValueError unless the caller passed either `prompts` or both `prompt_embeds` and `pooled_prompt_embeds`."""
    embeds = [prompt_embeds is not None, pooled_prompt_embeds is not None]
    if prompts is not None and any(embeds):
        raise ValueError("got both prompts and embeddings; pass prompts, or prompt_embeds with pooled_prompt_embeds")
    if prompts is None and not any(embeds):
        raise ValueError("got neither prompts nor embeddings; pass prompts, or prompt_embeds with pooled_prompt_embeds")
    if any(embeds) and not all(embeds):
        got, lacking = ("prompt_embeds", "pooled_prompt_embeds")[:: 1 if embeds[0] else -1]
        raise ValueError(f"got {got} without {lacking}; pass both, as encode_prompt returns them")


def check_embeds(prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, backbone: Backbone, batch: int) -> None:
    """Raise ValueError unless both embeddings are finite, have `batch` samples, and fit the backbone's text widths."""
    for name, tensor, dims, width in (
        ("prompt_embeds", prompt_embeds, 3, backbone.text_width),
        ("pooled_prompt_embeds", pooled_prompt_embeds, 2, backbone.pooled_width),
    ):
        expected = f"({batch}, L, {width})" if dims == 3 else f"({batch}, {width})"
        if not isinstance(tensor, Tensor) or tensor.dim() != dims or tensor.dtype not in FLOATING:
            raise ValueError(f"{name}: got {_got(tensor)}; expected a floating tensor of shape {expected}")
        if tensor.shape[0] != batch:
            got = f"{batch} latents, {tensor.shape[0]} {name}"
            raise ValueError(f"one prompt per latent: got {got}; expected {name} of shape {expected}")
        if tensor.shape[-1] != width:
            raise ValueError(
                f"{name}: got width {tensor.shape[-1]}, the backbone takes {width}; encode the prompts with the text "
                "encoders of this reward's base model"
            )
        if tensor.numel() == 0:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, no tokens; expected {expected}, L at least 1")
        check_finite(name, tensor)


def check_sigma(sigma: float | Tensor | Sequence[float], batch: int) -> float | Tensor | tuple[float, ...]:
    """Return `sigma` as a float, a (batch,) tensor or a tuple of floats. Raise if a value is not a number in [0, 1]."""
    expected = f"a float, a ({batch},) tensor, or a list of floats (an ensemble), each in [0, 1]"
    if isinstance(sigma, Tensor):
        if sigma.dim() == 0 and not sigma.is_meta:
            sigma = sigma.item()
        elif sigma.shape != (batch,) or sigma.is_meta:
            raise ValueError(f"sigma: got a tensor of shape {_got(sigma)}; expected {expected}")
    if isinstance(sigma, Tensor):
        values = sigma.detach().tolist()
    else:
        values = list(sigma) if isinstance(sigma, list | tuple) else [sigma]
    if not values or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise TypeError(f"sigma: got {sigma!r:.80}; expected {expected}")
    wrong = [value for value in values if not 0 <= value <= 1 or not math.isfinite(value)]
    if wrong:
        raise ValueError(f"sigma: got {wrong[0]:g}, outside [0, 1]; expected {expected} (a timestep is 1000 sigma)")
    return tuple(map(float, values)) if isinstance(sigma, list | tuple) else sigma


def draw_noise(latents: Tensor, noise: Tensor | None, generator: torch.Generator | None, levels: int) -> Tensor:
    """Check and return `noise`. If `noise` is None, return standard normal noise of the latents' shape.

    Noise is drawn on the generator's device, so a CPU generator gives the same noise on every device. The result is on
    the latents' device. levels: number K of noise levels; `noise` may have the latents' shape or (K, B, C, H, W).
    """
    if noise is not None and generator is not None:
        raise ValueError("got both noise and generator; pass one of them")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: got {type(generator).__name__} {generator!r:.40}; expected a torch.Generator: "
            "torch.Generator().manual_seed(seed)"
        )
    if noise is None:
        where = latents.device if generator is None else generator.device
        return torch.randn(latents.shape, generator=generator, device=where, dtype=torch.float32).to(latents.device)
    shapes = (tuple(latents.shape), (levels, *latents.shape))
    if not isinstance(noise, Tensor) or tuple(noise.shape) not in shapes or noise.dtype not in FLOATING:
        expected = f"the latents' {shapes[0]}, or {shapes[1]}, one draw per level"
        raise ValueError(f"noise: got {_got(noise)}; expected {expected}")
    check_finite("noise", noise)
    return noise.to(latents.device)


def check_scores(raw: Tensor, latents: Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError if raw scores (B,) contain NaN or infinity. dtype: the backbone's dtype, for the message."""
    bad = int((~torch.isfinite(raw.detach())).sum())
    if bad:
        largest = latents.detach().abs().max().item()
        raise ValueError(
            f"scores: {bad} of {len(raw)} are NaN or infinite, of latents of up to {largest:.3g} (scaled latents have "
            f"about 1) with a backbone in {dtype}; scale the latents, use bfloat16 or float32 in float16's place, and "
            "look for NaN in the reward's weights"
        )


def _got(value: object) -> str:
    """Describe a value for an error message. A tensor is described by its shape, any other value by its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    odd = f" of {value.dtype}" * (value.dtype not in FLOATING) + " on meta" * value.is_meta
    return f"{tuple(value.shape)}{odd}"


def statistics_warning(latents: Tensor, scaling_factor: float) -> str | None:
    """Return a warning text if the latents look collapsed or unscaled, else None.

    Collapsed: the standard deviation of a sample is below 0.05. Unscaled: the standard deviation of the batch is above
    3, or much nearer to 1 / scaling_factor (expected of unscaled VAE latents) than to 1 (expected of scaled latents).
    """
    values = latents.detach().float()
    smallest = values.flatten(1).std(dim=1).min().item()
    std, mean = values.std().item(), values.mean().item()
    if smallest < 0.05:
        return f"latents look collapsed: a sample has standard deviation {smallest:.3g}, scaled latents have about 1"
    raw = 1 / abs(scaling_factor)
    distance_raw, distance_scaled = abs(math.log(std / raw)), abs(math.log(std))
    if std > 3 or (abs(math.log(raw)) > 0.2 and distance_raw < 0.5 * distance_scaled):
        return (
            f"latents look unscaled: standard deviation {std:.3g}, mean {mean:.3g}, where scaled latents have about 1 "
            f"and 0 and raw VAE latents about {raw:.3g}; pass (z - shift_factor) * scaling_factor"
        )
    return None
