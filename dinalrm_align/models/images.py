"""Read image files, given as path or bytes, and convert images to tensors (B, 3, H, W) in [0, 1].

torch is imported only inside functions, so that processes that only decode images start ten times faster.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

ORIENTATION = 0x0112  # EXIF tag; values from 5 to 8 exchange width and height


def open_image(source: Path | bytes, name: str | None = None) -> Image.Image:
    """Read an image file as RGB and apply its EXIF orientation. `name`: name in error messages; default: the path."""
    name = name or str(source)
    file = _opened(source, name)
    try:
        with file:
            image = ImageOps.exif_transpose(file)
    except Exception as error:  # decoders fail in many ways on a damaged file
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    return as_rgb(image, name)


def image_size(source: Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Return an image file's (height, width) after EXIF orientation. Reads only the header of the file."""
    name = name or str(source)
    with _opened(source, name) as file:
        try:
            in_header = file.format != "PNG" or "exif" in file.info  # PIL decodes a whole PNG to look for EXIF
            turned = in_header and file.getexif().get(ORIENTATION, 1) >= 5
        except Exception as error:
            raise ValueError(f"{name} cannot be read as an image: {error}") from error
        width, height = file.size
    return (width, height) if turned else (height, width)


def resized_image(source: Path | bytes, size: tuple[int, int], name: str | None = None) -> np.ndarray:
    """Read an image and resize it to `size` (height, width) with LANCZOS; return (height, width, 3) uint8."""
    image = open_image(source, name)
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image)


def _opened(source: Path | bytes, name: str) -> Image.Image:
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"no image {name}{' (it is a folder)' if source.is_dir() else ''}; expected a file")
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise ValueError(f"{name} is empty (0 bytes)")
    try:
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that PIL can read") from None
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def as_rgb(image: Image.Image, name: str) -> Image.Image:
    """Convert a PIL image to RGB. Raises ValueError if it is empty, damaged, transparent or over 8 bits per channel."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"{name}: got {type(image).__name__} {image!r:.60}; expected a PIL image")
    if not all(image.size):
        raise ValueError(f"{name}: got an image of {image.width} x {image.height} pixels; expected at least 1 x 1")
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"{name}: got mode {image.mode}; expected 8 bits per channel: scale it, and convert to RGB")
    try:
        opaque = not image.has_transparency_data or image.convert("RGBA").getextrema()[3][0] == 255
        image = image.convert("RGB")
    except Exception as error:  # PIL decodes lazily, here at the latest
        raise ValueError(f"{name}: the image cannot be read ({error})") from error
    if not opaque:
        raise ValueError(f"{name}: the image has transparent pixels; paste it on a background first")
    return image


def image_tensor(images: "Tensor | Sequence[Image.Image] | Image.Image") -> "Tensor":
    """Convert PIL images of equal size, or a floating tensor (B, 3, H, W) in [0, 1], to float32 (B, 3, H, W)."""
    import torch

    if isinstance(images, torch.Tensor):
        wrong = images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point() or images.is_meta
        if wrong or images.numel() == 0:
            got = f"{images.dtype} {tuple(images.shape)}{' on meta' * images.is_meta}"
            raise ValueError(f"images: got {got}; expected floating (B, 3, H, W) in [0, 1], at least one")
        low, high = images.detach().aminmax()
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            got = f"got values in [{low.item():.3g}, {high.item():.3g}]"
            raise ValueError(f"images: {got}; expected [0, 1]: divide bytes by 255, map [-1, 1] by x / 2 + 0.5")
        return images.float()
    if isinstance(images, str | bytes) or not isinstance(images, Sequence | Image.Image):
        got = f"{type(images).__name__} {images!r:.60}"
        raise TypeError(f"images: got {got}; expected PIL images, or a tensor (B, 3, H, W) in [0, 1]")
    images = images if isinstance(images, Sequence) else [images]
    images = [as_rgb(image, f"images[{index}]") for index, image in enumerate(images)]
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        raise ValueError(f"images: got {len(images)} images of sizes {sizes[:4]}; expected one or more of one size")
    pixels = np.stack([np.asarray(image, dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def to_bytes(images: "Tensor") -> np.ndarray:
    """Convert images (N, 3, H, W) in [0, 1] to (N, H, W, 3) uint8, rounded to the nearest value."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    return pixels.byte().numpy()
