"""Argument checks for latent rewards. Error messages name the argument, the value passed and the value expected."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.flow.sampling import seeded_noise
from dinalrm_align.reward.backbones import Backbone
from dinalrm_align.train.checks import check
from dinalrm_align.train.device import to_device

LATENTS = "scaled latents (B, C, H, W), as the transformer sees them"
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DEFAULT_SEED = 0
"""Seed of the noise of every sample if a caller passes no noise, generator or seeds."""
SEEDS = 2**32
"""Number of distinct seeds: torch's CPU generator reads 32 bits of a seed."""


class ScoreError(ValueError, TypeError):
    """A reward computed invalid scores from input that was accepted."""


def as_batch(name: str, values: Any, device: torch.device) -> Tensor:
    """Return latents or noise as one tensor (B, C, H, W); a tensor (B, C, H, W) is returned unchanged.

    Args:
        values: a tensor or NumPy array (B, C, H, W) or (C, H, W), or a list or tuple of B of shape (C, H, W).
        device: device to copy NumPy arrays to.

    Gradients reach the tensors. Raises TypeError or ValueError for anything else. Values and sizes are not checked.
    """
    if isinstance(values, list | tuple):
        rows = [_as_tensor(f"{name}[{index}]", row, device) for index, row in enumerate(values)]
        kinds = sorted({f"{row.dtype} {tuple(row.shape)} on {row.device}" for row in rows})
        if len(kinds) != 1 or rows[0].dim() != 3:
            got = f"got a list of {len(rows)}: {'; '.join(kinds[:3])}"
            raise ValueError(f"{name}: {got}; expected one or more (C, H, W) of one shape, dtype and device")
        return torch.stack(rows)
    tensor = _as_tensor(name, values, device)
    return tensor[None] if tensor.dim() == 3 else tensor


def _as_tensor(name: str, value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        got = type(value).__name__
        raise TypeError(f"{name}: got {got}; expected a tensor or a NumPy array (score_images takes images)")
    if value.dtype.kind != "f" or value.dtype.itemsize > 8:
        raise ValueError(f"{name}: got a NumPy array of {value.dtype}; expected float32, float16 or float64")
    return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C")).to(device)


def check_latents_fit(latents: Tensor, backbone: Backbone, device: torch.device) -> None:
    """Raise ValueError unless `latents` are floating-point, on `device`, and fit the backbone's channels and size."""
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
    count = tensor.numel()

    def judge(bad: list[float]) -> None:
        if bad[0]:
            raise ValueError(
                f"{name}: {bad[0]:.0f} of {count} values are NaN or infinite; expected finite numbers "
                "(float16 overflows in T5 and in the VAE: use bfloat16 or float32)"
            )

    check((~torch.isfinite(tensor.detach())).sum(), judge)


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
    if isinstance(sigma, np.ndarray | np.floating) and sigma.dtype.kind == "f":
        sigma = torch.from_numpy(np.array(sigma, dtype=np.float64))
    if isinstance(sigma, Tensor):
        if sigma.dim() == 0 and not sigma.is_meta:
            sigma = sigma.item()
        elif sigma.shape != (batch,) or sigma.is_meta:
            raise ValueError(f"sigma: got a tensor of shape {_got(sigma)}; expected {expected}")

    def judge(values: Sequence[float]) -> None:
        wrong = [value for value in values if not 0 <= value <= 1]
        if wrong:
            raise ValueError(f"sigma: got {wrong[0]:g}, outside [0, 1]; expected {expected} (a timestep is 1000 sigma)")

    if isinstance(sigma, Tensor) and sigma.dtype != torch.bool and not sigma.is_complex():
        check(sigma, judge)
        return sigma
    values = list(sigma) if isinstance(sigma, list | tuple) else [sigma]
    if not values or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        raise TypeError(f"sigma: got {sigma!r:.80}; expected {expected}")
    judge(values)
    return tuple(map(float, values)) if isinstance(sigma, list | tuple) else sigma


def draw_noise(
    latents: Tensor, noise: Tensor | None, generator: torch.Generator | None, seeds: Any, levels: int
) -> Tensor:
    """Return standard normal noise on the latents' device: `noise` after a check, or else a draw of the latents' shape.

    A draw is made on the generator's device, for `seeds` on the CPU, so it is the same on every device. The global RNG
    is never used. levels: number K of noise levels; `noise` may have the latents' shape or (K, B, C, H, W).
    """
    given = {"noise": noise, "generator": generator, "seeds": seeds}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"got both {' and '.join(names)}; pass one of them")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator: got {type(generator).__name__} {generator!r:.40}; expected a torch.Generator: "
                "torch.Generator().manual_seed(seed); a list of integers is passed as seeds"
            )
        options = dict(generator=generator, device=generator.device, dtype=torch.float32)
        return to_device(torch.randn(latents.shape, **options), latents.device)
    if noise is None:
        seeds = [DEFAULT_SEED] * len(latents) if seeds is None else check_seeds(seeds, len(latents))
        distinct = list(dict.fromkeys(seeds))
        drawn = seeded_noise(tuple(latents.shape[1:]), [torch.Generator().manual_seed(seed) for seed in distinct])
        return to_device(drawn[[distinct.index(seed) for seed in seeds]], latents.device)
    noise = as_batch("noise", noise, latents.device)
    shapes = (tuple(latents.shape), (levels, *latents.shape))
    if tuple(noise.shape) not in shapes or noise.dtype not in FLOATING:
        expected = f"the latents' {shapes[0]}, or {shapes[1]}, one draw per level"
        raise ValueError(f"noise: got {_got(noise)}; expected {expected}")
    check_finite("noise", noise)
    return to_device(noise, latents.device)


def check_seeds(seeds: Any, batch: int) -> list[int]:
    """Return `seeds`, a list, tuple, range, tensor or NumPy array of `batch` integers (or one integer), as a list.

    Raises TypeError if a seed is not an integer, ValueError for another number of seeds, or one outside [0, 2**32).
    """
    expected = f"{batch} integers from 0 to 2**32 - 1, one per sample"
    if isinstance(seeds, Tensor | np.ndarray | np.integer) and not (isinstance(seeds, Tensor) and seeds.is_meta):
        seeds = seeds.tolist()
    values = list(seeds) if isinstance(seeds, list | tuple | range) else [seeds]
    for index, seed in enumerate(values):
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise TypeError(f"seeds[{index}]: got {type(seed).__name__} {seed!r:.40}; expected {expected}")
        if not 0 <= seed < SEEDS:
            raise ValueError(f"seeds[{index}]: got {seed}; expected {expected} (torch's CPU generator reads 32 bits)")
    if len(values) != batch:
        raise ValueError(f"seeds: got {len(values)} for {batch} samples; expected {expected}")
    return [int(seed) for seed in values]


def check_scores(raw: Tensor, latents: Tensor, dtype: torch.dtype) -> None:
    """Raise ScoreError if raw scores (B,) contain NaN or infinity. dtype: the backbone's dtype, for the message."""
    count = len(raw)

    def judge(measured: list[float]) -> None:
        finite, largest = measured
        if finite < 1:
            raise ScoreError(
                f"scores: {(1 - finite) * count:.0f} of {count} are NaN or infinite, of latents of up to {largest:.3g} "
                f"(scaled latents have about 1) with a backbone in {dtype}; scale the latents, use bfloat16 or float32 "
                "in float16's place, and look for NaN in the reward's weights"
            )

    finite, largest = torch.isfinite(raw.detach()).float().mean(), latents.detach().abs().max()
    check(torch.stack([finite, largest.float()]), judge)


def _got(value: object) -> str:
    """Describe a value for an error message. A tensor is described by its shape, any other value by its type."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    odd = f" of {value.dtype}" * (value.dtype not in FLOATING) + " on meta" * value.is_meta
    return f"{tuple(value.shape)}{odd}"


def length_warning(tokens: int, clip: int, text_length: int) -> str | None:
    """Return a warning text if embeddings of `tokens` tokens do not have the clip + text_length of the training."""
    if tokens == clip + text_length:
        return None
    got = f"{clip} + {tokens - clip} tokens" if tokens > clip else f"{tokens} tokens"
    return (
        f"prompt_embeds: got {got}; this reward was trained with {clip} + {text_length} (CLIP + T5), and another "
        f"number changes the scores: encode the prompts with max_sequence_length={text_length}"
    )


def statistics(latents: Tensor) -> Tensor:
    """Return three numbers (3,): the smallest standard deviation of a sample, and the batch's deviation and mean."""
    values = latents.detach().float()
    return torch.stack([values.flatten(1).std(dim=1).min(), values.std(), values.mean()])


def statistics_warning(measured: Sequence[float], scaling_factor: float) -> str | None:
    """Return a warning text if latents with these `statistics` look collapsed or unscaled, else None.

    Collapsed: the standard deviation of a sample is below 0.05. Unscaled: the standard deviation of the batch is above
    3, or much nearer to 1 / scaling_factor (expected of unscaled VAE latents) than to 1 (expected of scaled latents).
    """
    smallest, std, mean = measured
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
