"""Train on parquet files in DiNa-LRM's released layout (`formats.released`) without converting them.

Latents are read from the files, and prompts are encoded at every step. Parquet decompresses whole row groups, so row
groups are visited in random order, and the rows of four row groups at a time are shuffled together. For a full shuffle
and stored text embeddings, convert the folder with `recipes/prepare_pairs.py`.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from dinalrm_align.data import batches
from dinalrm_align.data.batches import BatchOrder, PairSource
from dinalrm_align.data.formats.record import Cell
from dinalrm_align.data.formats.released import LATENTS, load_latent
from dinalrm_align.data.formats.rows import parquet_module
from dinalrm_align.data.pairs import EncodePrompts, PairBatch, PairManifest
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import InputError, reading


class ReleasedPairs(PairSource):
    """`PairSource` that reads a folder of part_rank*.parquet: all rows, or only those in bucket_index.csv if it exists.

    manifest: how the latents were encoded and how `encode_prompts` encodes prompts. With on_bad="skip", unreadable
    files are left out, too.
    """

    reads_files_only = False

    def __init__(
        self, folder: str | Path, *, encode_prompts: EncodePrompts, manifest: PairManifest, **order: Unpack[BatchOrder]
    ) -> None:
        super().__init__(**order)
        self.folder, self.manifest, self._encode_prompts = Path(folder), manifest, encode_prompts
        self._pairs = self._find_pairs(self.folder, "released")
        blocks: dict[tuple[str, int], int] = {}
        self._arrange(
            [pair.prompt for pair in self._pairs],
            sizes=np.array([pair.shape for pair in self._pairs]),
            blocks=np.array([blocks.setdefault(pair.chosen[:2], len(blocks)) for pair in self._pairs]),
        )
        self._read_group = functools.lru_cache(2 * batches.AT_ONCE)(_read_group)

    def digest(self) -> str:
        rows = ((Path(pair.chosen.file).name, *pair.chosen[1:3], pair.prompt, pair.shape) for pair in self._pairs)
        return text_digest("".join(" ".join(map(str, row)) + "\n" for row in rows))

    def _where(self, unit: int) -> str:
        return str(self._pairs[unit].chosen)

    def _load(self, unit: int) -> list[torch.Tensor]:
        pair = self._pairs[unit]
        return [torch.stack([self._latent(cell, pair.shape) for cell in (pair.chosen, pair.rejected)])]

    def _collate(self, units: np.ndarray, items: Sequence[Sequence[torch.Tensor]]) -> PairBatch:
        chosen, rejected = torch.stack([latents for (latents,) in items], dim=1)
        prompts = [self._pairs[unit].prompt for unit in units]
        conditions = Conditions(prompts, *self._encode_prompts(prompts))
        device = conditions.prompt_embeds.device
        return PairBatch.plain(chosen.to(device), rejected.to(device), conditions)

    def _latent(self, cell: Cell, shape: tuple[int, int, int]) -> torch.Tensor:
        array = load_latent(self._read_group(cell.file, cell.row_group)[cell.column][cell.row].as_py(), str(cell))
        if array.shape != shape:
            raise InputError(f"{cell}: got {array.shape}; expected {shape}, as its shape column says")
        return torch.from_numpy(array)


def _read_group(file: str, row_group: int) -> dict[str, object]:
    parquet = parquet_module()
    with reading("parquet file", file):
        table = parquet.ParquetFile(file).read_row_group(row_group, columns=list(LATENTS))
        return {name: table.column(name) for name in LATENTS}
