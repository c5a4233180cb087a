"""Does a test set share prompts or pictures with what a reward was trained on?

A prompt is known by a digest of its text, spaces at its ends left out; a picture by a digest of its published path, and
where training's files are at hand by the SHA-256 of its bytes. HPDv3's official splits are reported to overlap.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dinalrm_align.data.image_pairs import read_jsonl
from dinalrm_align.data.shards import read_index, read_prompt_list
from dinalrm_align.eval.scores import PairScores
from dinalrm_align.eval.test_sets import PictureSet
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.durable import file_digest
from dinalrm_align.train.files import parse_json, read_text


@dataclass(frozen=True)
class Trained:
    """Digests of what a reward was trained on. contents: SHA-256 of picture files; empty where they are not known."""

    prompts: frozenset[str]
    paths: frozenset[str] = frozenset()
    contents: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Leak:
    """prompt, picture (N,) bool: pairs whose prompt, or one of whose pictures, was trained on. by: how pictures were
    compared, in words.
    """

    prompt: np.ndarray
    picture: np.ndarray
    by: str

    @property
    def any(self) -> np.ndarray:
        return self.prompt | self.picture


def prompt_digest(prompt: str) -> str:
    return text_digest(prompt.strip())


def path_digest(path: str) -> str:
    """Of a picture's published path, in whatever folder it is called by ("./", a leading "images/") or not."""
    parts = [part for part in Path(path).parts if part != "."]
    return text_digest("/".join(parts[1:] if len(parts) > 1 and parts[0] == "images" else parts))


def trained_on(prompts: Iterable[str], paths: Iterable[str] = (), contents: Iterable[str] = ()) -> Trained:
    """From prompts, published paths and SHA-256 of files."""
    return Trained(frozenset(map(prompt_digest, prompts)), frozenset(map(path_digest, paths)), frozenset(contents))


def read_trained(source: str | Path) -> Trained:
    """What a reward was trained on: a directory of latent pairs (prompts alone), a jsonl of pictures (prompts, paths,
    contents), or a published train.json of HPDv3 or HPDv2 (prompts, paths).

    FileNotFoundError when there is nothing, ValueError for anything else.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return trained_on(read_prompt_list(path, read_index(path)))
    if path.suffix == ".jsonl":
        records = read_jsonl(path)
        files = sorted({record[key] for record in records for key in ("chosen", "rejected")})
        paths = (str(file.relative_to(path.parent)) for file in files)
        return trained_on((record["prompt"] for record in records), paths, map(file_digest, files))
    records = parse_json(read_text(path, "training set", "a directory of pairs, a jsonl or a train.json"), str(path))
    try:
        names = [record[key] for record in records for key in ("path1", "path2") if key in record]
        names += [name for record in records for name in record.get("file_path", ())]
        return trained_on([record["prompt"] for record in records], names)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: got entries without {error}; expected a list of HPDv3's (prompt, path1, path2) or HPDv2's "
            "(prompt, file_path)"
        ) from error


def leaked(judged: PairScores, trained: Trained, pictures: PictureSet | None = None) -> Leak:
    """Which pairs were trained on. pictures: the set behind them, to read files of; needed to compare contents.

    ValueError when the scores keep no prompts.
    """
    if judged.prompts is None:
        raise ValueError("these pairs keep no prompts as text: nothing tells whether they were trained on")
    known = np.array([prompt_digest(prompt) in trained.prompts for prompt in judged.prompts])
    picture, by = np.zeros(len(judged.label), dtype=bool), "not at all"
    if judged.pictures is not None and (trained.paths or trained.contents):
        rows = np.unique(np.concatenate([judged.chosen, judged.rejected]))
        seen = np.zeros(len(judged.pictures), dtype=bool)
        for row in rows.tolist():
            seen[row] = path_digest(judged.pictures[row]) in trained.paths
            if pictures is not None and trained.contents:
                content = hashlib.sha256(pictures.pictures[row].read()).hexdigest()
                seen[row] |= content in trained.contents
        picture = seen[judged.chosen] | seen[judged.rejected]
        by = "path and content" if trained.contents and pictures is not None else "path"
    return Leak(known[judged.caption], picture, by)
