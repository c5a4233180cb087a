"""CLIP rewards: score = exp(logit_scale) cos(text, image), differentiable in the image.

The weights are a transformers `CLIPModel` in a folder or hub id. A second folder or hub id may provide the tokenizer
and preprocessor_config.json. PickScore and CLIPScore both have exp(logit_scale) = 100.

PickScore (arXiv 2305.01569): yuvalkirstain/PickScore_v1, with the tokenizer and preprocessor of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K. The code is MIT; for the weights see the model card.

CLIPScore (arXiv 2104.08718): openai/clip-vit-large-patch14, the usual model in papers on alignment. Published scores
are 100 cos, 100 cos / 30 or cos. The original metric is 2.5 max(cos, 0) with ViT-B/32 and the prefix "A photo depicts".
The code is MIT; for the weights see the model card.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPModel
from transformers.utils import cached_file

from dinalrm_align.models.layout import find_weights
from dinalrm_align.models.preprocess import Preprocess
from dinalrm_align.models.weights import HubOptions, check_source, load_model
from dinalrm_align.reward.pixel.base import PixelReward, cached, load_tokenizer, tokenise
from dinalrm_align.train.device import available_device
from dinalrm_align.train.files import read_json, reading

MAX_CACHED = 10_000
"""Number of prompts whose text features are cached. The features of a prompt take about 4 kB."""


class ClipReward(PixelReward):
    """A frozen CLIP reward of latents or images. Load one with `from_pretrained`."""

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: Any,
        preprocess: Callable[[Tensor], Tensor],
        vae: AutoencoderKL | None = None,
        scaled: bool = True,
    ) -> None:
        """preprocess: maps images (B, 3, H, W) in [0, 1] to pixel_values. scaled: multiply cos by exp(logit_scale)."""
        super().__init__(vae)
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer, self.preprocess, self.scaled = tokenizer, preprocess, scaled
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
        **hub: Unpack[HubOptions],
    ) -> "ClipReward":
        """Load a CLIPModel. The arguments not listed here, and the errors, are documented in `reward.pixel`.

        processor: folder or hub id of the tokenizer and preprocessor_config.json; default: `source`.
        """
        device = available_device(device or "cpu")
        for name in (source, processor or source):
            check_source("pixel reward", name)
        _, variant, _ = find_weights(Path(source), "model") or (None, None, [])
        options = dict(allow_unexpected=False, dtype=dtype or torch.float32, variant=variant)
        clip = load_model(CLIPModel, source, **options, **hub)
        if processor is not None:
            hub.pop("revision", None)
        tokenizer = load_tokenizer(processor or source, **hub)
        preprocess = load_preprocess(processor or source, **hub)
        return cls(clip.to(device), tokenizer, preprocess, vae)

    def score_pixels(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores (B,) of images (B, 3, H, W) for B prompts. The cosine is computed in float32."""
        pixel_values = self.preprocess(images).to(self.device, self.clip.dtype)
        features = _projected(self.clip.get_image_features(pixel_values=pixel_values)).float()
        text = torch.stack(cached(self._text_features, prompts, self._encode_text, MAX_CACHED)).to(self.device)
        cosine = (F.normalize(features, dim=-1) * text).sum(-1)
        return self.clip.logit_scale.exp().float() * cosine if self.scaled else cosine

    @torch.no_grad()
    def _encode_text(self, prompts: list[str]) -> Tensor:
        """Return CLIP text features (B, D) of the prompts, as float32 unit vectors."""
        tokens = tokenise(self.tokenizer, prompts, self.clip.config.text_config.max_position_embeddings, self.device)
        features = self.clip.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return F.normalize(_projected(features).float(), dim=-1)


def load_preprocess(source: str, **hub: Unpack[HubOptions]) -> Preprocess:
    """Return the image transform that preprocessor_config.json defines. source: folder or hub id of this file."""
    check_source("preprocessor", source)
    with reading("preprocessor_config.json", source):
        path = cached_file(source, "preprocessor_config.json", **hub)
    return Preprocess.from_config(read_json(Path(path)), path)


def _projected(output: Any) -> Tensor:
    """Return the projected features (B, D): `output` (transformers 4) or its `pooler_output` (transformers 5)."""
    return output if isinstance(output, Tensor) else output.pooler_output
