"""Image pairs in published layouts, and their preparation with stand-in encoders."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import torch
from PIL import Image
from pyarrow import parquet

from dinalrm_align.data.config import FilterConfig, PrepareRun
from dinalrm_align.data.pairs import PairManifest
from dinalrm_align.data.prepare import Preparation
from dinalrm_align.data.workers import worker_processes
from dinalrm_align.models.latent_space import LatentSpace

MANIFEST = PairManifest(1.0, 0.0, 3)
SPACE = LatentSpace(channels=2, patch=2, max_side=64)


def encode_images(images):
    """Latents whose every value is the image's mean."""
    means = images.mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)
    return means.expand(-1, 2, images.shape[2] // 8, images.shape[3] // 8)


def encode_prompts(prompts):
    """Embeddings whose every value is the prompt's number, `prompt 7`."""
    numbers = torch.tensor([float(prompt.split()[-1]) for prompt in prompts])
    return numbers.view(-1, 1, 1).expand(-1, 3, 5), numbers.view(-1, 1).expand(-1, 4)


def write_image(path, value, size=(64, 64), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path, kind)


def hpdv3(folder, pairs=12, per_prompt=2):
    """train.json of `pairs` pairs: images of 4 p + 100 (chosen) and 4 p (rejected) of 255."""
    records = []
    for number in range(pairs):
        names = [f"images/{number}_{side}.png" for side in "cr"]
        for name, value in zip(names, (4 * number + 100, 4 * number)):
            write_image(folder / name, value)
        about = {"prompt": f"prompt {number // per_prompt}", "confidence": 0.9 if number % 2 else None}
        records.append(about | {"path1": names[0], "path2": names[1], "choice_dist": [9, number], "model1": "a"})
    (folder / "train.json").write_text(json.dumps(records))
    return folder / "train.json"


def settings(source, folder, **changes):
    small = dict(buckets="64x64,32x64,64x32", shard_size=6, prompts_per_shard=2, batch_size=4, workers=0)
    filters = {"min_pixels": 0, **changes.pop("filter", {})}
    values = {**small, **changes, "filter": FilterConfig(**filters)}
    return PrepareRun(source=str(source), output_dir=str(folder), **values)


def prepare(source, folder, *, rank=0, world=1, stop_after=None, encode=encode_images, text=encode_prompts, **changes):
    """The recipe's stages. stop_after: raises KeyboardInterrupt after this number of encoded batches."""
    calls = []

    def counted(images):
        calls.append(len(images))
        if stop_after is not None and len(calls) > stop_after:
            raise KeyboardInterrupt
        return encode(images)

    run = settings(source, folder, **changes)
    with worker_processes(run.workers) as in_order:
        work = Preparation(run, Path(folder), MANIFEST, in_order=in_order, rank=rank, world=world)
        work.measure()
        work.plan(SPACE)
        work.encode_text(text)
        work.encode_latents(counted)
        if world == 1:
            work.finish()
    return work, calls


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def values_of(pairs):
    """(prompt, chosen, rejected) of every pair, images by their mean times 255."""
    found = []
    for batch in pairs.in_order():
        means = (255 * batch.latents.float().mean(dim=(1, 2, 3))).round()
        prompt = batch.conditions.prompt_embeds.float()[:, 0, 0]
        found += zip(prompt[batch.chosen].tolist(), means[batch.chosen].tolist(), means[batch.rejected].tolist())
    return sorted(found)


def pickapic(folder):
    """Four rows: the second preferred, a tie, one without label, the first preferred; row groups of two."""
    rows = []
    for number, (labels, has_label) in enumerate([((0, 1), True), ((0.5, 0.5), True), ((1, 0), False), ((1, 0), True)]):
        row = {"caption": f"prompt {number}", "has_label": has_label, "are_different": True}
        for side in (0, 1):
            file = io.BytesIO()
            Image.new("RGB", (64, 64), (20 * number + 100 * side,) * 3).save(file, "JPEG")
            row |= {f"jpg_{side}": file.getvalue(), f"label_{side}": float(labels[side])}
        rows.append(row)
    folder.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000.parquet", row_group_size=2)
    return folder


def _white(value):
    return torch.from_numpy(np.full((1, 3, 64, 64), value / 255, dtype=np.float32))
