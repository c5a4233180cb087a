"""Measure how fast encoded pairs are read: the released way and ours, on the same data, on this machine.

    python recipes/measure_loading.py                                      # latents of 1024 x 1024 images, 1 GB
    python recipes/measure_loading.py --pairs 2000 --height 512 --width 512

The released way opens a parquet file for every pair and decodes the whole row group that holds it. It is compared with
the same parquet files, each row group decoded once (dinalrm_align/data/released_pairs.py), and with shards as
recipes/prepare_pairs.py writes them (dinalrm_align/data/latent_pairs.py), which also hold text embeddings, read on
demand and ahead. No GPU is used. Each way starts with the files out of the page cache where the system allows it.
MB / s counts what a training step receives: latents and, from shards, embeddings.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dinalrm_align.data.loading_config import LoadingRun
from dinalrm_align.train.command import parse, refusing


def main(argv: Sequence[str] | None = None) -> None:
    run, text = parse(LoadingRun, __doc__, argv)
    with refusing():
        measure(run, text)


def measure(run: LoadingRun, text: str) -> None:
    import os

    from tqdm import tqdm

    from dinalrm_align.data.loading import RELEASED_WAY, ways_of_reading, write_both_layouts
    from dinalrm_align.train.durable import write_atomically

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
    print("| way | pairs measured | pairs / s | MB / s given | times the released way |\n|---|---:|---:|---:|---:|")
    for name, row in rows.items():
        row["ratio"] = row["pairs_per_s"] / slowest
        print(f"| {name} | {row['pairs']} | {row['pairs_per_s']:.1f} | {row['MB_per_s']:.0f} | {row['ratio']:.1f} |")
    write_atomically(folder / "loading.json", json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
