"""Measure how fast encoded pairs are read: the released way and ours, on the same data, on this machine.

    python examples/evidence/measure_loading.py  # latents of 1024 x 1024 images, 1 GB
    python examples/evidence/measure_loading.py --pairs 2000 --height 512 --width 512

The released way opens a parquet file for every pair and decodes the whole row group that holds it. It is compared with
the same parquet files, each row group decoded once (dinalrm_align/data/released_pairs.py), and with shards as
recipes/prepare_pairs.py writes them (dinalrm_align/data/latent_pairs.py), which also hold text embeddings, read on
demand and ahead. No GPU is used. Each way starts with the files out of the page cache where the system allows it.
MB / s counts what a training step receives: latents and, from shards, embeddings.
"""

import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dinalrm_align.data.batches import Prefetched
from dinalrm_align.data.formats.released import INDEX, LATENTS, load_latent
from dinalrm_align.data.formats.rows import parquet_module, row_group_starts
from dinalrm_align.data.latent_pairs import LatentPairs, LatentPairsWriter
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.data.released_pairs import ReleasedPairs
from dinalrm_align.eval.report.markdown import table
from dinalrm_align.train.command import parse, refusing
from dinalrm_align.train.files import write_atomically
from dinalrm_align.train.settings import NonNegativeInt, PositiveFloat, PositiveInt, check_fields

CHANNELS = 16
RELEASED_WAY = "released: a row group per pair"

Reading = Callable[[], Iterator[tuple[int, int]]]
"""Yields the number of pairs and of bytes read, a batch at a time."""


@dataclass
class LoadingRun:
    """Settings of `python examples/evidence/measure_loading.py`.

    Args:
        output_dir: folder of the data, written once in both layouts, and of loading.json.
        pairs: number of pairs.
        row_group: rows per parquet row group; the released data has about 100.
        height: of the images, in pixels.
        width: of the images, in pixels.
        text_tokens: length of a prompt's embeddings; SD3: 77 of the CLIP towers and 128 of T5.
        text_width: width of a prompt's embeddings.
        prompts: number of distinct prompts.
        batch_size: pairs per batch.
        prefetch: number of batches read ahead.
        seconds: longest time to measure each way; at most one epoch is read.
        seed: of the data and their order.
    """

    output_dir: str = "runs/measure_loading"
    pairs: PositiveInt = 300
    row_group: PositiveInt = 100
    height: PositiveInt = 1024
    width: PositiveInt = 1024
    text_tokens: PositiveInt = 205
    text_width: PositiveInt = 4096
    prompts: PositiveInt = 100
    batch_size: PositiveInt = 4
    prefetch: PositiveInt = 4
    seconds: PositiveFloat = 20.0
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("height", "width"):
            if vars(self)[name] % 16:
                raise ValueError(f"{name}: got {vars(self)[name]}; expected a multiple of 16")
        if self.pairs < self.batch_size:
            raise ValueError(f"pairs: got {self.pairs}; expected at least batch_size {self.batch_size}")


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


def main(argv: Sequence[str] | None = None) -> None:
    run, text = parse(LoadingRun, __doc__, argv)
    with refusing():
        measure(run, text)


def measure(run: LoadingRun, text: str) -> None:
    folder = Path(run.output_dir)
    settings, made = folder / "settings.yaml", folder / "data"
    if not settings.is_file() or settings.read_text(encoding="utf-8") != text:
        write_both_layouts(run, made)
        write_atomically(settings, text)
    rows = {}
    for name, way in ways_of_reading(run, made).items():
        for file in filter(Path.is_file, made.rglob("*")):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        pairs = size = 0
        with tqdm(desc=name, unit="pair") as bar:
            began = time.perf_counter()
            for count, nbytes in way():
                pairs, size = pairs + count, size + nbytes
                bar.update(count)
                if time.perf_counter() - began > run.seconds:
                    break
            seconds = time.perf_counter() - began
        rows[name] = dict(pairs=pairs, seconds=seconds, pairs_per_s=pairs / seconds, MB_per_s=size / 1e6 / seconds)
    slowest = rows[RELEASED_WAY]["pairs_per_s"]
    print(f"\n{run.pairs} pairs, {run.height} x {run.width}, row groups of {run.row_group}, {os.cpu_count()} cores\n")
    lines = []
    for name, row in rows.items():
        row["ratio"] = row["pairs_per_s"] / slowest
        speeds = f"{row['pairs_per_s']:.1f}", f"{row['MB_per_s']:.0f}", f"{row['ratio']:.1f}"
        lines.append([name, row["pairs"], *speeds])
    print(table(["way", "pairs measured", "pairs / s", "MB / s given", "times the released way"], lines))
    write_atomically(folder / "loading.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
