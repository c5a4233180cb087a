"""Differentiable image preprocessing for vision models: resize, crop, pad and normalise, in float32.

Images are RGB (B, 3, H, W) in [0, 1]. Bicubic resizing is antialiased, as in PIL. Unlike PIL, `resize` keeps floats
instead of 8-bit values. The difference from PIL after CLIP's normalisation is at most 0.1, and 0.005 on average.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dinalrm_align.train.device import to_device
from dinalrm_align.train.settings import PositiveFloat, PositiveInt, check_fields

BICUBIC = 3
"""PIL's number for bicubic resampling; CLIP checkpoints use no other."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def resize(images: Tensor, size: tuple[int, int], *, antialias: bool = True, clamp: bool = True) -> Tensor:
    """Resize images to (B, 3, *size), float32, with bicubic interpolation. `clamp`: clip the result to [0, 1]."""
    images = images.float()
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    if min(size) < 1:
        raise ValueError(f"images of {tuple(images.shape[-2:])} pixels are too narrow: they would become {size}")
    images = F.interpolate(images, size=size, mode="bicubic", antialias=antialias, align_corners=False)
    return images.clamp(0, 1) if clamp else images


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop images (B, 3, H, W) to their centre (B, 3, *size); raise ValueError if H or W is too small for `size`."""
    top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], size, strict=True))
    if top < 0 or left < 0:
        raise ValueError(f"images of {tuple(images.shape[-2:])} after resizing are smaller than the crop {size}")
    return images[..., top : top + size[0], left : left + size[1]]


def pad_to_square(images: Tensor, side: int) -> Tensor:
    """Centre images (B, 3, H, W) in squares of zeros, (B, 3, side, side). Odd padding is larger below or right."""
    high, wide = side - images.shape[-2], side - images.shape[-1]
    return F.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def normalise(images: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    """Return (images - mean) / std, with one mean and one std per colour channel; the defaults are CLIP's."""
    channels = to_device(torch.tensor([[*mean], [*std]], dtype=images.dtype), images.device).view(2, 3, 1, 1)
    return (images - channels[0]) / channels[1]


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Callable for CLIP's preprocessing: resize the short side to `shortest_edge`, crop the centre, normalise."""

    shortest_edge: PositiveInt
    crop: tuple[PositiveInt, PositiveInt]
    mean: tuple[float, float, float]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> "Preprocess":
        """Create from the dict in a preprocessor_config.json. Raises ValueError for an unsupported setting."""
        if config.get("resample", BICUBIC) != BICUBIC:
            raise ValueError(f"{where}: resample: got {config['resample']}; expected {BICUBIC} (bicubic)")
        off = [step for step in ("do_resize", "do_center_crop", "do_normalize") if not config.get(step, True)]
        if off:
            raise ValueError(f"{where}: {', '.join(off)} false; expected resize, centre crop and normalisation")
        try:
            size, crop = config["size"], config["crop_size"]
            edge = size["shortest_edge"] if isinstance(size, dict) else size
            window = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
            return cls(edge, window, config["image_mean"], config["image_std"])
        except KeyError as error:
            raise ValueError(f"{where}: missing {error}; expected a CLIP preprocessor_config.json") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error

    def __post_init__(self) -> None:
        check_fields(self, "preprocessor")

    def __call__(self, images: Tensor) -> Tensor:
        """Convert images (B, 3, H, W) in [0, 1] to pixel_values (B, 3, *crop), float32, differentiably."""
        sides = images.shape[-2:]
        size = tuple(side * self.shortest_edge // min(sides) for side in sides)  # rounded down, as by the PIL processor
        return normalise(centre_crop(resize(images, size), self.crop), self.mean, self.std)
