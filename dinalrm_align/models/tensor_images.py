"""Images as tensors: PIL images to (B, 3, H, W) in [0, 1], and back to bytes."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinalrm_align.models.images import as_rgb


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


def to_bytes(images: Tensor) -> np.ndarray:
    """Pictures (N, 3, H, W) in [0, 1] -> (N, H, W, 3) uint8."""
    return (images.detach().float().cpu().clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
