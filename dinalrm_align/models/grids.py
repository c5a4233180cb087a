"""Grids of images as PNG files."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dinalrm_align.models.images import to_bytes
from dinalrm_align.train.durable import atomically
from dinalrm_align.train.figures import save_figure
from dinalrm_align.train.files import reading

CELL_INCHES = 1.5


def save_strip(pictures: np.ndarray, path: Path) -> None:
    """Pictures (N, H, W, 3) uint8 -> one lossless PNG of H x (N W), which `load_strip` takes apart again."""
    with atomically(path) as temporary:
        Image.fromarray(np.concatenate(list(pictures), axis=1)).save(temporary)


def load_strip(path: Path, count: int) -> np.ndarray:
    """The `count` pictures (N, H, W, 3) uint8 that `save_strip` put in a row. Raises as `files.reading`."""
    with reading(f"row of {count} pictures", path), Image.open(path) as strip:
        return np.stack(np.split(np.asarray(strip.convert("RGB")), count, axis=1))


def save_grid(
    images: Tensor | np.ndarray, captions: Sequence[str], path: Path, *, title: str = "", columns: int = 8
) -> None:
    """A PNG of pictures with their captions below them, `columns` a row.

    images: (N, 3, H, W) in [0, 1], or (N, H, W, 3) uint8; captions: N strings. ValueError when the numbers differ.
    """
    pictures = to_bytes(images) if isinstance(images, Tensor) else images
    if len(pictures) != len(captions):
        raise ValueError(f"one caption per picture: got {len(pictures)} pictures, {len(captions)} captions")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(columns * CELL_INCHES, rows * CELL_INCHES * 1.35 + (0.4 if title else 0)))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, picture, caption in zip(axes, pictures, captions, strict=False):
        axis.imshow(picture)
        _caption(axis, caption)
    finish_figure(figure, path, title)


def save_before_after(
    before: np.ndarray, after: np.ndarray, captions: Sequence[str], path: Path, *, title: str = "", columns: int = 4
) -> None:
    """A PNG of pairs, each picture before training beside the one after it. before, after: (N, H, W, 3) uint8."""
    if not len(before) == len(after) == len(captions):
        raise ValueError(f"got {len(before)} pictures before, {len(after)} after, {len(captions)} captions")
    pairs = [np.concatenate([b, np.full_like(b[:, :2], 255), a], axis=1) for b, a in zip(before, after, strict=True)]
    columns = min(columns, len(pairs))
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(columns * CELL_INCHES * 2, rows * CELL_INCHES * 1.35 + 0.4))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, pair, caption in zip(axes, pairs, captions, strict=False):
        axis.imshow(pair)
        _caption(axis, caption, width=40)
    finish_figure(figure, path, title or "in each pair: before | after")


def _caption(axis: Axes, caption: str, *, width: int = 22) -> None:
    lines = textwrap.wrap(caption, width)
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: width - 1] + "\u2026"]
    axis.set_title("\n".join(lines), y=-0.08, va="top", fontsize=7, parse_math=False)


def finish_figure(figure: Figure, path: Path, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save_figure(figure, path)
