"""Arrays with metadata in safetensors files; and scores stored in pieces, so that a killed run does not repeat them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinalrm_align.train.files import discard_folder, write_atomically

TERMS = "terms.json"


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], **metadata: object) -> None:
    """Write a safetensors file atomically. metadata: JSON-serialisable."""
    text = {name: json.dumps(value) for name, value in metadata.items()}
    write_atomically(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=text))


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The arrays and the metadata of a file of `write_arrays`. Raises ValueError when it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to score again") from error


def check_terms(path: Path, stored: object, terms: Mapping[str, object]) -> None:
    """Raise ValueError unless stored scores were taken with `terms`."""
    expected = json.loads(json.dumps(terms))
    if stored != expected:
        raise ValueError(
            f"{path}: got scores taken with {stored}; expected {expected}: choose another output_dir, or delete it to "
            "score again"
        )


class Pieces:
    """A folder of numbered pieces, for scores that were taken with `terms` (JSON-serialisable)."""

    def __init__(self, folder: Path, terms: Mapping[str, object]) -> None:
        """Raises ValueError when the folder holds scores that were taken with other terms."""
        self.folder = folder
        stored = folder / TERMS
        if stored.exists():
            check_terms(folder, json.loads(stored.read_text(encoding="utf-8")), terms)
        else:
            write_atomically(stored, json.dumps(terms, indent=1) + "\n")

    def load(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, object]] | None:
        """The arrays and the metadata of a piece; None if it does not exist."""
        if not self._path(number).exists():
            return None
        arrays, metadata = read_arrays(self._path(number))
        return arrays, metadata["words"]

    def save(self, number: int, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, object]) -> None:
        write_arrays(self._path(number), arrays, words=metadata)

    def discard(self) -> None:
        """Delete the folder, once the scores are stored as a whole elsewhere."""
        discard_folder(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"
