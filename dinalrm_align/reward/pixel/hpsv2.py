"""HPS v2 and v2.1 (arXiv 2306.09341): cos(text, image) of a fine-tuned CLIP ViT-H/14, read from open_clip's file.

xswu/HPSv2 on the hub, code and weights Apache-2.0: HPS_v2_compressed.pt and HPS_v2.1_compressed.pt, dicts whose entry
`state_dict` has open_clip's names; open_clip is not needed. Tables show the score times 100, and the two versions are
not comparable. Tokenizer: laion/CLIP-ViT-H-14-laion2B-s32B-b79K's.
"""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dinalrm_align.models.preprocess import normalise, pad_to_square, resize
from dinalrm_align.reward.names import CLIP_H
from dinalrm_align.reward.pixel.clip import ClipReward, load_tokenizer
from dinalrm_align.reward.pixel.clip_h import build_clip_h, from_open_clip
from dinalrm_align.reward.pixel.tensor_files import read_state_dict
from dinalrm_align.reward.pixel.weights import find_file
from dinalrm_align.train.device import available_device


@dataclass(frozen=True)
class LongSide:
    """HPSv2's preprocessing: long side to `side`, zeros around it to a square, CLIP's normalisation.

    It resizes tensors, so that nothing is rounded or cut to [0, 1] between. antialias: as torchvision does to tensors
    from 0.17 on; with older versions, which HPSv2's first numbers were made with, it did not, and scores differ.
    """

    side: int
    antialias: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [0, 1] -> pixel_values (B, 3, side, side), float32, differentiable."""
        scale = self.side / max(images.shape[-2:])
        height, width = (round(size * scale) for size in images.shape[-2:])
        resized = resize(images, (height, width), antialias=self.antialias, clamp=False)
        return normalise(pad_to_square(resized, self.side))


class HPSv2Reward(ClipReward):
    """A frozen HPS v2 or v2.1 over latents or pictures; build one with `from_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        source: str = "xswu/HPSv2",
        *,
        file: str = "HPS_v2.1_compressed.pt",
        processor: str = CLIP_H,
        antialias: bool = True,
        vae: AutoencoderKL | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "HPSv2Reward":
        """Load the weights from a file, or from `file` in a folder or hub repository.

        processor: folder or hub id of the tokenizer. antialias: see `LongSide`. vae: the decoder of the latents to be
        scored; without one, pictures alone can be scored. Raises ValueError when a weight is missing, unexpected or of
        another shape, or the file asks for anything but tensors; OSError when a file is not there.
        """
        device = None if device is None else available_device(device)
        path = find_file(source, file, what="HPSv2", revision=revision, local_files_only=local_files_only)
        tensors = from_open_clip(read_state_dict(path, "state_dict"), str(path))
        tokenizer = load_tokenizer(processor, local_files_only=local_files_only)
        clip = build_clip_h(
            tensors,
            eos_token_id=tokenizer.eos_token_id,
            dtype=dtype or torch.float32,
            device=device,
            where=str(path),
        )
        preprocess = LongSide(clip.config.vision_config.image_size, antialias)
        return cls(clip, tokenizer, preprocess, vae, scaled=False)
