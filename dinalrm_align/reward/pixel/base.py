"""Base class of rewards that score images, with differentiable decoding by a VAE that the caller provides.

Subclasses implement `score_pixels`. Images are RGB in [0, 1], (B, 3, H, W). Latents are scaled, (B, C, h, w).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, BatchEncoding
from transformers.modeling_layers import GradientCheckpointingLayer

from dinalrm_align.flow.noise import check_latents
from dinalrm_align.models.images import Images, image_batches
from dinalrm_align.models.pipeline import decode_latents
from dinalrm_align.models.text import prompts_of
from dinalrm_align.models.weights import HubOptions, check_source
from dinalrm_align.reward.inputs import as_batch, check_finite
from dinalrm_align.reward.protocol import Latents, Noise, Parted, RewardModule, Text, finite_scores, scoring
from dinalrm_align.train.device import to_device
from dinalrm_align.train.files import reading

Features = TypeVar("Features")


def decode_in_slices(vae: AutoencoderKL, latents: Tensor, slice_size: int | None = None) -> Tensor:
    """Decode scaled latents (B, C, h, w), differentiably, to images (B, 3, H, W), float32 in [0, 1].

    slice_size: latents per slice. Slices are recomputed in the backward pass. None: one slice, not recomputed.
    """
    if slice_size is None:
        return decode_latents(vae, latents)
    parts = latents.split(slice_size)
    if torch.is_grad_enabled() and latents.requires_grad:
        return torch.cat([checkpoint(decode_latents, vae, part, use_reentrant=False) for part in parts])
    return torch.cat([decode_latents(vae, part) for part in parts])


class PixelReward(RewardModule):
    """A frozen reward that decodes latents and scores the images.

    Gradients reach the latents but not parameters. The VAE is frozen and not a submodule: moving, casting or saving the
    reward does not affect the VAE. Without a VAE only images can be scored.
    """

    reads_images = True

    def __init__(self, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        self.borrow(vae)
        self.slice_size: int | None = None
        self._recompute = False
        self.name = type(self).__name__

    def borrow(self, vae: AutoencoderKL | None) -> None:
        """Decode latents with `vae`, which is frozen in place."""
        self._borrowed = {"vae": None if vae is None else vae.requires_grad_(False).eval()}  # a dict: no submodule

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,), float32, of images (B, 3, H, W), float32 in [0, 1], on `device`, for B prompts.

        Subclasses must implement this method. If the class attribute `differentiable` is true, the scores must be
        differentiable in the images. Callers should use `score_decoded`, which also checks the scores.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement score_pixels")

    def score_pixel_parts(self, images: Tensor, prompts: Sequence[str]) -> Parted:
        """Return `score_pixels` and the parts of the scores; by default none."""
        return self.score_pixels(images, prompts), {}

    @property
    def device(self) -> torch.device:
        """The device of the reward's weights. If there are none: the VAE's device, or the CPU if there is no VAE."""
        tensor = next(self.parameters(), None)
        if tensor is not None:
            return tensor.device
        return torch.device("cpu") if self._borrowed["vae"] is None else self._borrowed["vae"].device

    @property
    def has_vae(self) -> bool:
        """True if the reward has a VAE and can therefore score latents."""
        return self._borrowed["vae"] is not None

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE that decodes latents. Raises ValueError if there is none."""
        if self._borrowed["vae"] is None:
            raise ValueError(
                f"this {type(self).__name__} has no VAE to decode latents with; pass vae=... to from_pretrained"
            )
        return self._borrowed["vae"]

    @scoring
    def forward(self, latents: Latents, prompts: Text, **noise: Unpack[Noise]) -> Tensor:
        """Return scores (B,), float32, of scaled clean latents (B, C, h, w) for B prompts.

        The scores are differentiable in the latents if the class attribute `differentiable` is true. `noise` is
        ignored. Raises ValueError if a score is not finite, or if the latents require a gradient and `differentiable`
        is false, and TypeError for an unknown argument.
        """
        _check_known(noise)
        latents = as_batch("latents", latents, self.device)
        self.check_gradient(latents)
        check_decodable(self.vae, latents)
        return self.score_decoded(self.decode(latents), prompts_of(prompts, len(latents)))

    @scoring
    def score_decoded(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return `score_pixels` (B,), float32, of images (B, 3, H, W), computed without autocast.

        Raises ValueError if a score is not finite, or if the reward is offloaded.
        """
        self.check_onloaded()
        return finite_scores(self.score_pixels(images.to(self.device), prompts), len(images), self.name)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (B, C, h, w) to images (B, 3, H, W), float32 in [0, 1], on the reward's device.

        Autocast is turned off: the VAE runs in its own dtype.
        """
        with torch.autocast(self.vae.device.type, enabled=False):
            return decode_in_slices(self.vae, latents.to(self.vae.device), self.slice_size).to(self.device)

    @scoring
    def score_images(
        self, images: Images, prompts: Text, *, differentiable: bool = False, **noise: Unpack[Noise]
    ) -> Tensor:
        """Return scores (B,), float32, of B images for B prompts. `noise` is ignored.

        images: PIL images, tensors or arrays, as for `image_tensor`, but a list may hold images of different sizes.
        differentiable: whether gradients reach image tensors. Raises TypeError for an unknown argument.
        """
        return self.score_image_parts(images, prompts, differentiable=differentiable, **noise)[0]

    @scoring
    def score_image_parts(
        self, images: Images, prompts: Text, *, differentiable: bool = False, **noise: Unpack[Noise]
    ) -> Parted:
        """Return `score_images` and the parts of the scores, computed in one pass."""
        _check_known(noise)
        self.check_onloaded()
        tensors = [image[None] for batch in image_batches(images) for image in batch]
        prompts = prompts_of(prompts, len(tensors))
        found: dict[str, list[Tensor | None]] = {}  # the scores are under an empty name
        for size in dict.fromkeys(tensor.shape for tensor in tensors):  # images of one size form a batch
            rows = [row for row, tensor in enumerate(tensors) if tensor.shape == size]
            with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
                batch = torch.cat([tensors[row] for row in rows])
                self.check_gradient(batch)
                scores, parts = self.score_pixel_parts(batch.to(self.device), [prompts[row] for row in rows])
            for name, values in {"": finite_scores(scores, len(rows), self.name), **parts}.items():
                column = found.setdefault(name, [None] * len(tensors))
                for row, value in zip(rows, values, strict=True):
                    column[row] = value
        stacked = {name: torch.stack(column) for name, column in found.items()}
        return stacked.pop(""), stacked

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the VAE decoder's blocks and the reward's transformer layers in the backward pass."""
        self._set_recompute(True)

    def disable_gradient_checkpointing(self) -> None:
        self._set_recompute(False)

    def set_decode_slice(self, size: int | None) -> None:
        if size is not None and size < 1:
            raise ValueError(f"slice_size: got {size}; expected at least 1, or None for the whole batch")
        self.slice_size = size

    def _set_recompute(self, recompute: bool) -> None:
        self._recompute = recompute
        recompute_layers(self, recompute)
        if self.has_vae and recompute:
            self.vae.enable_gradient_checkpointing()
        elif self.has_vae:
            self.vae.disable_gradient_checkpointing()

    def train(self, mode: bool = True) -> "PixelReward":
        super().train(False)
        recompute_layers(self, self._recompute)
        return self


def check_decodable(vae: AutoencoderKL, latents: Tensor) -> None:
    """Raise TypeError unless `latents` is a floating tensor, and ValueError unless it is finite and fits the VAE."""
    check_latents("latents", latents)
    if latents.shape[1] != vae.config.latent_channels or latents.numel() == 0:
        raise ValueError(
            f"latents: got shape {tuple(latents.shape)}; expected (B, {vae.config.latent_channels}, h, w), the "
            "channels of this reward's VAE, at least one sample"
        )
    check_finite("latents", latents)


def recompute_layers(model: nn.Module, recompute: bool) -> None:
    """Turn gradient checkpointing on or off for all layers of a transformers model.

    transformers recomputes activations only in layers with `training` True. This function therefore sets `training` of
    these layers, but not of the modules inside them (dropout). `model.eval()` resets `training`: after `model.eval()`,
    this function must be called again.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = layer.training = recompute
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def load_tokenizer(source: str | Path, **hub: Unpack[HubOptions]) -> Any:
    check_source("tokenizer", source)
    with reading("tokenizer", source):
        return AutoTokenizer.from_pretrained(source, **hub)


def tokenise(tokenizer: Any, texts: Sequence[str], length: int, device: torch.device) -> BatchEncoding:
    """Return input_ids and attention_mask, (B, length), of texts padded or truncated to `length` tokens."""
    options = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = tokenizer(list(texts), **options)
    tokens.data = {name: to_device(tensor, device) for name, tensor in tokens.items()}
    return tokens


def cached(
    cache: dict[str, Features], prompts: Sequence[str], encode: Callable[[list[str]], Iterable[Features]], limit: int
) -> list[Features]:
    """Return each prompt's features. Encode uncached prompts in one batch. `cache` keeps its newest `limit` entries."""
    found = {prompt: known for prompt in dict.fromkeys(prompts) if (known := cache.get(prompt)) is not None}
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]
    if new:
        found |= (made := dict(zip(new, encode(new), strict=True)))
        cache.update(made)
    for oldest in list(cache)[::-1][limit:]:
        cache.pop(oldest, None)  # other threads may use the cache, too
    return [found[prompt] for prompt in prompts]


def _check_known(noise: Noise) -> None:
    """Raise TypeError for an argument that no reward has, such as a misspelt one."""
    if unknown := sorted(noise.keys() - Noise.__annotations__.keys()):
        raise TypeError(f"got the argument {unknown[0]!r}; expected one of {', '.join(Noise.__annotations__)}")
