"""Read prompt files and captioned images, and draw the prompts of each micro-step."""

from pathlib import Path

import torch
from PIL import Image

from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.images import open_image
from dinalrm_align.models.text import MAX_CHARACTERS
from dinalrm_align.train.files import read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(path: Path) -> list[str]:
    """Read a UTF-8 text file with one prompt per line. Blank lines are skipped.

    Raises FileNotFoundError, or ValueError if the file is not UTF-8, is empty, or has a line of over 10,000 characters.
    """
    text = read_text(path, "prompt file", "a text file with one prompt per line")
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_CHARACTERS:
            raise ValueError(
                f"prompt file {path}, line {number}: got {len(line)} characters; expected at most {MAX_CHARACTERS}"
            )
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} is empty; expected one prompt per line")
    return prompts


def read_captioned_images(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """Read each image NAME.png (or .jpg, .jpeg, .webp) of a folder and its caption NAME.txt, sorted by name.

    Returns (RGB images, captions). Raises FileNotFoundError or ValueError for a missing, empty or unreadable file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected one with images NAME.png and captions NAME.txt")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no images in {folder}; expected NAME.png (or {', '.join(SUFFIXES[1:])}) and NAME.txt")
    captions = [" ".join(read_prompts(path.with_suffix(".txt"))) for path in paths]
    return [open_image(path) for path in paths], captions


def prompt_indices(
    count: int, batch_size: int, micro_step: int, *, seed: int, rank: int = 0, num_processes: int = 1
) -> list[int]:
    """Return the indices in [0, count) of the `batch_size` prompts that process `rank` uses at a micro-step.

    All ranks together use every prompt once per epoch. Each epoch has a new random order, which depends on the seed.
    """
    first = (micro_step * num_processes + rank) * batch_size
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    orders = torch.cat([torch.randperm(count, generator=seeded_generator(seed, epoch)) for epoch in epochs])
    return orders[first % count :][:batch_size].tolist()
