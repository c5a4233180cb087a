"""Latent pairs of random numbers, the same in the released layout and as shards: what loaders are measured on."""

import csv
import io
import shutil
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinalrm_align.data.formats.parquet import parquet_module
from dinalrm_align.data.formats.released import INDEX
from dinalrm_align.data.latent_pairs import LatentPairsWriter
from dinalrm_align.data.loading_config import LoadingRun
from dinalrm_align.data.pairs import PairManifest

CHANNELS = 16


def write_both_layouts(run: LoadingRun, folder: Path) -> None:
    """Write folder/released (float32, zstd, as published) and folder/prepared (bfloat16, with text embeddings)."""
    import pyarrow

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "released").mkdir(parents=True)
    rng, shape = np.random.default_rng(run.seed), (CHANNELS, run.height // 8, run.width // 8)
    part = folder / "released" / "part_rank00.parquet"
    names = dict(prompt=pyarrow.string(), detailed_results=pyarrow.string())
    names |= dict(latent1=pyarrow.binary(), latent2=pyarrow.binary())
    names |= dict.fromkeys(("latent1_shape", "latent2_shape"), pyarrow.list_(pyarrow.int64()))
    listed = []
    embeds = torch.randn(run.text_tokens, run.text_width, generator=torch.Generator().manual_seed(run.seed)).bfloat16()
    with (
        parquet_module().ParquetWriter(part, pyarrow.schema(names), compression="zstd") as released,
        LatentPairsWriter(folder / "prepared", PairManifest(1.0, 0.0, run.text_tokens), shard_size=256) as prepared,
        tqdm(total=run.pairs, desc="data to measure on", unit="pair") as bar,
    ):
        for start in range(0, run.pairs, run.row_group):
            rows = []
            for number in range(start, min(start + run.row_group, run.pairs)):
                latents = rng.standard_normal((2, *shape), dtype=np.float32)
                prompt = f"prompt {number % run.prompts}"
                rows.append(
                    {"prompt": prompt, "detailed_results": "{'votes_chosen': 4, 'votes_rejected': 1}"}
                    | {f"latent{index + 1}": _npy(latent) for index, latent in enumerate(latents)}
                    | dict.fromkeys(("latent1_shape", "latent2_shape"), list(shape))
                )
                prepared.add(
                    prompt, torch.from_numpy(latents).bfloat16(), prompt_embeds=embeds, pooled_prompt_embeds=embeds[0]
                )
                group, row = number // run.row_group, number % run.row_group
                listed.append((number, part.name, group, row, run.width, run.height, 0))
                bar.update()
            released.write_table(pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(names)))
    with open(folder / "released" / INDEX, "w", newline="", encoding="utf-8") as file:
        columns = ("global_id", "parquet_path", "row_group", "row_index", "width", "height", "bucket_id")
        csv.writer(file).writerows([columns, *listed])


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
