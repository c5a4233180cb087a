"""Picture files: opened whole or refused with a sentence, measured without being decoded, resized. Torch-free.

A picture is named by its path, or given as the bytes of its file. Worker processes run what is here, and start quickly.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

ORIENTATION = 0x0112
"""EXIF tag; 5 to 8 mean that width and height are exchanged."""


def open_picture(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The picture in a file, upright, as RGB. FileNotFoundError when there is no such file, ValueError when it is no
    picture, a broken one, or one that `as_rgb` refuses. name: in these sentences; a file's own unless given.
    """
    name = name or str(source)
    file = _opened(source, name)
    try:
        with file:
            picture = ImageOps.exif_transpose(file)
    except Exception as error:  # decoders fail in many ways on a broken file
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    return as_rgb(picture, name)


def picture_size(source: Path | bytes, name: str | None = None) -> tuple[int, int]:
    """(height, width) of a picture as it is seen upright, from the head of its file. Raises as `open_picture`."""
    name = name or str(source)
    with _opened(source, name) as file:
        try:
            at_hand = file.format != "PNG" or "exif" in file.info  # else all of a PNG would be decoded in search of it
            turned = at_hand and file.getexif().get(ORIENTATION, 1) >= 5
        except Exception as error:
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
        width, height = file.size
    return (width, height) if turned else (height, width)


def resized_picture(source: Path | bytes, size: tuple[int, int], name: str | None = None) -> np.ndarray:
    """The picture, LANCZOS straight to (height, width), nothing cropped: uint8 (height, width, 3)."""
    picture = open_picture(source, name)
    height, width = size
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.array(picture)


def _opened(source: Path | bytes, name: str) -> Image.Image:
    if isinstance(source, Path):
        if not source.is_file():
            raise FileNotFoundError(
                f"no picture {name}{' (it is a folder)' if source.is_dir() else ''}; expected a file"
            )
        if source.stat().st_size == 0:
            raise ValueError(f"{name} is empty (0 bytes)")
    elif not source:
        raise ValueError(f"{name} is empty (0 bytes)")
    try:
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except UnidentifiedImageError:
        raise ValueError(f"{name} is not a picture that PIL can read") from None
    except Exception as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def as_rgb(picture: Image.Image, name: str) -> Image.Image:
    """A PIL picture as RGB. TypeError for anything else; ValueError when it has no pixels, is transparent in places
    (what lies behind is not known), has more than 8 bits per channel (they would be cut off), or its file is broken.
    """
    if not isinstance(picture, Image.Image):
        got = f"{type(picture).__name__} {picture!r:.60}"
        raise TypeError(f"{name}: got {got}; expected a PIL picture, as PIL.Image.open gives it")
    if not all(picture.size):
        raise ValueError(f"{name}: got a picture of {picture.width} x {picture.height} pixels; expected at least 1 x 1")
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"{name}: got mode {picture.mode}; expected 8 bits per channel: scale it, and convert to RGB")
    try:
        opaque = not picture.has_transparency_data or picture.convert("RGBA").getextrema()[3][0] == 255
        picture = picture.convert("RGB")
    except Exception as error:  # a file is decoded here at the latest
        raise ValueError(f"{name}: the picture cannot be read ({error})") from error
    if not opaque:
        raise ValueError(f"{name}: the picture is transparent in places; paste it on a background first")
    return picture
