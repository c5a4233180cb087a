"""Preference pairs as a jsonl of pictures, encoded on the fly.

Each line is {"prompt": text, "chosen": path, "rejected": path} with, if wanted, "label" (probability that a rater
prefers `chosen`, 1 unless given) and "concept" (a name for evaluation). Paths are relative to the file. Every picture
is scaled to cover height x width (LANCZOS) and cropped at the centre.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dinalrm_align.data.pairs import BatchesInOrder, PairBatch, PairManifest, ShuffledBatches, check_draws, held_out
from dinalrm_align.models.images import open_image
from dinalrm_align.models.text import MAX_CHARACTERS, Conditions
from dinalrm_align.train.durable import file_digest
from dinalrm_align.train.files import parse_json, read_text

EncodeImages = Callable[[Tensor], Tensor]
"""images (B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w)"""
EncodePrompts = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B prompts -> prompt_embeds (B, L, D), pooled_prompt_embeds (B, P)"""


class ImagePairs:
    """A PairSource over a jsonl of picture paths.

    Args:
        path: the jsonl; read and checked whole at once, pictures are opened when their batch is asked for.
        encode_images, encode_prompts: what turns pictures and prompts into what the reward reads.
        manifest: of those two.
        height, width: of every picture, in pixels.
        batch_size: pairs a batch.
        seed: of the shuffle.
        held_out_prompts: distinct prompts kept from training for `validation`.
    """

    reads_files_only = False

    def __init__(
        self,
        path: str | Path,
        *,
        encode_images: EncodeImages,
        encode_prompts: EncodePrompts,
        manifest: PairManifest,
        height: int,
        width: int,
        batch_size: int,
        seed: int = 0,
        held_out_prompts: int = 0,
    ) -> None:
        check_draws(batch_size, seed, held_out_prompts)
        self.manifest = manifest
        self.height, self.width = height, width
        self._encode_images, self._encode_prompts = encode_images, encode_prompts
        self._path = Path(path)
        self._records = read_jsonl(self._path)
        self._batch_size, self._seed = batch_size, seed
        keep_out = held_out([record["prompt"] for record in self._records], held_out_prompts)
        is_out = np.array([record["prompt"] in keep_out for record in self._records])
        self._held_out = np.flatnonzero(is_out)
        self._trained = [np.flatnonzero(~is_out)]

    @functools.cached_property
    def _batches(self) -> ShuffledBatches:
        """Made when training asks: a data set that is only evaluated on may be smaller than a batch."""
        return ShuffledBatches(self._trained, self._batch_size, self._seed)

    def __len__(self) -> int:
        """Batches in an epoch, all processes together."""
        return self._batches.per_epoch

    def digest(self) -> str:
        """Of the jsonl; not of the pictures."""
        return file_digest(self._path)[:16]

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """Batch `step` of process `rank` of `world`, on the device of the encoders."""
        return self._read(self._batches.at(step * world + rank))

    def validation(self) -> Sequence[PairBatch]:
        """The pairs of the held-out prompts, in the order of the file, encoded each time they are asked for."""
        return BatchesInOrder(self._read, [self._held_out], self._batch_size)

    def in_order(self) -> Sequence[PairBatch]:
        """All pairs, in the order of the file: a data set that is only evaluated on."""
        return BatchesInOrder(self._read, [np.arange(len(self._records))], self._batch_size)

    @torch.no_grad()
    def _read(self, rows: np.ndarray) -> PairBatch:
        records = [self._records[row] for row in rows]
        paths = [record["chosen"] for record in records] + [record["rejected"] for record in records]
        latents = self._encode_images(torch.stack([load_picture(path, self.height, self.width) for path in paths]))
        prompts, concepts = ([record[key] for record in records] for key in ("prompt", "concept"))
        return PairBatch.plain(
            *latents.chunk(2),
            Conditions(prompts, *self._encode_prompts(prompts)),
            label=[record["label"] for record in records],
            concepts=None if None in concepts else tuple(concepts),
        )


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every record with keys prompt, chosen, rejected (absolute paths), label, concept; ValueError names the line."""
    records = []
    for number, line in enumerate(read_text(path, "file of pairs").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = parse_json(line, where)
        if not isinstance(record, dict):
            raise ValueError(
                f"{where}: got a {type(record).__name__}; expected an object with prompt, chosen, rejected"
            )
        for key in ("prompt", "chosen", "rejected"):
            if not isinstance(record.get(key), str):
                raise ValueError(f"{where}: {key!r} is {record.get(key)!r:.80}; expected a string")
        if len(record["prompt"]) > MAX_CHARACTERS:
            got = len(record["prompt"])
            raise ValueError(f"{where}: prompt: got {got} characters; expected at most {MAX_CHARACTERS}")
        label = record.get("label", 1.0)
        if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
            raise ValueError(f"{where}: label is {label!r}; expected a number in [0, 1]")
        if not isinstance(record.get("concept", ""), str | None):
            raise ValueError(f"{where}: concept is {record['concept']!r:.80}; expected a name")
        for key in ("chosen", "rejected"):
            if not (path.parent / record[key]).is_file():
                raise FileNotFoundError(f"{where}: {key} picture {path.parent / record[key]} does not exist")
        records.append(
            {
                "prompt": record["prompt"],
                "chosen": path.parent / record["chosen"],
                "rejected": path.parent / record["rejected"],
                "label": float(label),
                "concept": record.get("concept"),
            }
        )
    if not records:
        raise ValueError(f"{path} holds no pairs")
    return records


def load_picture(path: Path, height: int, width: int) -> Tensor:
    """The picture at `path`, upright, scaled to cover (height, width), centre-cropped: (3, H, W) in [0, 1]."""
    fitted = ImageOps.fit(open_image(path), (width, height), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255
