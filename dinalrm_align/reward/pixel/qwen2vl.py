"""Qwen2-VL's image preprocessing in torch: sizes in multiples of a merged patch, patches in the tower's order.

Differentiable, float32. Differs from the PIL processor, which rounds to bytes, by at most 0.2 in normalised units,
0.005 on average; by 1e-6 where nothing is resized.
"""

import math

from torch import Tensor

from dinalrm_align.models.preprocess import normalise, resize

MAX_RATIO = 200
"""Largest ratio of the long to the short side, as in Qwen2-VL's code."""


def fitted_size(height: int, width: int, *, factor: int, low: int, high: int) -> tuple[int, int]:
    """A size in multiples of `factor` with `low` to `high` pixels and about the same aspect ratio.

    Sides are rounded to the nearest multiple; with too many pixels the image is scaled down and sides are rounded down,
    with too few scaled up and rounded up. Raises ValueError for an aspect ratio above MAX_RATIO.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"images of {height} x {width}: one side is over {MAX_RATIO} times the other; crop them")
    sides = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(sides) > high:
        shrink = math.sqrt(height * width / high)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif math.prod(sides) < low:
        stretch = math.sqrt(low / (height * width))
        sides = [math.ceil(side * stretch / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patches(images: Tensor, *, patch: int = 14, merge: int = 2, frames: int = 2) -> tuple[Tensor, tuple[int, int]]:
    """Normalised (B, 3, H, W) -> (B * rows * columns, 3 * frames * patch^2) and (rows, columns) of the patch grid.

    H and W are multiples of patch * merge. The patches of a merge x merge block are consecutive; an image counts as
    `frames` equal frames.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patch, width // patch
    blocks = images.reshape(batch, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, block row, block column, row, column, C, y, x
    blocks = blocks.unsqueeze(6).expand(*blocks.shape[:6], frames, patch, patch)
    return blocks.reshape(batch * rows * columns, channels * frames * patch * patch), (rows, columns)


def preprocess(
    images: Tensor, *, low: int, high: int, patch: int = 14, merge: int = 2, frames: int = 2
) -> tuple[Tensor, tuple[int, int]]:
    """(B, 3, H, W) in [0, 1] -> `patches` of the images, resized to `low` to `high` pixels and normalised."""
    size = fitted_size(*images.shape[-2:], factor=patch * merge, low=low, high=high)
    return patches(normalise(resize(images, size)), patch=patch, merge=merge, frames=frames)
