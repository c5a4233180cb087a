"""Prompt files, captioned pictures, and which prompts a micro-step takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dinalrm_align.noise import seeded_generator

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines are skipped. ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"no prompt file {path}; expected a text file of one prompt a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"prompt file {path} is not UTF-8 (line {line}); save it as UTF-8") from error
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} is empty; expected one prompt a line")
    return prompts


def read_captioned_pictures(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """The pictures NAME.png (.jpg, .jpeg, .webp) of a folder as RGB, and the captions in NAME.txt, in order of name.

    Raises ValueError when there is no picture, or a picture has no caption or an empty one.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"no pictures in {folder}; expected NAME.png (or {', '.join(PICTURES[1:])}) beside NAME.txt")
    captions = [" ".join(read_prompts(path.with_suffix(".txt"))) for path in paths]
    pictures = []
    for path in paths:
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures, captions


def prompt_indices(
    count: int, batch_size: int, micro_step: int, *, seed: int, rank: int = 0, num_processes: int = 1
) -> list[int]:
    """Which of `count` prompts process `rank` takes at this micro-step: `batch_size` indices.

    A pure function of its arguments. All processes together go through the whole list in a new random order each time
    round, so that no prompt comes a second time before every other has come once.
    """
    first = (micro_step * num_processes + rank) * batch_size
    orders: dict[int, Sequence[int]] = {}
    indices = []
    for position in range(first, first + batch_size):
        epoch, place = divmod(position, count)
        if epoch not in orders:
            orders[epoch] = torch.randperm(count, generator=seeded_generator(seed, epoch)).tolist()
        indices.append(orders[epoch][place])
    return indices
