"""Preference pairs as parquet, latents and embeddings instead of pictures: the columns of verl-omni's offline DPO.

    manifest.json                 format, how latents and embeddings were made, settings of the mining, number of shards
    pairs/pairs-00000.parquet     one row a pair, one row a row group

A tensor column holds what `torch.save` writes of one sample's tensor, without a batch axis, in the manifest's dtype:

    img_win_latents, img_lose_latents (C, H, W)      clean and scaled, as the transformer sees them
    prompt_embeds (L, D), pooled_prompt_embeds (P,)  and prompt_embeds_mask (L,), int32, all ones: SD3 masks nothing
    negative_prompt_embeds, negative_pooled_prompt_embeds, negative_prompt_embeds_mask
                                                     the same of the empty prompt; null where it was not kept

Beside them: prompt and negative_prompt (chat messages of one user), win_score and lose_score (float64), uid,
data_source, reward_model, extra_info (raw_prompt, raw_negative_prompt, index of the prompt, num_candidates,
win_candidate, lose_candidate, candidate_scores), and img_win, img_lose, paths of pictures that verl-omni's reader asks
for and never opens: empty, for nothing was decoded. That reader (verl_omni/utils/dataset/offline_dpo_dataset.py) takes
`data.train_files=FOLDER/pairs`. Needs pyarrow, the extra `data`.
"""

import dataclasses
import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dinalrm_align.data.pairs import BatchesInOrder, PairBatch, PairManifest, ShuffledBatches, check_draws, held_out
from dinalrm_align.data.parquet import parquet_module
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.durable import write_atomically
from dinalrm_align.train.files import make_folder, read_json, reading

if TYPE_CHECKING:
    import pyarrow

FORMAT = "dinalrm_align.mined/1"
MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
READ = ("img_win_latents", "img_lose_latents", "prompt_embeds", "pooled_prompt_embeds")
TENSORS = (
    *READ, "prompt_embeds_mask", "negative_prompt_embeds", "negative_pooled_prompt_embeds",
    "negative_prompt_embeds_mask",
)  # fmt: skip
"""The columns that hold tensors; of those, the ones that `MinedPairs` reads."""


@dataclasses.dataclass(frozen=True)
class MinedPair:
    """One pair, of candidates of the prompt number `index`; tensors on any device, in any floating dtype.

    Args:
        prompt: text.
        index: of the prompt in its list.
        latents: (n, C, H, W) of its n candidates, scaled and clean.
        scores: of the n candidates, higher is better.
        chosen, rejected: which two of them.
        prompt_embeds, pooled_prompt_embeds: (L, D), (P,).
        negative: the empty prompt's (L, D), (P,); None: not kept.
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


def write_shard(path: Path, pairs: Sequence[MinedPair], *, dtype: str, source: str = "dinalrm_align") -> None:
    """Write one parquet file, whole or not at all; without pairs it has the columns and no rows.

    dtype: of the tensors, a name of DTYPES. source: for the column data_source. The same pairs give the same bytes.
    Raises ValueError for a number that is not finite, or is not in this dtype; OSError when it cannot be written.
    """
    parquet, rows = parquet_module(), [_row(pair, DTYPES[dtype], source) for pair in pairs]
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_pylist(rows, schema=_schema())
    parquet.write_table(table, sink, row_group_size=1, compression="none")
    write_atomically(path, sink.getvalue().to_pybytes())


def write_manifest(folder: Path, manifest: PairManifest, *, shards: int, mining: Mapping[str, Any]) -> None:
    """Begin a set of mined pairs, or go on with one. mining: its settings and digests, JSON, for the next start.

    Raises ValueError when the folder holds a set with other settings; FileExistsError when it holds something else.
    """
    path = folder / MANIFEST
    content = {"format": FORMAT, "manifest": dataclasses.asdict(manifest), "shards": shards, "mining": dict(mining)}
    content = json.loads(json.dumps(content))
    if path.is_file():
        there = read_json(path)
        if there != content:
            before, now = ({**of.get("mining", {}), **of} for of in (there, content))
            names = [name for name in {**before, **now} if before.get(name) != now.get(name) and name != "mining"]
            raise ValueError(
                f"{folder} holds pairs that were mined otherwise: {names[0]}: got {now.get(names[0])!r:.80}, there "
                f"{before.get(names[0])!r:.80}; go on with the same settings, or choose another folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files and no {MANIFEST}; write to a new folder")
    make_folder(folder)
    write_atomically(path, json.dumps(content, indent=1))


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` of a set of mined pairs lies."""
    return folder / "pairs" / f"pairs-{number:05d}.parquet"


class MinedPairs:
    """A PairSource over mined pairs.

    Args:
        path: a folder that `recipes/mine_pairs.py` filled; or one parquet file of these columns, as verl-omni writes
            them.
        batch_size: pairs a batch.
        seed: of the shuffle.
        held_out_prompts: distinct prompts kept from training for `validation`.
        manifest: how the latents and embeddings of a single file were made, which it does not say itself.

    Raises ValueError or FileNotFoundError for what cannot be read, is not whole, or holds no pairs.
    """

    reads_files_only = True

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        seed: int = 0,
        held_out_prompts: int = 0,
        manifest: PairManifest | None = None,
    ) -> None:
        check_draws(batch_size, seed, held_out_prompts)
        self.path = Path(path)
        self.manifest, files = _find(self.path, manifest)
        self._rows: list[tuple[Path, int, int]] = []
        self.prompts: list[str] = []
        self.scores: list[tuple[float, float]] = []
        for file in files:
            self._index(file)
        if not self._rows:
            raise ValueError(f"{self.path} holds no pairs: none passed the filter; mine with a smaller --mine.min_gap")
        self._batch_size, self._seed = batch_size, seed
        keep_out = held_out(self.prompts, held_out_prompts)
        is_out = np.array([prompt in keep_out for prompt in self.prompts])
        self._held_out, self._trained = np.flatnonzero(is_out), [np.flatnonzero(~is_out)]

    @functools.cached_property
    def _batches(self) -> ShuffledBatches:
        """Made when training asks: a data set that is only evaluated on may be smaller than a batch."""
        return ShuffledBatches(self._trained, self._batch_size, self._seed)

    def __len__(self) -> int:
        """Batches in an epoch, all processes together."""
        return self._batches.per_epoch

    def digest(self) -> str:
        """Of prompts and scores; not of the latents themselves, which are large."""
        return text_digest(json.dumps([dataclasses.asdict(self.manifest), self.prompts, self.scores]))

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """Batch `step` of process `rank` of `world`, on the CPU, in the stored dtype."""
        return self._read(self._batches.at(step * world + rank))

    def validation(self) -> Sequence[PairBatch]:
        """The pairs of the held-out prompts, in the order of the files, read each time they are asked for."""
        return BatchesInOrder(self._read, [self._held_out], self._batch_size)

    def in_order(self) -> Sequence[PairBatch]:
        """All pairs, in the order of the files: a data set that is only evaluated on."""
        return BatchesInOrder(self._read, [np.arange(len(self._rows))], self._batch_size)

    def _index(self, path: Path) -> None:
        """Note where each row of a file lies, its prompt and scores."""
        parquet = parquet_module()
        with reading("parquet file of pairs", path):
            file = parquet.ParquetFile(path)
            missing = sorted({*READ, "prompt", "win_score", "lose_score"} - set(file.schema_arrow.names))
            if missing:
                raise ValueError(f"it lacks the columns {', '.join(missing)}")
            named = ["prompt", "extra_info"] if "extra_info" in file.schema_arrow.names else ["prompt"]
            for group in range(file.num_row_groups):
                records = file.read_row_group(group, columns=[*named, "win_score", "lose_score"]).to_pylist()
                self._rows += [(path, group, offset) for offset in range(len(records))]
                self.prompts += [_prompt_of(record) for record in records]
                self.scores += [(float(record["win_score"]), float(record["lose_score"])) for record in records]

    def _read(self, rows: np.ndarray) -> PairBatch:
        columns = [self._read_row(*self._rows[row]) for row in rows]
        shapes = {tuple(tensor.shape for tensor in column) for column in columns}
        if len(shapes) != 1:
            raise ValueError(f"{self.path}: pairs of a batch have tensors of shapes {sorted(shapes)[:2]}; expected one")
        chosen, rejected, embeds, pooled = (torch.stack(tensors) for tensors in zip(*columns, strict=True))
        conditions = Conditions([self.prompts[row] for row in rows], embeds, pooled)
        return PairBatch.plain(chosen, rejected, conditions)

    def _read_row(self, path: Path, group: int, offset: int) -> list[Tensor]:
        parquet = parquet_module()
        with reading("parquet file of pairs", path):
            file = parquet.ParquetFile(path)
            (row,) = file.read_row_group(group, columns=list(READ)).slice(offset, 1).to_pylist()
            return [_tensor(row[name], name) for name in READ]


def _find(path: Path, manifest: PairManifest | None) -> tuple[PairManifest, list[Path]]:
    """The manifest and the files of `path`, all there."""
    if path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"no parquet file {path}")
        if manifest is None:
            raise ValueError(f"{path} does not say how its latents were made: pass manifest=PairManifest(...)")
        return manifest, [path]
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"{path} holds no {MANIFEST}: not a folder of mined pairs")
    content = read_json(path / MANIFEST)
    if content.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST}: format {content.get('format')!r:.80}; this version reads {FORMAT!r}")
    try:
        files = [shard_path(path, number) for number in range(content["shards"])]
        found = PairManifest.of(content["manifest"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST}: not that of mined pairs ({type(error).__name__}: {error})") from error
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path} lacks {len(missing)} of {len(files)} shards, first {missing[0].name}: the mining was interrupted; "
            "go on by starting recipes/mine_pairs.py again with the same settings"
        )
    return found, files


def _schema() -> "pyarrow.Schema":
    import pyarrow as pa

    text, blob, messages = (
        pa.string(),
        pa.large_binary(),
        pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
    )
    return pa.schema(
        {
            "uid": text,
            "data_source": text,
            "prompt": messages,
            "negative_prompt": messages,
            "img_win": text,
            "img_lose": text,
            **dict.fromkeys(TENSORS, blob),
            "win_score": pa.float64(),
            "lose_score": pa.float64(),
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct(
                {
                    "raw_prompt": text,
                    "raw_negative_prompt": text,
                    "index": pa.int64(),
                    "num_candidates": pa.int64(),
                    "win_candidate": pa.int64(),
                    "lose_candidate": pa.int64(),
                    "candidate_scores": pa.list_(pa.float64()),
                }
            ),
        }
    )


def _row(pair: MinedPair, dtype: torch.dtype, source: str) -> dict[str, Any]:
    embeds, pooled = pair.negative or (None, None)
    tensors = {
        "img_win_latents": pair.latents[pair.chosen],
        "img_lose_latents": pair.latents[pair.rejected],
        "prompt_embeds": pair.prompt_embeds,
        "pooled_prompt_embeds": pair.pooled_prompt_embeds,
        "negative_prompt_embeds": embeds,
        "negative_pooled_prompt_embeds": pooled,
    }
    masks = {f"{name}_mask": tensors[name] for name in ("prompt_embeds", "negative_prompt_embeds")}
    return {
        "uid": f"{pair.index:06d}-{pair.chosen:03d}-{pair.rejected:03d}",
        "data_source": source,
        "prompt": [{"role": "user", "content": pair.prompt}],
        "negative_prompt": [{"role": "user", "content": ""}],
        "img_win": "",
        "img_lose": "",
        **{name: None if tensor is None else _blob(tensor, name, dtype) for name, tensor in tensors.items()},
        **{
            name: None if like is None else _saved(torch.ones(len(like), dtype=torch.int32))
            for name, like in masks.items()
        },
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
        raise ValueError(f"{name}: NaN, infinite or too large for {dtype}; store in another --mine.dtype")
    return _saved(stored)


def _saved(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)  # a view would be saved with all of its storage
    return buffer.getvalue()


def _tensor(data: Any, name: str) -> Tensor:
    if not isinstance(data, bytes):
        raise ValueError(f"{name}: got {type(data).__name__}; expected the bytes of torch.save")
    tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: got a saved {type(tensor).__name__}; expected a tensor")
    return tensor


def _prompt_of(record: Mapping[str, Any]) -> str:
    """The prompt as text: what extra_info says, else what the user says in the chat."""
    told = (record.get("extra_info") or {}).get("raw_prompt")
    if isinstance(told, str) and told:
        return told
    messages = record["prompt"]
    if isinstance(messages, str):
        return messages
    return "\n".join(message["content"] for message in messages if message["role"] == "user")
