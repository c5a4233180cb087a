"""Scores kept piece by piece while a reward is judged, so that what was scored before a kill is not scored again."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from dinalrm_align.train.durable import discard_folder, write_atomically

TERMS = "terms.json"


class Pieces:
    """A folder of numbered pieces, each a safetensors file that is whole or not there.

    folder: made. terms: JSON-ready, what the scores depend on; ValueError when the folder was begun on others.
    """

    def __init__(self, folder: Path, terms: Mapping[str, object]) -> None:
        self.folder = folder
        ours = json.loads(json.dumps(terms))
        begun = folder / TERMS
        if begun.exists():
            theirs = json.loads(begun.read_text(encoding="utf-8"))
            if theirs != ours:
                raise ValueError(
                    f"{folder} was begun on other terms: got {ours}, expected {theirs}; choose another output_dir, or "
                    "delete it and the reward is judged again"
                )
        else:
            write_atomically(begun, json.dumps(ours, indent=1) + "\n")

    def load(self, number: int) -> tuple[dict[str, np.ndarray], dict[str, object]] | None:
        """The arrays and the words of a piece; None when it is not there. ValueError when it is damaged."""
        path = self._path(number)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="np") as file:
                words = json.loads((file.metadata() or {})["words"])
                return {name: file.get_tensor(name) for name in file.keys()}, words
        except (SafetensorError, json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and that piece is judged again") from error

    def save(self, number: int, arrays: Mapping[str, np.ndarray], words: Mapping[str, object]) -> None:
        """Keep a piece. words: JSON-ready."""
        write_atomically(self._path(number), save(dict(arrays), metadata={"words": json.dumps(words)}))

    def discard(self) -> None:
        """Delete the folder: what it held is kept elsewhere as a whole."""
        discard_folder(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"
