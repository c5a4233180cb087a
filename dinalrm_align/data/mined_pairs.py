"""Write and read mined pairs, in the files that `formats.mined` describes. Needs pyarrow (extra `data`)."""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.data.batches import BatchOrder, PairSource
from dinalrm_align.data.formats.mined import FORMAT, LATENTS, MANIFEST, TEXT, read_manifest, shard_files
from dinalrm_align.data.formats.record import Cell
from dinalrm_align.data.formats.rows import parquet_module
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.checkpoints import serialised
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import InputError, begin_or_resume, reading, write_atomically

_TEXT = (*TEXT, "prompt_embeds_mask")
TENSORS = (*LATENTS, *_TEXT, *(f"negative_{name}" for name in _TEXT))
"""Parquet columns that hold tensors."""


@dataclasses.dataclass(frozen=True)
class MinedPair:
    """Chosen and rejected image among n images of one prompt. Tensors may have any device and floating dtype.

    index: index of the prompt. latents: (n, C, H, W), without noise, scaled. scores: rewards of the n images.
    chosen, rejected: indices in `latents` of the pair's images. prompt_embeds: (L, D). pooled_prompt_embeds: (P,).
    negative: (prompt_embeds, pooled_prompt_embeds) of the empty prompt; None if not stored.
    """

    prompt: str
    index: int
    latents: Tensor
    scores: Sequence[float]
    chosen: int
    rejected: int
    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor
    negative: tuple[Tensor, Tensor] | None = None


def write_shard(path: Path, pairs: Sequence[MinedPair], *, dtype: str) -> None:
    """Write pairs to a parquet file, atomically. Equal pairs give byte-identical files.

    dtype: stored dtype, float32, float16 or bfloat16. Raises ValueError for values that are NaN or infinite in `dtype`.
    """
    parquet, rows = parquet_module(), [_row(pair, getattr(torch, dtype)) for pair in pairs]
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows, schema=_schema())
    parquet.write_table(table, sink, row_group_size=1, compression="none")
    write_atomically(path, sink.getvalue().to_pybytes())


def write_manifest(folder: Path, manifest: PairManifest, *, shards: int, mining: Mapping[str, Any]) -> None:
    """Write manifest.json. Raises ValueError if it exists with other settings. mining: dict of mining settings."""
    settings = {"format": FORMAT, "manifest": dataclasses.asdict(manifest), "shards": shards, "mining": dict(mining)}
    begin_or_resume(folder, MANIFEST, settings)


class MinedPairs(PairSource):
    """`PairSource` that reads a folder written by `recipes/mine_pairs.py`, or one parquet file written by verl-omni.

    manifest: how the pairs were encoded. Required for a parquet file; ignored for a folder, which has a manifest.json.
    Raises ValueError or FileNotFoundError for files that are unreadable, missing or without pairs.
    """

    def __init__(self, path: str | Path, *, manifest: PairManifest | None = None, **order: Unpack[BatchOrder]) -> None:
        super().__init__(**order)
        self.path = Path(path)
        shard_files(self.path)
        self.manifest = manifest if self.path.suffix == ".parquet" else self._read_manifest()
        if self.manifest is None:
            raise InputError(f"{self.path} does not record how its latents were made: pass manifest=")
        self._pairs = self._find_pairs(self.path, "mined")
        self.prompts = [pair.prompt for pair in self._pairs]
        self.scores = [pair.scores.get("score") for pair in self._pairs]
        self._arrange(self.prompts)

    def _read_manifest(self) -> PairManifest:
        try:
            return PairManifest.of(read_manifest(self.path)["manifest"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{self.path / MANIFEST}: invalid manifest ({type(error).__name__}: {error})") from error

    def digest(self) -> str:
        return text_digest(json.dumps([dataclasses.asdict(self.manifest), self.prompts, self.scores]))

    def _where(self, unit: int) -> str:
        return str(self._pairs[unit].chosen)

    def _load(self, unit: int) -> list[Tensor]:
        chosen, rejected, *text = self._read_row(self._pairs[unit].chosen)
        problem = None if self._space is None or chosen.dim() != 3 else self._space.problem(chosen.shape)
        if chosen.shape != rejected.shape:
            problem = f"latents: got shapes {tuple(chosen.shape)} and {tuple(rejected.shape)}; expected equal ones"
        if problem:
            raise InputError(f"{self._where(unit)}: {problem}")
        return [torch.stack([chosen, rejected]), *(tensor[None] for tensor in text)]

    def _collate(self, units: np.ndarray, items: Sequence[Sequence[Tensor]]) -> PairBatch:
        shapes = {tuple(tensor.shape for tensor in item) for item in items}
        if len(shapes) != 1:
            raise InputError(f"{self.path}: pairs of a batch have tensors of shapes {sorted(shapes)[:2]}; expected one")
        latents, embeds, pooled = zip(*items, strict=True)
        conditions = Conditions([self.prompts[unit] for unit in units], torch.cat(embeds), torch.cat(pooled))
        return PairBatch.plain(*torch.stack(latents, dim=1), conditions)

    def _read_row(self, cell: Cell) -> list[Tensor]:
        parquet, columns = parquet_module(), [*LATENTS, *TEXT]
        with reading("parquet file of pairs", f"{cell.file}, row group {cell.row_group}, row {cell.row}"):
            group = parquet.ParquetFile(cell.file).read_row_group(cell.row_group, columns=columns)
            (row,) = group.slice(cell.row, 1).to_pylist()
            return [_tensor(row[name], name) for name in columns]


def _schema() -> Any:
    import pyarrow as pa

    text = pa.string()
    extra = dict.fromkeys(("raw_prompt", "raw_negative_prompt"), text)
    extra |= dict.fromkeys(("index", "num_candidates", "win_candidate", "lose_candidate"), pa.int64())
    extra |= {"candidate_scores": pa.list_(pa.float64())}
    columns = dict.fromkeys(("uid", "data_source"), text)
    columns |= dict.fromkeys(("prompt", "negative_prompt"), pa.list_(pa.struct({"role": text, "content": text})))
    columns |= dict.fromkeys(("img_win", "img_lose"), text) | dict.fromkeys(TENSORS, pa.large_binary())
    columns |= dict.fromkeys(("win_score", "lose_score"), pa.float64())
    columns |= {"reward_model": pa.struct({"style": text, "ground_truth": text}), "extra_info": pa.struct(extra)}
    return pa.schema(columns)


def _row(pair: MinedPair, dtype: torch.dtype) -> dict[str, Any]:
    embeds, pooled = pair.negative or (None, None)
    latents = pair.latents[pair.chosen], pair.latents[pair.rejected]
    tensors = dict(zip((*LATENTS, *TEXT), (*latents, pair.prompt_embeds, pair.pooled_prompt_embeds), strict=True))
    tensors |= {"negative_prompt_embeds": embeds, "negative_pooled_prompt_embeds": pooled}
    masks = {
        f"{name}_mask": None if tensors[name] is None else serialised(torch.ones(len(tensors[name]), dtype=torch.int32))
        for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    return {
        "uid": f"{pair.index:06d}-{pair.chosen:03d}-{pair.rejected:03d}",
        "data_source": "dinalrm_align",
        "prompt": [{"role": "user", "content": pair.prompt}],
        "negative_prompt": [{"role": "user", "content": ""}],
        "img_win": "",
        "img_lose": "",
        **{name: None if tensor is None else _blob(tensor, name, dtype) for name, tensor in tensors.items()},
        **masks,
        "win_score": pair.scores[pair.chosen],
        "lose_score": pair.scores[pair.rejected],
        "reward_model": {"style": "model", "ground_truth": pair.prompt},
        "extra_info": {
            "raw_prompt": pair.prompt,
            "raw_negative_prompt": "",
            "index": pair.index,
            "num_candidates": len(pair.scores),
            "win_candidate": pair.chosen,
            "lose_candidate": pair.rejected,
            "candidate_scores": list(pair.scores),
        },
    }


def _blob(tensor: Tensor, name: str, dtype: torch.dtype) -> bytes:
    stored = tensor.detach().to("cpu", dtype)
    if not bool(stored.isfinite().all()):
        raise InputError(f"{name}: got NaN, infinite values or values too large for {dtype}; use another --mine.dtype")
    return serialised(stored.clone())  # a view would be saved with its whole storage


def _tensor(data: Any, name: str) -> Tensor:
    if not isinstance(data, bytes):
        raise InputError(f"{name}: got {type(data).__name__}; expected the bytes of torch.save")
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"{name}: got a saved {type(tensor).__name__}; expected a dense tensor with data")
    return tensor
