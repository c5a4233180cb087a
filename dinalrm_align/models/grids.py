"""Save images side by side or as captioned grids in PNG files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dinalrm_align.models.images import open_image, to_bytes
from dinalrm_align.train.files import atomically, reading, save_figure

CELL_INCHES = 1.5


def save_strip(images: np.ndarray, path: Path) -> None:
    """Save N images (N, H, W, 3) uint8 side by side in one PNG, H pixels high and N * W wide; `load_strip` reads it."""
    with atomically(path) as temporary:
        Image.fromarray(np.concatenate(list(images), axis=1)).save(temporary)


def load_strip(path: Path, count: int) -> np.ndarray:
    """Return the `count` images, (count, H, W, 3) uint8, of a PNG file that `save_strip` wrote."""
    with reading(f"row of {count} images", path):
        return np.stack(np.split(np.asarray(open_image(path)), count, axis=1))


def save_grid(
    images: Tensor | np.ndarray, captions: Sequence[str], path: Path, *, title: str = "", columns: int = 8
) -> None:
    """Save a PNG grid of images, (N, 3, H, W) in [0, 1] or (N, H, W, 3) uint8, with a caption below each image."""
    pixels = to_bytes(images) if isinstance(images, Tensor) else images
    if len(pixels) != len(captions):
        raise ValueError(f"one caption per image: got {len(pixels)} images, {len(captions)} captions")
    _save_cells(pixels, captions, path, title, columns, width=1, letters=22)


def save_before_after(
    before: np.ndarray, after: np.ndarray, captions: Sequence[str], path: Path, *, title: str = "", columns: int = 4
) -> None:
    """Save a PNG grid of N captioned pairs of images, before and after training; both are (N, H, W, 3) uint8."""
    if not len(before) == len(after) == len(captions):
        raise ValueError(f"got {len(before)} images before, {len(after)} after, {len(captions)} captions")
    pairs = [np.concatenate([b, np.full_like(b[:, :2], 255), a], axis=1) for b, a in zip(before, after, strict=True)]
    _save_cells(pairs, captions, path, title or "in each pair: before | after", columns, width=2, letters=40)


def _save_cells(
    cells: Sequence[np.ndarray], captions: Sequence[str], path: Path, title: str, columns: int, width: int, letters: int
) -> None:
    """Save a captioned PNG grid. `width`: cell width in units of 1.5 inches. `letters`: characters per caption line."""
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(columns * CELL_INCHES * width, rows * CELL_INCHES * 1.35 + (0.4 if title else 0)))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, cell, caption in zip(axes, cells, captions, strict=False):
        axis.imshow(cell)
        lines = textwrap.wrap(caption, letters)
        if len(lines) > 3:
            lines = [*lines[:2], lines[2][: letters - 1] + "\u2026"]
        axis.set_title("\n".join(lines), y=-0.08, va="top", fontsize=7, parse_math=False)
    finish_figure(figure, path, title)


def finish_figure(figure: Figure, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)
