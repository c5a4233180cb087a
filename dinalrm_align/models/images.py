"""Read images upright, as 8-bit RGB, and convert them to tensors (B, 3, H, W) in [0, 1].

`open_image` is the only place that opens image files. The orientation of an image is, in this order, the EXIF tag
Orientation (EXIF segment or chunk, before or after the pixel data, or PNG text "Raw profile type exif" or "APP1"), and
tiff:Orientation in XMP (also PNG text). Values other than 1 to 8 and unreadable metadata are ignored, as in browsers.
TIFF files are turned by PIL, which reads the tag and then XMP.

torch is imported only inside functions, so that processes that only decode images start ten times faster.
"""

import contextlib
import io
import re
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from dinalrm_align.train.files import InputError

if TYPE_CHECKING:
    from torch import Tensor

Images: TypeAlias = "Tensor | np.ndarray | Image.Image | Sequence[Tensor | np.ndarray | Image.Image]"
"""Images that `image_tensor` converts."""
ORIENTATION = 0x0112  # EXIF tag; values from 5 to 8 exchange width and height
TURNS = dict(zip(range(2, 9), [
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90,
], strict=True))  # fmt: skip
"""Value of the orientation tag -> transposition that turns the image upright. Source: EXIF 2.3, section 4.6.4."""
IN_HEADER = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "PPM")
"""PIL's names of formats whose size and orientation are known without decoding pixels."""
PNG_METADATA = (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt")


def open_image(source: Path | bytes | Image.Image, name: str | None = None) -> Image.Image:
    """Read an image, turn it upright, and convert it to RGB, 8 bits per channel. The result holds no metadata.

    Modes: transparent pixels are put on white; 16-bit grey is divided by 257; CMYK, YCbCr, HSV, palettes, grey
    and 1 bit are converted as by PIL, without colour profiles. I (32 bits), F and LAB are refused.
    PIL reads 16-bit colour as the upper 8 bits. Animations and multi-page files: the first frame.

    Args:
        source: file, content of a file, or PIL image, which is not modified. A PIL image that still carries an
            orientation (`getexif()` or `info`) is turned.
        name: name in error messages; default: the path.

    Raises ValueError, with the name, for a file that cannot be decoded, a refused mode, and a side of under 2 pixels.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    with contextlib.nullcontext(source) if isinstance(source, Image.Image) else _opened(source, name) as image:
        _check_size(image, name)
        try:
            image.load()
            turn = TURNS.get(_orientation(image))
            image = _rgb(image)
        except Exception as error:  # decoders fail in many ways on a damaged file
            raise InputError(f"{name} cannot be read as an image: {str(error) or repr(error)}") from error
    image = image if turn is None else image.transpose(turn)
    image.info = {}
    return image


def image_size(source: Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Return the (height, width) of `open_image(source)`. Decodes pixels only for formats not listed in IN_HEADER."""
    name = name or (str(source) if isinstance(source, Path) else "image")
    with _opened(source, name) as file:
        if file.format in IN_HEADER:
            _check_size(file, name)
            return file.size if _orientation(file) >= 5 else file.size[::-1]
    return open_image(source, name).size[::-1]


def resized_image(source: Path | bytes, size: tuple[int, int], name: str | None = None) -> np.ndarray:
    """Read an image and resize it to `size` (height, width) with LANCZOS; return (height, width, 3) uint8."""
    image = open_image(source, name)
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image)


def _opened(source: Path | bytes, name: str) -> Image.Image:
    """Open an image file without decoding pixels; `info` holds all its metadata."""
    if isinstance(source, Path) and not source.is_file():
        raise FileNotFoundError(f"no image {name}{' (it is a folder)' if source.is_dir() else ''}; expected a file")
    if not (source.stat().st_size if isinstance(source, Path) else source):
        raise InputError(f"{name} is empty (0 bytes)")
    try:
        image = Image.open(source if isinstance(source, Path) else io.BytesIO(source))
        if image.format == "PNG":
            image.info |= _png_info(source)
        return image
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that PIL can read") from None
    except Exception as error:
        raise InputError(f"{name} cannot be read as an image: {error}") from error


def _png_info(source: Path | bytes) -> dict[str, Any]:
    """Return the EXIF and text of a PNG file. PIL reads chunks after the pixels only while it decodes these."""
    parts = []
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
        parts.append(stream.read(8))
        while len(head := stream.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind in PNG_METADATA:
                parts.append(head + stream.read(length + 4))  # 4: the checksum
            else:
                stream.seek(length + 4, io.SEEK_CUR)
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return PngImageFile(io.BytesIO(b"".join([*parts, end]))).info


def _check_size(image: Image.Image, name: str) -> None:
    if min(image.size) < 2:
        raise InputError(f"{name}: got an image of {image.width} x {image.height} pixels; expected at least 2 x 2")


def _orientation(image: Image.Image) -> int:
    """Return the orientation of the pixels, 1 to 8, by the rules in the docstring of this module."""
    if image.format == "TIFF":
        return 1
    profiles = [_raw_profile(str(image.info.get(f"Raw profile type {kind}", ""))) for kind in ("APP1", "xmp")]
    packets = [image.info.get("xmp", b""), image.info.get("XML:com.adobe.xmp", b""), *profiles]
    found = [_exif_orientation(image), *map(_exif_orientation, profiles), *map(_xmp_orientation, packets)]
    return next((value for value in found if value in range(1, 9)), 1)


def _exif_orientation(source: Image.Image | bytes) -> Any:
    """Return the value of the EXIF tag in a PIL image, or in the bytes of an EXIF segment; None if there is none."""
    try:
        if isinstance(source, Image.Image):
            return Image.Image.getexif(source).get(ORIENTATION)  # PngImageFile.getexif would decode the pixels
        exif = Image.Exif()
        exif.load(source)
        return exif.get(ORIENTATION)
    except Exception:  # damaged EXIF fails in many ways
        return None


def _xmp_orientation(packet: str | bytes) -> int | None:
    """Return tiff:Orientation, attribute or element, of an XMP packet in UTF-8 or UTF-16; None if there is none."""
    text = (packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet).replace("\0", "")
    named = re.search(r"""xmlns:([\w.-]+)\s*=\s*["']http://ns\.adobe\.com/tiff/1\.0/["']""", text)
    tag = rf"(?<![\w.:/-]){re.escape(named[1] if named else 'tiff')}:Orientation"
    found = re.search(rf"""{tag}(?:\s*=\s*["']|(?:\s[^>]*)?>)\s*([0-9]{{1,9}})\s*["'<]""", text)
    return int(found[1]) if found else None


def _raw_profile(text: str) -> bytes:
    """Return the bytes of a PNG text "Raw profile type ...": a name, a length and hexadecimal digits."""
    digits = re.fullmatch(r"\s*\S+\s+\d+\s+([0-9a-fA-F\s]*)", text)
    return bytes.fromhex(digits[1]) if digits and len("".join(digits[1].split())) % 2 == 0 else b""


def _rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded PIL image to a new RGB image. Raises ValueError for the modes that `open_image` refuses."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # 16-bit files
        values = np.asarray(image)
        values = np.where(values == image.info.get("transparency", -1), 65535, values)
        return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F", "LAB"):
        raise ValueError(f"got mode {image.mode}; expected 8 bits per channel: scale it, and convert to RGB")
    image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode))  # undo premultiplied alpha
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def image_tensor(images: Images) -> "Tensor":
    """Convert images of equal size to one tensor (B, 3, H, W), float32 in [0, 1].

    images: PIL images (see `open_image`), tensors (3, H, W) or (B, 3, H, W), NumPy arrays (H, W, 3) or (B, H, W, 3),
        one or a list. Tensors and arrays are uint8, or floating in [0, 1]; gradients reach floating tensors.

    Raises TypeError or ValueError, with the position in the list, for anything else.
    """
    import torch

    parts = image_batches(images)
    sizes = sorted({tuple(part.shape[-2:]) for part in parts})
    if len(sizes) != 1:
        got = f"{len(parts)} images of sizes (height, width) {sizes[:4]}"
        raise ValueError(f"images: got {got}; expected one size: resize or crop them")
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def image_batches(images: Images) -> list["Tensor"]:
    """Convert the elements of a list of images, of any sizes, to tensors (b, 3, H, W). See `image_tensor`."""
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        if not images:
            raise ValueError("images: got 0 images; expected at least one")
        return [_batch(image, f"images[{index}]") for index, image in enumerate(images)]
    return [_batch(images, "images")]


def _batch(image: Any, name: str) -> "Tensor":
    """Convert an image or a batch of equal size to (b, 3, H, W), float32 in [0, 1]."""
    import torch

    from dinalrm_align.train.checks import check

    if isinstance(image, Image.Image):
        image = np.asarray(open_image(image, name))
    if isinstance(image, torch.Tensor):
        place = f" on {image.device}, {image.layout}" if image.is_meta or image.layout != torch.strided else ""
        valid = (image.dtype == torch.uint8 or image.is_floating_point()) and not place
        layout, channels = "(3, H, W) or (B, 3, H, W)", image.shape[-3:-2]
    elif isinstance(image, np.ndarray):
        valid, place = image.dtype == np.uint8 or image.dtype.kind == "f", ""
        layout, channels = "(H, W, 3) or (B, H, W, 3)", image.shape[-1:]
    else:
        got = f"{type(image).__name__} {image!r:.60}"
        raise TypeError(f"{name}: got {got}; expected PIL images, tensors (3, H, W) or arrays (H, W, 3)")
    if not valid or image.ndim not in (3, 4) or tuple(channels) != (3,) or 0 in image.shape:
        got = f"{image.dtype} {tuple(image.shape)}{place}"
        raise ValueError(f"{name}: got {got}; expected uint8, or floating in [0, 1], {layout}, at least one")
    if isinstance(image, np.ndarray):
        array = image if image.dtype == np.uint8 else image.astype(np.float32)
        image = torch.tensor(np.ascontiguousarray(array)).movedim(-1, -3)
    if image.dtype == torch.uint8:
        pixels = image.float() / 255
    else:
        pixels = image.float()
        check(torch.stack(pixels.detach().aminmax()), partial(_judge_pixels, name))
    return pixels if pixels.dim() == 4 else pixels[None]


def _judge_pixels(name: str, ends: list[float]) -> None:
    low, high = ends
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        got = f"got values in [{low:.3g}, {high:.3g}]"
        raise ValueError(f"{name}: {got}; expected [0, 1]: divide bytes by 255, map [-1, 1] by x / 2 + 0.5")


def to_bytes(images: "Tensor") -> np.ndarray:
    """Convert images (N, 3, H, W) in [0, 1] to (N, H, W, 3) uint8, rounded to the nearest value."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    return pixels.byte().cpu().numpy()
