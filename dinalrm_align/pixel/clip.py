"""CLIP-style rewards in PickScore's layout (arXiv 2305.01569): score = exp(logit_scale) cos(text, image).

The source is a transformers `CLIPModel` folder or hub id; tokenizer and preprocessor_config.json lie beside it or in a
second place (PickScore takes those of CLIP ViT-H/14). Latents go through the VAE's decoder and a differentiable copy of
CLIP's preprocessing, so that gradients reach the latents; pictures are RGB in [0, 1] everywhere.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import cached_file

from dinalrm_align.config.check import check_fields
from dinalrm_align.device import available_device
from dinalrm_align.encode import check_prompts, decode_latents, image_tensor
from dinalrm_align.files import check_source, read_json, reading
from dinalrm_align.inputs import check_finite
from dinalrm_align.noise import check_latents

BICUBIC = 3
"""PIL's number for bicubic, the only resampling that CLIP checkpoints of this layout use."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """CLIP's preprocessing as numbers: short side to `shortest_edge`, centre crop (height, width), normalisation."""

    shortest_edge: int
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> "Preprocess":
        """Read a preprocessor_config.json; ValueError names what this reward cannot reproduce."""
        if config.get("resample", BICUBIC) != BICUBIC:
            raise ValueError(f"{where}: resample {config['resample']}; expected {BICUBIC} (bicubic)")
        off = [step for step in ("do_resize", "do_center_crop", "do_normalize") if not config.get(step, True)]
        if off:
            raise ValueError(f"{where}: {', '.join(off)} false; expected resize, centre crop and normalisation, all on")
        missing = [key for key in ("size", "crop_size", "image_mean", "image_std") if key not in config]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}; expected a CLIP preprocessor_config.json")
        size, crop = config["size"], config["crop_size"]
        if isinstance(size, dict) and "shortest_edge" not in size:
            raise ValueError(f"{where}: size {size}; expected a number or {{'shortest_edge': number}}")
        if isinstance(crop, dict) and crop.keys() != {"height", "width"}:
            raise ValueError(f"{where}: crop_size {crop}; expected a number or {{'height': number, 'width': number}}")
        try:
            return cls(
                shortest_edge=size["shortest_edge"] if isinstance(size, dict) else size,
                crop=(crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop),
                mean=config["image_mean"],
                std=config["image_std"],
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def __post_init__(self) -> None:
        check_fields(self, "preprocessor")
        if min(self.shortest_edge, *self.crop) < 1 or min(self.std) <= 0:
            raise ValueError(
                f"preprocessor: got shortest_edge {self.shortest_edge}, crop {self.crop}, std {self.std}; expected "
                "sizes of at least 1, and more than 0"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> pixel_values (B, 3, *crop), float32, differentiable.

        Antialiased bicubic; within 0.1 of the PIL processor in normalised units (0.005 on average), which rounds to
        8 bits.
        """
        images = images.float()
        short = min(images.shape[-2:])
        if short != self.shortest_edge:
            # the long side is cut off, not rounded, as the PIL processor does
            size = [side * self.shortest_edge // short for side in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], self.crop, strict=True))
        if top < 0 or left < 0:
            raise ValueError(
                f"pictures of {tuple(images.shape[-2:])} after resizing are smaller than the crop {self.crop}"
            )
        images = images[..., top : top + self.crop[0], left : left + self.crop[1]]
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


class ClipReward(nn.Module):
    """A frozen CLIP reward over latents or pictures; build one with `from_pretrained`.

    Gradients reach the latents, never a parameter: CLIP is frozen, and so is the VAE it is given (requires_grad False,
    evaluation mode), which stays no part of this module: neither moved, cast nor saved with it.
    """

    def __init__(
        self, clip: CLIPModel, tokenizer: Any, preprocess: Preprocess, vae: AutoencoderKL | None = None
    ) -> None:
        super().__init__()
        self.clip = clip.requires_grad_(False).eval()
        self._borrowed = {"vae": None if vae is None else vae.requires_grad_(False).eval()}  # not owned, so in a dict
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self._text_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str,
        *,
        processor: str | None = None,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "ClipReward":
        """Load a CLIPModel from a folder or hub id.

        processor: folder or hub id of tokenizer and preprocessor_config.json, by default `source`. vae: the decoder of
        the latents to be scored; without one, pictures alone can be scored. `revision` is that of `source`. Raises
        ValueError when a weight of the model is missing or unexpected, OSError when a file is.
        """
        device = None if device is None else available_device(device)
        for name in (source, processor or source):
            check_source("pixel reward", name)
        with reading("CLIPModel", source):
            clip, info = CLIPModel.from_pretrained(
                source,
                dtype=dtype or torch.float32,
                revision=revision,
                local_files_only=local_files_only,
                output_loading_info=True,
            )
        unexpected = [key for key in info["unexpected_keys"] if not key.endswith("position_ids")]  # in old checkpoints
        if info["missing_keys"] or unexpected:
            raise ValueError(
                f"{source} is not a CLIPModel in PickScore's layout: missing {sorted(info['missing_keys'])[:4]}, "
                f"unexpected {sorted(unexpected)[:4]}"
            )
        where, at = (source, revision) if processor is None else (processor, None)
        with reading("tokenizer", where):
            tokenizer = AutoTokenizer.from_pretrained(where, revision=at, local_files_only=local_files_only)
        with reading("preprocessor_config.json", where):
            path = cached_file(where, "preprocessor_config.json", revision=at, local_files_only=local_files_only)
        preprocess = Preprocess.from_config(read_json(Path(path)), path)
        return cls(clip.to(device), tokenizer, preprocess, vae)

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the VAE decoder block by block in the backward pass: most of a pixel reward's memory is there."""
        self._require_vae().enable_gradient_checkpointing()

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

        The signature is LatentReward's so that a recipe can take either. CLIP reads text and clean pictures: prompts
        are needed as strings, and prompt_embeds, pooled_prompt_embeds, sigma, noise and generator have no effect.
        """
        if prompts is None:
            raise ValueError(
                "a CLIP reward reads prompts as text: got none; pass prompts=[...], since the diffusion model's "
                "prompt_embeds mean nothing to CLIP"
            )
        vae = self._require_vae()
        check_latents("latents", latents)
        if latents.shape[1] != vae.config.latent_channels or latents.numel() == 0:
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}; expected (B, {vae.config.latent_channels}, h, w), the "
                "channels of this reward's VAE, at least one sample"
            )
        check_finite("latents", latents)
        _check_prompts(prompts, len(latents))
        return self._score(self.preprocess(decode_latents(vae, latents)), prompts)

    @torch.no_grad()
    def score_images(self, images: Tensor | Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """PIL pictures of any sizes, or a tensor (B, 3, H, W) in [0, 1], and B prompts -> scores (B,), float32."""
        if isinstance(images, Tensor):
            pixel_values = self.preprocess(image_tensor(images).to(self.device))
        else:
            if not isinstance(images, Sequence) or not images:
                raise TypeError(f"images: got {images!r:.60}; expected a list of PIL pictures, or (B, 3, H, W)")
            pixel_values = torch.cat([self.preprocess(image_tensor([image]).to(self.device)) for image in images])
        _check_prompts(prompts, len(images))
        return self._score(pixel_values, prompts)

    def _score(self, pixel_values: Tensor, prompts: Sequence[str]) -> Tensor:
        """pixel_values (B, 3, H, W) -> (B,): exp(logit_scale) cos, the product in float32."""
        pixel_values = pixel_values.to(self.device, self.clip.dtype)
        features = _projected(self.clip.get_image_features(pixel_values=pixel_values)).float()
        cosine = (F.normalize(features, dim=-1) * self._encode_text(prompts)).sum(-1)
        return self.clip.logit_scale.exp().float() * cosine

    def _encode_text(self, prompts: Sequence[str]) -> Tensor:
        """(B, D) unit vectors, float32, no gradient; each distinct prompt is encoded once in this reward's life."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_features]
        if new:
            length = self.clip.config.text_config.max_position_embeddings
            tokens = self.tokenizer(new, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            with torch.no_grad():
                features = _projected(
                    self.clip.get_text_features(
                        input_ids=tokens.input_ids.to(self.device), attention_mask=tokens.attention_mask.to(self.device)
                    )
                )
            self._text_features.update(zip(new, F.normalize(features.float(), dim=-1), strict=True))
        return torch.stack([self._text_features[prompt] for prompt in prompts]).to(self.device)

    def _require_vae(self) -> AutoencoderKL:
        if self._borrowed["vae"] is None:
            raise ValueError("this ClipReward has no VAE to decode latents with; pass vae=... to from_pretrained")
        return self._borrowed["vae"]


def _projected(output: Any) -> Tensor:
    """What get_image_features and get_text_features return: a tensor before transformers 5, `.pooler_output` since."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _check_prompts(prompts: Sequence[str], number: int) -> None:
    if isinstance(prompts, str) or len(check_prompts(prompts)) != number:
        got = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(
            f"one prompt per picture: got {got} for {number} pictures; expected a list of {number} strings"
        )
