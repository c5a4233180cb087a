"""Training on the released layout as it is (`data.released`): no copy is made, prompts are encoded on the fly.

Rows of a row group can only be had together, so the order is drawn in blocks: row groups in random order, a few of them
mixed, each decoded once by a process and kept until its rows are used. `recipes/prepare_pairs.py` turns such a folder
into one that every process reads row by row, text embeddings included.
"""

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dinalrm_align.data.image_pairs import EncodePrompts
from dinalrm_align.data.pairs import BatchesInOrder, PairBatch, PairManifest, ShuffledBatches, check_draws, held_out
from dinalrm_align.data.parquet import parquet_module
from dinalrm_align.data.released import ReleasedRow, listed_rows, load_latent, released_files, released_rows
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import reading

AT_ONCE = 4
"""Row groups that are mixed."""


class ReleasedPairs:
    """A PairSource over a folder of part_rank*.parquet.

    Args:
        folder: where they lie; with a bucket_index.csv, its rows alone are read.
        encode_prompts: what turns prompts into what the reward reads.
        manifest: of that, and of the latents, which do not say how they were made.
        batch_size: pairs a batch.
        seed: of the shuffle.
        held_out_prompts: distinct prompts kept from training for `validation`.
        on_bad: of parts and rows that cannot be read: refuse them, or skip them with a warning that counts and names.
    """

    reads_files_only = False

    def __init__(
        self,
        folder: str | Path,
        *,
        encode_prompts: EncodePrompts,
        manifest: PairManifest,
        batch_size: int,
        seed: int = 0,
        held_out_prompts: int = 0,
        on_bad: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        check_draws(batch_size, seed, held_out_prompts)
        self.folder, self.manifest = Path(folder), manifest
        self._encode_prompts, self._batch_size, self._seed = encode_prompts, batch_size, seed
        self._rows = self._find(on_bad)
        groups = {
            place: number for number, place in enumerate(dict.fromkeys((r.file, r.row_group) for r in self._rows))
        }
        self._blocks = np.array([groups[row.file, row.row_group] for row in self._rows])
        keep_out = held_out([row.prompt for row in self._rows], held_out_prompts)
        is_out = np.array([row.prompt in keep_out for row in self._rows])
        shapes = np.array([row.shape for row in self._rows])
        self._by_size = [np.flatnonzero((shapes == shape).all(axis=1)) for shape in np.unique(shapes, axis=0)]
        self._held_out = [rows[is_out[rows]] for rows in self._by_size]
        self._trained = [rows[~is_out[rows]] for rows in self._by_size]
        self._read_group = functools.lru_cache(2 * AT_ONCE)(_read_group)

    def _find(self, on_bad: str) -> list[ReleasedRow]:
        listed, found, bad = listed_rows(self.folder), [], []
        files = released_files(self.folder)
        if listed is not None:
            absent = sorted({name for name, _, _ in listed} - {file.name for file in files})
            bad += [f"bucket_index.csv names {name}, which is not in {self.folder}" for name in absent]
        for file in files:
            try:
                for row in released_rows(file):
                    if isinstance(row, str):
                        bad.append(row)
                    elif listed is None or (file.name, row.row_group, row.row) in listed:
                        found.append(row)
            except (OSError, ValueError) as error:
                bad.append(str(error))
        if bad and on_bad == "refuse":
            raise ValueError(f"{bad[0]}. To leave out what cannot be read: --on_bad skip")
        if bad:
            warnings.warn(f"{self.folder}: {len(bad)} parts or rows left out. {'; '.join(bad[:3])}", stacklevel=3)
        if not found:
            raise ValueError(f"{self.folder} holds no pairs that can be read")
        return found

    @functools.cached_property
    def _batches(self) -> ShuffledBatches:
        """Made when training asks: a data set that is only evaluated on may be smaller than a batch."""
        return ShuffledBatches(self._trained, self._batch_size, self._seed, blocks=self._blocks, at_once=AT_ONCE)

    def __len__(self) -> int:
        """Batches in an epoch, all processes together."""
        return self._batches.per_epoch

    def digest(self) -> str:
        """Of places, prompts and shapes; not of the latents themselves."""
        return text_digest("".join(f"{r.file.name} {r.row_group} {r.row} {r.prompt} {r.shape}\n" for r in self._rows))

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """Batch `step` of process `rank` of `world`, on the device of the text encoders, in the stored dtype."""
        return self._read(self._batches.at(step * world + rank))

    def validation(self) -> Sequence[PairBatch]:
        """The pairs of the held-out prompts, in the order of the files, read each time they are asked for."""
        return BatchesInOrder(self._read, self._held_out, self._batch_size)

    def in_order(self) -> Sequence[PairBatch]:
        """All pairs, in the order of the files: a data set that is only evaluated on."""
        return BatchesInOrder(self._read, self._by_size, self._batch_size)

    def _read(self, rows: np.ndarray) -> PairBatch:
        wanted = [self._rows[row] for row in rows]
        latents = []
        for column in ("latent1", "latent2"):
            for row in wanted:
                name = f"{row.file}, row group {row.row_group}, row {row.row}, {column}"
                array = load_latent(self._read_group(row.file, row.row_group)[column][row.row].as_py(), name)
                if array.shape != row.shape:
                    raise ValueError(f"{name}: got {array.shape}; its shape is said to be {row.shape}")
                latents.append(torch.from_numpy(array))
        prompts = [row.prompt for row in wanted]
        conditions = Conditions(prompts, *self._encode_prompts(prompts))
        return PairBatch.plain(*torch.stack(latents).to(conditions.prompt_embeds.device).chunk(2), conditions)


def _read_group(file: Path, row_group: int) -> dict[str, object]:
    """latent1 and latent2 of a row group, decompressed."""
    parquet = parquet_module()
    with reading("parquet file", file):
        table = parquet.ParquetFile(file).read_row_group(row_group, columns=["latent1", "latent2"])
        return {name: table.column(name) for name in ("latent1", "latent2")}
