"""Prompts to text embeddings, pictures to scaled latents and back.

Text follows `StableDiffusion3Pipeline.encode_prompt`: features of both CLIP towers, zero-padded to T5's width, then
T5's `text_length` tokens, no mask. Latents are scaled: (z - shift_factor) * scaling_factor.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinalrm_align.backbones.sd3 import load_transformer
from dinalrm_align.device import available_device
from dinalrm_align.files import check_source, load_model, reading
from dinalrm_align.noise import check_latents
from dinalrm_align.pictures import as_rgb

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline

MAX_CHARACTERS = 10_000
"""Of a prompt. Text encoders read 77 to 512 tokens and cut off the rest; far longer text is a mistake in the data."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts as a list. TypeError unless they are a sequence of strings (and no string itself), ValueError when
    there is none, or one is longer than MAX_CHARACTERS.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: got {type(prompts).__name__} {prompts!r:.60}; expected a list of strings")
    if len(prompts) == 0:
        raise ValueError("prompts: got none; expected at least one")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: got {type(prompt).__name__} {prompt!r:.60}, expected strings (at {index})")
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"prompts: got {len(prompt)} characters at {index}; expected at most {MAX_CHARACTERS}")
    return list(prompts)


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
        self.device = available_device(home if device is None else device)
        self._cache: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """(B, L, D), (B, P) on `device`, in the text encoders' dtype. Unseen prompts go through in batches."""
        prompts = check_prompts(prompts)
        unseen = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(unseen), batch_size):
            part = unseen[start : start + batch_size]
            self._cache.update(zip(part, zip(*self._encode(part), strict=True), strict=True))
        embeds, pooled = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
        for oldest in list(self._cache)[: -self.max_cached]:
            del self._cache[oldest]
        return torch.stack(embeds).to(self.device), torch.stack(pooled).to(self.device)

    def release(self) -> None:
        """Let text encoders go that were loaded here; what is cached stays, and a new prompt loads them again."""
        if isinstance(self.source, str | Path):
            self._pipeline = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

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

        check_source("base model", self.source)
        folder = Path(self.source)
        if folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(
                f"prompts need text encoders, and {folder} is no pipeline folder (it has no model_index.json): pass "
                "pipeline=..., or prompt_embeds and pooled_prompt_embeds"
            )
        with reading("text encoders and tokenizers", self.source):
            pipeline = StableDiffusion3Pipeline.from_pretrained(
                str(self.source),
                transformer=None,
                vae=None,
                dtype=self.dtype,
                local_files_only=folder.is_dir() or self.local_files_only,
                use_safetensors=True,
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
    check_source("VAE", source)
    vae = load_model(AutoencoderKL, source, subfolder="vae", local_files_only=local or local_files_only)
    return vae.requires_grad_(False).eval().to(device)


def load_pipeline(source: str | Path, *, dtype: torch.dtype) -> "StableDiffusion3Pipeline":
    """The whole pipeline of a folder or hub id, frozen, the VAE in float32 and the rest in `dtype`."""
    from diffusers import StableDiffusion3Pipeline

    transformer, vae = load_transformer(source, dtype=dtype), load_vae(source, device="cpu")
    with reading("StableDiffusion3Pipeline", source):
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            str(source), transformer=transformer, vae=vae, dtype=dtype, use_safetensors=True
        )
    for encoder in _text_encoders(pipeline):
        encoder.requires_grad_(False)
    return pipeline


def image_tensor(images: Tensor | Sequence[Image.Image] | Image.Image) -> Tensor:
    """PIL pictures of one size, or (B, 3, H, W) in [0, 1] -> (B, 3, H, W) float32 in [0, 1].

    Raises TypeError for what is no picture; ValueError for values outside [0, 1], no pictures, or such as `as_rgb`
    refuses.
    """
    if isinstance(images, Tensor):
        wrong = images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or images.is_meta
        if wrong or images.numel() == 0:
            got = f"{images.dtype} {tuple(images.shape)}{' on meta' * images.is_meta}"
            raise ValueError(f"images: got {got}; expected floating (B, 3, H, W) in [0, 1], at least one")
        low, high = images.detach().aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ValueError(
                f"images: got values in [{low.item():.3g}, {high.item():.3g}]; expected [0, 1]: divide bytes by 255, "
                "map [-1, 1] by x / 2 + 0.5"
            )
        return images.float()
    if isinstance(images, str | bytes) or not isinstance(images, Sequence | Image.Image):
        got = f"{type(images).__name__} {images!r:.60}"
        raise TypeError(f"images: got {got}; expected PIL pictures, or a tensor (B, 3, H, W) in [0, 1]")
    images = list(images) if isinstance(images, Sequence) else [images]
    images = [as_rgb(image, f"images[{index}]") for index, image in enumerate(images)]
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images: got {len(images)} pictures of sizes {sizes[:4]}; expected one or more of one size")
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


@torch.no_grad()
def encode_images(vae: "AutoencoderKL", images: Tensor | Sequence[Image.Image] | Image.Image) -> Tensor:
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
    check_latents("latents", latents)
    if latents.shape[1] != vae.config.latent_channels:
        raise ValueError(f"latents: got {latents.shape[1]} channels, the VAE has {vae.config.latent_channels}")
    z = latents.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    return (vae.decode(z.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)
