"""Scores stored in pieces while a reward is evaluated, so that a run that was killed does not score them again."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinalrm_align.train.durable import discard_folder, write_atomically

TERMS = "terms.json"


class Pieces:
    """A folder of numbered safetensors files, each written atomically.

    Args:
        folder: created if it does not exist.
        terms: what the scores depend on, JSON-serialisable.

    Raises ValueError when the folder holds scores that were taken with other terms.
    """

    def __init__(self, folder: Path, terms: Mapping[str, object]) -> None:
        self.folder = folder
        stored = folder / TERMS
        if stored.exists():
            check_terms(folder, json.loads(stored.read_text(encoding="utf-8")), terms)
        else:
            write_atomically(stored, json.dumps(terms, indent=1) + "\n")

    def load(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, object]] | None:
        """The arrays and the metadata of a piece; None if it does not exist. Raises ValueError if it is damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="np") as file:
                metadata = json.loads((file.metadata() or {})["words"])
                return {name: file.get_tensor(name) for name in file.keys()}, metadata
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it to score this piece again") from error

    def save(self, number: int, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, object]) -> None:
        """Write a piece. metadata: JSON-serialisable."""
        write_atomically(self._path(number), save(dict(arrays), metadata={"words": json.dumps(metadata)}))

    def discard(self) -> None:
        """Delete the folder, once the scores are stored as a whole elsewhere."""
        discard_folder(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def check_terms(path: Path, stored: Mapping[str, object], terms: Mapping[str, object]) -> None:
    """Raise ValueError unless stored scores were taken with `terms`."""
    expected = json.loads(json.dumps(terms))
    if stored != expected:
        raise ValueError(
            f"{path}: got scores taken with {stored}; expected {expected}: choose another output_dir, or delete it to "
            "score again"
        )
