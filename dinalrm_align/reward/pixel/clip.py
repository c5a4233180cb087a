"""CLIP-style rewards: score = exp(logit_scale) cos(text, image).

The source is a transformers `CLIPModel` folder or hub id; tokenizer and preprocessor_config.json lie beside it or in a
second place. Latents go through the VAE's decoder and a differentiable copy of CLIP's preprocessing, so that gradients
reach the latents; pictures are RGB in [0, 1] everywhere. Both scores have exp(logit_scale) = 100:

PickScore (arXiv 2305.01569): yuvalkirstain/PickScore_v1, with tokenizer and preprocessor of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Code MIT, weights as their model card says.
CLIPScore (arXiv 2104.08718): openai/clip-vit-large-patch14, the model that papers on alignment use. They report 100
cos, as here, or divide that by 30 or 100; the original is 2.5 max(cos, 0) with ViT-B/32 and "A photo depicts" before
the prompt. CLIP's code MIT, weights as their model card says.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel
from transformers.utils import cached_file

from dinalrm_align.models.hub import check_source
from dinalrm_align.models.preprocess import Preprocess
from dinalrm_align.reward.pixel.base import PixelReward
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import read_json, reading


class ClipReward(PixelReward):
    """A frozen CLIP reward over latents or pictures; build one with `from_pretrained`."""

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: Any,
        preprocess: Callable[[Tensor], Tensor],
        vae: AutoencoderKL | None = None,
        scaled: bool = True,
    ) -> None:
        """preprocess: images (B, 3, H, W) in [0, 1] -> pixel_values, differentiable. scaled: times exp(logit_scale)."""
        super().__init__(vae)
        self.scaled = scaled
        self.clip = clip.requires_grad_(False).eval()
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
        tokenizer = load_tokenizer(where, revision=at, local_files_only=local_files_only)
        preprocess = load_preprocess(where, revision=at, local_files_only=local_files_only)
        return cls(clip.to(device), tokenizer, preprocess, vae)

    @property
    def device(self) -> torch.device:
        return self.clip.device

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B, 3, H, W), B prompts -> (B,): exp(logit_scale) cos, or cos; the product in float32."""
        with torch.autocast(self.device.type, enabled=False):  # in CLIP's own dtype, whatever is on around it
            pixel_values = self.preprocess(images).to(self.device, self.clip.dtype)
            features = _projected(self.clip.get_image_features(pixel_values=pixel_values)).float()
            cosine = (F.normalize(features, dim=-1) * self._encode_text(prompts)).sum(-1)
            return self.clip.logit_scale.exp().float() * cosine if self.scaled else cosine

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


def load_tokenizer(source: str, *, revision: str | None = None, local_files_only: bool = False) -> Any:
    """The tokenizer of a folder or hub id."""
    check_source("tokenizer", source)
    with reading("tokenizer", source):
        return AutoTokenizer.from_pretrained(source, revision=revision, local_files_only=local_files_only)


def load_preprocess(source: str, *, revision: str | None = None, local_files_only: bool = False) -> Preprocess:
    """What the preprocessor_config.json of a folder or hub id says."""
    check_source("preprocessor", source)
    with reading("preprocessor_config.json", source):
        path = cached_file(source, "preprocessor_config.json", revision=revision, local_files_only=local_files_only)
    return Preprocess.from_config(read_json(Path(path)), path)


def _projected(output: Any) -> Tensor:
    """What get_image_features and get_text_features return: a tensor before transformers 5, `.pooler_output` since."""
    return output if isinstance(output, Tensor) else output.pooler_output
