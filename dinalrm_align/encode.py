"""Prompts to text embeddings, pictures to scaled latents and back.

Text follows `StableDiffusion3Pipeline.encode_prompt`: features of both CLIP towers, zero-padded to T5's width, then
T5's `text_length` tokens, no mask. Latents are scaled: (z - shift_factor) * scaling_factor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline
    from PIL.Image import Image


class PromptEncoder:
    """Prompts to (prompt_embeds (B, L, D), pooled_prompt_embeds (B, P)), without gradient; each prompt is encoded once.

    Text encoders run in their own dtype, whatever autocast is on around them.

    source: a StableDiffusion3Pipeline whose text encoders are borrowed where they are, or a pipeline folder or hub id
    from which text encoders and tokenizers are loaded at the first prompt, in `dtype`. device: where embeddings are
    returned (and loaded encoders run); default: where a given pipeline is, else the CPU. The cache lies on the CPU and
    holds the `max_cached` newest prompts; in SD3.5's sizes and bfloat16, 1000 of them take about 2 GB.
    """

    def __init__(
        self,
        source: "StableDiffusion3Pipeline | str | Path",
        *,
        text_length: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
        max_cached: int = 10_000,
    ) -> None:
        self.source = source
        self.text_length, self.max_cached = text_length, max_cached
        self.dtype, self.local_files_only = dtype, local_files_only
        self._pipeline: StableDiffusion3Pipeline | None = None if isinstance(source, str | Path) else source
        home = "cpu" if self._pipeline is None else self._pipeline.device
        self.device = torch.device(home if device is None else device)
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, P) on `device`, in the text encoders' dtype. Unseen prompts go through in batches."""
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(unseen), batch_size):
            part = unseen[start : start + batch_size]
            self._cache.update(zip(part, zip(*self._encode(part), strict=True), strict=True))
        embeds, pooled = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
        for oldest in list(self._cache)[: -self.max_cached]:
            del self._cache[oldest]
        return torch.stack(embeds).to(self.device), torch.stack(pooled).to(self.device)

    def empty(self, batch: int) -> tuple[Tensor, Tensor]:
        """The embeddings of the empty prompt, for guidance: (batch, L, D), (batch, P)."""
        return self([""] * batch)

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        pipeline = self._text_pipeline()
        encoders = _text_encoders(pipeline)
        training = [encoder.training for encoder in encoders]
        try:
            for encoder in encoders:
                encoder.eval()
            with torch.autocast(pipeline.device.type, enabled=False):
                embeds, _, pooled, _ = pipeline.encode_prompt(
                    prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.text_length
                )
        finally:
            for encoder, mode in zip(encoders, training, strict=True):
                encoder.train(mode)
        return embeds.cpu(), pooled.cpu()

    def _text_pipeline(self) -> "StableDiffusion3Pipeline":
        if self._pipeline is None:
            self._pipeline = self._load()
        pipeline = self._pipeline
        if pipeline.text_encoder is None or pipeline.text_encoder_2 is None:
            raise ValueError(
                "prompts need text encoders, and the pipeline was built without them: pass a pipeline that has them, "
                "or prompt_embeds and pooled_prompt_embeds"
            )
        if pipeline.text_encoder_3 is None and pipeline.transformer is None:
            raise ValueError("the base model has no text_encoder_3 (T5): pass pipeline=..., or prompt_embeds")
        return pipeline

    def _load(self) -> "StableDiffusion3Pipeline":
        from diffusers import StableDiffusion3Pipeline

        folder = Path(self.source)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"prompts need text encoders, and {folder} is no pipeline folder (it has no model_index.json): pass "
                "pipeline=..., or prompt_embeds and pooled_prompt_embeds"
            )
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            str(self.source),
            transformer=None,
            vae=None,
            dtype=self.dtype,
            local_files_only=folder.is_dir() or self.local_files_only,
        )
        for encoder in _text_encoders(pipeline):
            encoder.requires_grad_(False)
        return pipeline.to(self.device)


def _text_encoders(pipeline: "StableDiffusion3Pipeline") -> list[torch.nn.Module]:
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3)
    return [encoder for encoder in encoders if encoder is not None]


def load_vae(source: str | Path, *, device: torch.device | str, local_files_only: bool = False) -> "AutoencoderKL":
    """The frozen float32 VAE of a pipeline folder or hub id."""
    from diffusers import AutoencoderKL

    local = Path(source).is_dir()
    if local and not (Path(source) / "vae" / "config.json").is_file():
        raise ValueError(f"pictures need a VAE, and {source} has no vae folder: pass pipeline=..., or score latents")
    vae = AutoencoderKL.from_pretrained(str(source), subfolder="vae", local_files_only=local or local_files_only)
    return vae.requires_grad_(False).eval().to(device)


def image_tensor(images: "Tensor | Sequence[Image] | Image") -> Tensor:
    """PIL pictures of one size, or (B, 3, H, W) in [0, 1] -> (B, 3, H, W) float32 in [0, 1]."""
    if isinstance(images, Tensor):
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images: got {got}; expected floating (B, 3, H, W) in [0, 1]")
        low, high = images.detach().aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"images: got values in [{low.item():.3g}, {high.item():.3g}]; expected [0, 1]: divide bytes by 255, "
                "map [-1, 1] by x / 2 + 0.5"
            )
        return images.float()
    images = list(images) if isinstance(images, Sequence) else [images]
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images: got {len(images)} pictures of sizes {sizes[:4]}; expected one or more of one size")
    pixels = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def encode_images(vae: "AutoencoderKL", images: "Tensor | Sequence[Image] | Image") -> Tensor:
    """PIL pictures or (B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w), float32, on the VAE's device.

    The posterior's mean in the VAE's own dtype, autocast or not, so that a picture always gets the same latents. Height
    and width must be multiples of the VAE's factor (8 for SD3).
    """
    pixels = image_tensor(images)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"images: got {height} x {width} pixels; expected multiples of {factor}, crop or resize first")
    with torch.autocast(vae.device.type, enabled=False):
        z = vae.encode((2 * pixels - 1).to(vae.device, vae.dtype)).latent_dist.mean
    return (z.float() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode_latents(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W), float32 in [0, 1], differentiable (zero where clipped)."""
    z = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
