"""What every reward over pictures has: a borrowed VAE, a differentiable decode, and `LatentReward`'s call.

A subclass writes `score_pixels`. Pictures are RGB in [0, 1], (B, 3, H, W); latents are scaled, (B, C, h, w).
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.models.images import image_tensor
from dinalrm_align.models.text import check_prompts
from dinalrm_align.models.vae import decode_latents
from dinalrm_align.reward.inputs import check_finite
from dinalrm_align.reward.pixel.weights import recompute_layers


def decode_in_slices(vae: AutoencoderKL, latents: Tensor, slice_size: int | None = None) -> Tensor:
    """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), float32 in [0, 1], differentiable.

    slice_size: pictures decoded at a time, None for all. Where a gradient is wanted each slice is decoded once more in
    the backward pass, so that the activations of one slice are held, not those of the batch.
    """
    if slice_size is None:
        return decode_latents(vae, latents)
    wanted = torch.is_grad_enabled() and latents.requires_grad
    return torch.cat(
        [
            checkpoint(decode_latents, vae, part, use_reentrant=False) if wanted else decode_latents(vae, part)
            for part in latents.split(slice_size)
        ]
    )


class PixelReward(nn.Module):
    """A frozen reward over decoded pictures, behind `LatentReward`'s call.

    Gradients reach the latents, never a parameter. The VAE it is given is frozen (requires_grad False, evaluation mode)
    and stays no part of this module: neither moved, cast nor saved with it. Without one, pictures alone can be scored.
    """

    differentiable = True
    """Whether `score_pixels` passes gradients to its pictures."""

    def __init__(self, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self._borrowed = {"vae": None if vae is None else vae.requires_grad_(False).eval()}  # not owned, so in a dict
        self.slice_size: int | None = None
        self._recompute = False

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W), float32 in [0, 1], on `device`; B prompts -> scores (B,), float32, differentiable in the
        images where `differentiable` says so. Arguments have been checked.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it scores pictures: write score_pixels")

    @property
    def device(self) -> torch.device:
        """Of the reward's own weights; of the VAE where it has none; else the CPU."""
        tensor = next(self.parameters(), None)
        if tensor is not None:
            return tensor.device
        return torch.device("cpu") if self._borrowed["vae"] is None else self._borrowed["vae"].device

    @property
    def has_vae(self) -> bool:
        """Whether latents can be scored, or pictures alone."""
        return self._borrowed["vae"] is not None

    @property
    def vae(self) -> AutoencoderKL:
        """The borrowed decoder; ValueError when there is none."""
        if self._borrowed["vae"] is None:
            raise ValueError(
                f"this {type(self).__name__} has no VAE to decode latents with; pass vae=... to from_pretrained"
            )
        return self._borrowed["vae"]

    def forward(
        self,
        latents: Tensor,
        prompts: Sequence[str] | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        sigma: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Scaled clean latents (B, C, h, w) and B prompts -> scores (B,), float32, differentiable in the latents.

        The signature is LatentReward's so that a recipe can take either. A pixel reward reads text and clean pictures:
        prompts are needed as strings, and prompt_embeds, pooled_prompt_embeds, sigma, noise and generator have no
        effect. Raises ValueError when a gradient is wanted of a reward that has none (`differentiable`), and when a
        score is not finite.
        """
        if prompts is None:
            raise ValueError(
                "a pixel reward reads prompts as text: got none; pass prompts=[...], since the diffusion model's "
                "prompt_embeds mean nothing to it"
            )
        self.check_gradient(latents)
        check_decodable(self.vae, latents)
        check_picture_prompts(prompts, len(latents))
        return self._finite(self.score_pixels(self.decode(latents), prompts))

    def check_gradient(self, inputs: Tensor) -> None:
        """ValueError when the call is to be differentiated and this reward cannot be."""
        if not self.differentiable and torch.is_grad_enabled() and isinstance(inputs, Tensor) and inputs.requires_grad:
            raise ValueError(
                f"{type(self).__name__} is not differentiable: it can rank and judge (GRPO, DPO, evaluation), and give "
                "no gradient to ReFL; score under torch.no_grad(), or detach the latents"
            )

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), float32 in [0, 1], on the reward's device.

        In the VAE's own dtype, autocast or not.
        """
        with torch.autocast(self.vae.device.type, enabled=False):
            return decode_in_slices(self.vae, latents.to(self.vae.device), self.slice_size).to(self.device)

    @torch.no_grad()
    def score_images(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """PIL pictures of any sizes, or a tensor (B, 3, H, W) in [0, 1], and B prompts -> scores (B,), float32."""
        if isinstance(images, Tensor):
            pictures = image_tensor(images)
            check_picture_prompts(prompts, len(pictures))
            return self._finite(self.score_pixels(pictures.to(self.device), prompts))
        if isinstance(images, str | bytes) or not isinstance(images, Sequence) or not images:
            raise TypeError(f"images: got {images!r:.60}; expected a list of PIL pictures, or (B, 3, H, W)")
        tensors = [image_tensor([image]) for image in images]
        check_picture_prompts(prompts, len(tensors))
        scores: list[Tensor | None] = [None] * len(tensors)
        for size in dict.fromkeys(tensor.shape for tensor in tensors):  # those of one size go through together
            places = [index for index, tensor in enumerate(tensors) if tensor.shape == size]
            batch = torch.cat([tensors[index] for index in places]).to(self.device)
            part = self.score_pixels(batch, [prompts[index] for index in places])
            for index, score in zip(places, part, strict=True):
                scores[index] = score
        return self._finite(torch.stack(scores))

    def _finite(self, scores: Tensor) -> Tensor:
        """The same; ValueError unless all are finite (half precision overflows for some pictures)."""
        check_finite(f"scores of {type(self).__name__}", scores)
        return scores

    def enable_gradient_checkpointing(self, slice_size: int | None = None) -> None:
        """Recompute the VAE decoder block by block in the backward pass, where most of a pixel reward's memory is, and
        the layers of the reward's own transformers.

        slice_size: decode as many pictures at a time (`decode_in_slices`), less memory still; None: all at once.
        """
        if slice_size is not None and slice_size < 1:
            raise ValueError(f"slice_size: got {slice_size}; expected at least 1, or None for the whole batch")
        self._set_recompute(True, slice_size)

    def disable_gradient_checkpointing(self) -> None:
        self._set_recompute(False, None)

    def _set_recompute(self, recompute: bool, slice_size: int | None) -> None:
        self._recompute, self.slice_size = recompute, slice_size
        recompute_layers(self, recompute)
        if self.has_vae and recompute:
            self.vae.enable_gradient_checkpointing()
        elif self.has_vae:
            self.vae.disable_gradient_checkpointing()

    def train(self, mode: bool = True) -> "PixelReward":
        """Stay in evaluation mode: a reward with dropout would not be the same twice."""
        super().train(False)
        recompute_layers(self, self._recompute)
        return self


def check_decodable(vae: AutoencoderKL, latents: Tensor) -> None:
    """TypeError unless `latents` is a floating tensor, ValueError unless the VAE can decode it and it is finite."""
    check_latents("latents", latents)
    if latents.shape[1] != vae.config.latent_channels or latents.numel() == 0:
        raise ValueError(
            f"latents: got shape {tuple(latents.shape)}; expected (B, {vae.config.latent_channels}, h, w), the "
            "channels of this reward's VAE, at least one sample"
        )
    check_finite("latents", latents)


def check_picture_prompts(prompts: Sequence[str], number: int) -> None:
    """ValueError unless there are `number` prompts, TypeError unless they are strings."""
    if isinstance(prompts, str) or len(check_prompts(prompts)) != number:
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(
            f"one prompt per picture: got {got} for {number} pictures; expected a list of {number} strings"
        )
