"""Loaders to compare: the same random latent pairs in the released layout and as shards, and ways of reading them."""

import csv
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinalrm_align.data.formats.parquet import parquet_module, row_group_starts
from dinalrm_align.data.formats.released import INDEX, LATENTS, load_latent
from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter
from dinalrm_align.data.loading_config import LoadingRun
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.data.prefetch import Prefetched
from dinalrm_align.data.released_pairs import ReleasedPairs

CHANNELS = 16
RELEASED_WAY = "released: a row group per pair"

Reading = Callable[[], Iterator[tuple[int, int]]]
"""Yields the number of pairs and of bytes read, a batch at a time."""


def write_both_layouts(run: LoadingRun, folder: Path) -> None:
    """Write folder/released (float32, zstd, as published) and folder/prepared (bfloat16, with text embeddings)."""
    import pyarrow

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "released").mkdir(parents=True)
    rng, shape = np.random.default_rng(run.seed), (CHANNELS, run.height // 8, run.width // 8)
    part = folder / "released" / "part_rank00.parquet"
    columns = dict(prompt=pyarrow.string(), detailed_results=pyarrow.string())
    columns |= dict.fromkeys(LATENTS, pyarrow.binary())
    columns |= dict.fromkeys((f"{name}_shape" for name in LATENTS), pyarrow.list_(pyarrow.int64()))
    schema, listed = pyarrow.schema(columns), []
    embeds = _embeds(run)
    with (
        parquet_module().ParquetWriter(part, schema, compression="zstd") as released,
        LatentPairsWriter(folder / "prepared", PairManifest(1.0, 0.0, run.text_tokens), shard_size=256) as prepared,
        tqdm(total=run.pairs, desc="data to measure on", unit="pair") as bar,
    ):
        for start in range(0, run.pairs, run.row_group):
            rows = []
            for number in range(start, min(start + run.row_group, run.pairs)):
                latents = rng.standard_normal((2, *shape), dtype=np.float32)
                prompt = f"prompt {number % run.prompts}"
                row = {"prompt": prompt, "detailed_results": "{'votes_chosen': 4, 'votes_rejected': 1}"}
                for name, latent in zip(LATENTS, latents, strict=True):
                    row |= {name: _npy(latent), f"{name}_shape": list(shape)}
                rows.append(row)
                images = torch.from_numpy(latents).bfloat16()
                prepared.add(prompt, images, prompt_embeds=embeds, pooled_prompt_embeds=embeds[0])
                listed.append((number, part.name, start // run.row_group, number - start, run.width, run.height, 0))
                bar.update()
            released.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    with open(folder / "released" / INDEX, "w", newline="", encoding="utf-8") as file:
        names = ("global_id", "parquet_path", "row_group", "row_index", "width", "height", "bucket_id")
        csv.writer(file).writerows([names, *listed])


def ways_of_reading(run: LoadingRun, folder: Path) -> dict[str, Reading]:
    """Name -> a way of reading one epoch of the data that `write_both_layouts` wrote."""
    embeds = _embeds(run)[None]
    encode = lambda prompts: (embeds.expand(len(prompts), -1, -1), embeds[0, :1].expand(len(prompts), -1))  # noqa: E731

    def row_group_per_pair() -> Iterator[tuple[int, int]]:
        parquet = parquet_module()
        (part,) = (folder / "released").glob("*.parquet")
        starts = row_group_starts(str(part))
        for number in torch.randperm(run.pairs, generator=torch.Generator().manual_seed(run.seed)).tolist():
            group = int(np.searchsorted(starts, number, side="right")) - 1
            table = parquet.ParquetFile(part).read_row_group(group, columns=["prompt", *LATENTS])
            row = table.slice(number - starts[group], 1).to_pylist()[0]
            yield 1, sum(load_latent(row[name], name).nbytes for name in LATENTS)

    def each_row_group_once() -> Iterator[tuple[int, int]]:
        manifest = PairManifest(1.0, 0.0, run.text_tokens)
        pairs = ReleasedPairs(
            folder / "released", encode_prompts=encode, manifest=manifest, batch_size=run.batch_size, seed=run.seed
        )
        for step in range(len(pairs)):
            batch = pairs.batch_at(step)
            yield batch.num_groups, batch.latents.nbytes

    def shards(ahead: int) -> Iterator[tuple[int, int]]:
        pairs = LatentPairs(folder / "prepared", batch_size=run.batch_size, seed=run.seed)
        with Prefetched(pairs.batch_at, ahead=ahead) as batch_at:
            for step in range(len(pairs)):
                batch: PairBatch = batch_at(step)
                tensors = (batch.latents, batch.conditions.prompt_embeds, batch.conditions.pooled_prompt_embeds)
                yield batch.num_groups, sum(tensor.nbytes for tensor in tensors)

    return {
        RELEASED_WAY: row_group_per_pair,
        "released, each row group once": each_row_group_once,
        "shards, on demand": lambda: shards(0),
        f"shards, {run.prefetch} batches ahead": lambda: shards(run.prefetch),
    }


def _embeds(run: LoadingRun) -> torch.Tensor:
    return torch.randn(run.text_tokens, run.text_width, generator=torch.Generator().manual_seed(run.seed)).bfloat16()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
