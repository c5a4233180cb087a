"""Overlap between a test set and the training data of a reward.

Prompts are compared by a digest of their stripped text; images by a digest of their published path and, where the
training files are available, by the SHA-256 of their bytes. HPDv3's official splits are reported to overlap.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinalrm_align.data.formats import find_layout, read_preferences
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets import ImageSet
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import file_digest


@dataclass(frozen=True)
class Trained:
    """Digests of training data. contents: SHA-256 of image files; empty where they are not known."""

    prompts: frozenset[str]
    paths: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Leak:
    """(N,) bool: pairs whose prompt, or one of whose images, was trained on. by: how images were compared, as text."""

    prompt: np.ndarray
    image: np.ndarray
    by: str

    @property
    def any(self) -> np.ndarray:
        return self.prompt | self.image


def path_digest(path: str) -> str:
    """A digest of an image's published path, ignoring "./" and a leading "images/"."""
    parts = [part for part in Path(path).parts if part != "."]
    return text_digest("/".join(parts[1:] if len(parts) > 1 and parts[0] == "images" else parts))


def trained_on(prompts: Iterable[str], paths: Iterable[str] = (), contents: Iterable[str] = ()) -> Trained:
    """Build `Trained` from prompts, published paths and SHA-256 of files."""
    digests = frozenset(text_digest(prompt.strip()) for prompt in prompts)
    return Trained(digests, frozenset(map(path_digest, paths)), frozenset(contents))


def read_trained(source: str | Path) -> Trained:
    """What a reward was trained on: a file or folder in any layout of `data.formats`.

    Prompts are always known; published paths where images are files; contents only for a jsonl. Raises
    FileNotFoundError when there is nothing, ValueError for an unknown layout or an invalid record.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no training set {path}; expected a directory of pairs, a jsonl or a train.json")
    layout, prompts, images = find_layout(path), set(), set()
    for pair in read_preferences(path, layout, strict=False):
        prompts.add(pair.prompt)
        images |= {image for image in (pair.chosen, pair.rejected) if isinstance(image, str)}
    files = sorted(path.parent / image for image in images) if layout == "jsonl" else []
    return trained_on(prompts, images, map(file_digest, files))


def leaked(judged: PairScores, trained: Trained, images: ImageSet | None = None) -> Leak:
    """Which pairs were trained on. images: the set that was scored; needed to compare contents.

    Raises ValueError when the scores have no prompts.
    """
    if judged.prompts is None:
        raise ValueError("these pairs have no prompts as text, so they cannot be compared with the training data")
    known = np.array([text_digest(prompt.strip()) in trained.prompts for prompt in judged.prompts])[judged.caption]
    if judged.images is None or not (trained.paths or trained.contents):
        return Leak(known, np.zeros(len(judged.label), dtype=bool), "not at all")
    seen = np.zeros(len(judged.images), dtype=bool)
    by_content = bool(trained.contents) and images is not None
    for row in {*judged.chosen.tolist(), *judged.rejected.tolist()}:
        seen[row] = path_digest(judged.images[row]) in trained.paths
        if by_content:
            seen[row] |= hashlib.sha256(images.images[row].read()).hexdigest() in trained.contents
    by = "path and content" if by_content else "path"
    return Leak(known, seen[judged.chosen] | seen[judged.rejected], by)
