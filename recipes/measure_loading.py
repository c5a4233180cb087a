"""How fast are encoded pairs read? The released way and ours, on the same data, on this machine.

    python recipes/measure_loading.py                                      # latents of 1024 x 1024 pictures, 1 GB
    python recipes/measure_loading.py --pairs 2000 --height 512 --width 512

Released way: for every pair, open its parquet file and decode the whole row group that it lies in. Against it: the
same parquet files, each row group decoded once (dinalrm_align/data/released_pairs.py); and shards as
recipes/prepare_pairs.py writes them (dinalrm_align/data/latent_pairs.py), which hold text embeddings besides, read as
they are asked for and read ahead. No GPU is used. Each way begins with the files out of the page cache where the system
allows that. MB / s: of what a training step gets; latents, and of shards the embeddings too.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dinalrm_align.data.loading_config import LoadingRun
from dinalrm_align.train.command import parse, refusing


def main(argv: Sequence[str] | None = None) -> None:
    run, text = parse(LoadingRun, __doc__, argv)
    with refusing():
        measure(run, text)


def measure(run: LoadingRun, text: str) -> None:
    import os

    import torch
    from tqdm import tqdm

    from dinalrm_align.data.formats.parquet import parquet_module
    from dinalrm_align.data.formats.released import LATENTS, load_latent
    from dinalrm_align.data.latent_pairs import LatentPairs
    from dinalrm_align.data.prefetch import Prefetched
    from dinalrm_align.data.released_pairs import ReleasedPairs
    from dinalrm_align.data.synthetic import write_both_layouts
    from dinalrm_align.train.durable import write_atomically

    parquet, folder = parquet_module(), Path(run.output_dir)
    settings, made = folder / "settings.yaml", folder / "data"
    if not settings.is_file() or settings.read_text(encoding="utf-8") != text:
        write_both_layouts(run, made)
        write_atomically(settings, text)
    parts = sorted((made / "released").glob("*.parquet"))
    places = [
        (part, group, row)
        for part in parts
        for group in range(parquet.ParquetFile(part).num_row_groups)
        for row in range(parquet.ParquetFile(part).metadata.row_group(group).num_rows)
    ]
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(run.seed)).tolist()
    embeds = torch.zeros(1, run.text_tokens, run.text_width, dtype=torch.bfloat16)
    at_hand = lambda prompts: (embeds.expand(len(prompts), -1, -1), embeds[0, :1].expand(len(prompts), -1))  # noqa: E731

    def released_way() -> Iterator[tuple[int, int]]:
        for number in order:
            part, group, row = places[number]
            found = (
                parquet.ParquetFile(part)
                .read_row_group(group, columns=["prompt", *LATENTS])
                .slice(row, 1)
                .to_pylist()[0]
            )
            pair = [load_latent(found[name], name) for name in LATENTS]
            yield 1, sum(latent.nbytes for latent in pair)

    def batches(batch_at: Callable, count: int, *, text: bool) -> Iterator[tuple[int, int]]:
        for step in range(count):
            batch = batch_at(step)
            stored = [batch.conditions.prompt_embeds, batch.conditions.pooled_prompt_embeds] if text else []
            yield batch.num_groups, sum(tensor.nbytes for tensor in [batch.latents, *stored])

    def decoded_once() -> Iterator[tuple[int, int]]:
        manifest = LatentPairs(made / "prepared", batch_size=run.batch_size).manifest
        pairs = ReleasedPairs(
            made / "released", encode_prompts=at_hand, manifest=manifest, batch_size=run.batch_size, seed=run.seed
        )
        yield from batches(pairs.batch_at, len(pairs), text=False)

    def shards(ahead: int) -> Iterator[tuple[int, int]]:
        pairs = LatentPairs(made / "prepared", batch_size=run.batch_size, seed=run.seed)
        with Prefetched(pairs.batch_at, ahead=ahead) as batch_at:
            yield from batches(batch_at, len(pairs), text=True)

    ways = {
        "released: a row group per pair": released_way,
        "released, each row group once": decoded_once,
        "shards, as asked for": lambda: shards(0),
        f"shards, {run.prefetch} batches ahead": lambda: shards(run.prefetch),
    }
    rows = {}
    for name, way in ways.items():
        for file in made.rglob("*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)
        pairs = size = 0
        with tqdm(desc=name, unit="pair") as bar:
            began = time.perf_counter()
            for count, nbytes in way():
                pairs, size = pairs + count, size + nbytes
                bar.update(count)
                if time.perf_counter() - began > run.seconds:
                    break
            seconds = time.perf_counter() - began
        rows[name] = {
            "pairs": pairs,
            "seconds": seconds,
            "pairs_per_s": pairs / seconds,
            "MB_per_s": size / 1e6 / seconds,
        }
    slowest = rows["released: a row group per pair"]["pairs_per_s"]
    print(f"\n{run.pairs} pairs, {run.height} x {run.width}, row groups of {run.row_group}, {os.cpu_count()} cores\n")
    print("| way | pairs measured | pairs / s | MB / s given | times the released way |\n|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        row["ratio"] = row["pairs_per_s"] / slowest
        print(f"| {name} | {row['pairs']} | {row['pairs_per_s']:.1f} | {row['MB_per_s']:.0f} | {row['ratio']:.1f} |")
    write_atomically(folder / "loading.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
