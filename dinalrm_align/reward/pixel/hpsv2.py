"""HPS v2 and v2.1 (arXiv 2306.09341): score = cos(text, image) of a fine-tuned CLIP ViT-H/14.

The weights are HPS_v2_compressed.pt and HPS_v2.1_compressed.pt of hub id xswu/HPSv2. Tensors have open_clip's names,
but open_clip is not needed. Code and weights are Apache-2.0. The tokenizer is that of
laion/CLIP-ViT-H-14-laion2B-s32B-b79K. Papers report the score times 100. Scores of v2 and v2.1 are not comparable.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dinalrm_align.models.preprocess import normalise, pad_to_square, resize
from dinalrm_align.models.weights import HubOptions, find_file, read_tensors
from dinalrm_align.reward.names import CLIP_H
from dinalrm_align.reward.pixel.base import load_tokenizer
from dinalrm_align.reward.pixel.clip import ClipReward
from dinalrm_align.reward.pixel.clip_h import build_clip_h, from_open_clip
from dinalrm_align.train.device import available_device


@dataclass(frozen=True)
class LongSide:
    """HPSv2's preprocessing: resize the long side to `side`, pad to a square with zeros, normalise as for CLIP.

    antialias: resize with antialiasing, as torchvision does since 0.17. Set False to reproduce HPSv2's first published
    numbers, which were computed with an older torchvision.
    """

    side: int
    antialias: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Convert images (B, 3, H, W) in [0, 1] to pixel_values (B, 3, side, side), float32, differentiably."""
        scale = self.side / max(images.shape[-2:])
        height, width = (round(size * scale) for size in images.shape[-2:])
        resized = resize(images, (height, width), antialias=self.antialias, clamp=False)
        return normalise(pad_to_square(resized, self.side))


class HPSv2Reward(ClipReward):
    """A frozen HPS v2 or v2.1 reward of latents or images. Load one with `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "xswu/HPSv2",
        *,
        file: str = "HPS_v2.1_compressed.pt",
        processor: str = CLIP_H,
        antialias: bool = True,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **hub: Unpack[HubOptions],
    ) -> "HPSv2Reward":
        """Load the weights. The arguments not listed here, and the errors, are documented in `reward.pixel`.

        source: weights file, or a folder or hub id that contains `file`. processor: folder or hub id of the tokenizer.
        """
        device = available_device(device or "cpu")
        path = find_file(source, file, what="HPSv2", **hub)
        tensors = from_open_clip(read_tensors(path, "state_dict"))
        hub.pop("revision", None)
        tokenizer = load_tokenizer(processor, **hub)
        options = dict(eos_token_id=tokenizer.eos_token_id, dtype=dtype or torch.float32, device=device)
        clip = build_clip_h(tensors, str(path), **options)
        preprocess = LongSide(clip.config.vision_config.image_size, antialias)
        return cls(clip, tokenizer, preprocess, vae, scaled=False)
