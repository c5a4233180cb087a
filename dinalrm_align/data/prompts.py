"""Prompt files, captioned pictures, and which prompts a micro-step takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.images import open_image
from dinalrm_align.models.text import MAX_CHARACTERS
from dinalrm_align.train.files import read_text

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one a line; blank lines are skipped. FileNotFoundError when it is not there,
    ValueError for other text, no prompt at all, and a line of more than MAX_CHARACTERS.
    """
    text = read_text(path, "prompt file", "a text file of one prompt a line")
    for number, line in enumerate(text.split("\n"), start=1):
        if len(line) > MAX_CHARACTERS:
            raise ValueError(
                f"prompt file {path}, line {number}: got {len(line)} characters; expected at most {MAX_CHARACTERS}, "
                "one prompt a line"
            )
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"prompt file {path} is empty; expected one prompt a line")
    return prompts


def read_captioned_pictures(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """The pictures NAME.png (.jpg, .jpeg, .webp) of a folder as RGB, and the captions in NAME.txt, in order of name.

    Raises ValueError when there is no picture, a picture cannot be read, or its caption is empty; FileNotFoundError
    when it has none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected one of pictures NAME.png beside NAME.txt")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"no pictures in {folder}; expected NAME.png (or {', '.join(PICTURES[1:])}) beside NAME.txt")
    captions = [" ".join(read_prompts(path.with_suffix(".txt"))) for path in paths]
    return [open_image(path) for path in paths], captions


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
