"""Encode preference pairs of images into a directory for `LatentPairs`. A stopped run resumes on any number of ranks.

In addition to the files listed in `data.latent_pairs`, the directory holds

    prepared.json             hash of the source, and the settings; a resumed run must match both
    parts/sizes-00000.json    (height, width) of each image of the source, or a message if it cannot be read
    parts/text-00000.json     record of the shard text-00000.safetensors: hash, size in bytes, prompts that failed
    parts/latents-00000.json  record of the shard latents-00000.safetensors: hash, size in bytes, images that failed
    summary.json              counts of what was read, stored and left out

Each shard is written atomically, before its record. A resumed run does not write a shard again if the shard matches
its record. The content of a shard depends only on the source, the settings and the number of the shard, so any rank can
write it. index.json is written last, when all shards exist.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dinalrm_align.data.config import PrepareRun
from dinalrm_align.data.formats import find_layout, read_preferences
from dinalrm_align.data.formats.record import ImageRef, Preference
from dinalrm_align.data.formats.rows import image_source
from dinalrm_align.data.pairs import EncodeImages, EncodePrompts, PairManifest
from dinalrm_align.data.plan import Dropped, Size, filter_pairs, plan_groups, plan_shards
from dinalrm_align.data.shards import write_if_changed, write_tables
from dinalrm_align.data.workers import InOrder, attempt, sized_latent
from dinalrm_align.models.images import image_size, resized_image
from dinalrm_align.models.latent_space import LatentSpace
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import TEMPORARY, begin_or_resume, file_digest, read_json, write_atomically

SETTINGS = (
    "text_length", "buckets", "group", "label", "filter", "max_pairs", "shard_size", "prompts_per_shard", "seed",
)  # fmt: skip
SIZES = 4096
"""Images per file parts/sizes-*.json."""


class Preparation:
    """One rank's share of encoding the pairs of `run.source` into `folder`.

    All ranks must call `measure`, `plan`, `encode_text` and `encode_latents`, with a barrier after each call. One rank
    must then call `finish`. manifest: encoding settings. in_order: function that `workers.worker_processes` yields.
    Raises ValueError or OSError if the source is unreadable, or if `folder` holds other files or other settings.
    """

    def __init__(
        self, run: PrepareRun, folder: Path, manifest: PairManifest, *, in_order: InOrder, rank: int = 0, world: int = 1
    ) -> None:
        self.run, self.folder, self.manifest = run, folder, manifest
        self.rank, self.world, self._in_order = rank, world, in_order
        self.source = Path(run.source)
        if not self.source.exists():
            raise FileNotFoundError(f"source: no file or folder {self.source}; expected one such as HPDv3/train.json")
        self.layout = find_layout(self.source) if run.layout == "auto" else run.layout
        if self.layout in ("latents", "mined"):
            raise ValueError(f"source: {self.source} holds encoded pairs ({self.layout}); expected images")
        self.images = Path(run.images) if run.images else self.source if self.source.is_dir() else self.source.parent
        self.dropped = Dropped(run.on_bad)
        pairs = read_preferences(self.source, self.layout, self.dropped.bad)
        every = [pair.preferred_first() for pair in itertools.islice(pairs, run.max_pairs)]
        self.read = len(every)
        self.pairs = filter_pairs(every, run.filter, self.dropped)
        self.refs = list(dict.fromkeys(image for pair in self.pairs for image in (pair.chosen, pair.rejected)))
        if rank == 0:
            begin_or_resume(folder, "prepared.json", self._settings())

    def _settings(self) -> dict[str, Any]:
        if self.source.is_dir():
            files = sorted([*self.source.glob("*.parquet"), *self.source.glob("*.csv")])
            source = text_digest("".join(f"{file.name} {file.stat().st_size}\n" for file in files))
        else:
            source = file_digest(self.source)
        *format, samples = dataclasses.asdict(self.manifest).values()
        return {
            "format": "dinalrm_align.prepared/1",
            "layout": self.layout,
            "source": source,
            "encoded with": {name: sample["values"] for name, sample in samples.items()},
            "scaling, shift, text length": format,
            **{name: value for name, value in dataclasses.asdict(self.run).items() if name in SETTINGS},
        }

    def measure(self) -> None:
        """Write the sizes of this rank's images, read from file headers, to parts/. No-op for the released layout."""
        if self.layout == "released":
            return
        starts = range(self.rank * SIZES, len(self.refs), self.world * SIZES)
        mine = [start for start in starts if not self._is_measured(start)]
        calls = ((self._source(ref), str(ref)) for start in mine for ref in self.refs[start : start + SIZES])
        results = self._in_order(image_size, calls)
        for start in tqdm(mine, "sizes", unit=f" {SIZES} images", disable=self.rank > 0):
            sizes = list(itertools.islice(results, min(SIZES, len(self.refs) - start)))
            write_atomically(self._part_file("sizes", start // SIZES), json.dumps(sizes))

    def plan(self, space: LatentSpace) -> None:
        """Assign each group of images and each prompt to a shard. Every rank computes the same plan.

        space: latents that the model reads. Stored latents that do not fit are bad records.
        """
        if self.layout == "released":  # chosen and rejected of each pair in turn, none of them twice
            sizes = [_stored_size(pair, space) for pair in self.pairs for _ in range(2)]
        else:
            sizes = [size for start in range(0, len(self.refs), SIZES) for size in self._sizes(start)]
        known = {
            ref: (number, size if isinstance(size, str) else tuple(size))
            for number, (ref, size) in enumerate(zip(self.refs, sizes, strict=True))
        }
        groups = plan_groups(self.pairs, known, self.run, self.dropped)
        self._check_left(groups)
        self.shards = plan_shards(groups, self.run.shard_size)
        prompts, size = list(dict.fromkeys(group.prompt for group in groups)), self.run.prompts_per_shard
        self.prompts = [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def encode_text(self, encode: EncodePrompts) -> None:
        """Write this rank's share of the shards of text embeddings. Each distinct prompt is encoded once."""
        mine = self._missing("text", len(self.prompts))
        for number in tqdm(mine, "text", unit=f" {self.run.prompts_per_shard} prompts", disable=self.rank > 0):
            prompts = self.prompts[number]
            embeds, pooled = (tensor.to("cpu", torch.bfloat16) for tensor in encode(prompts))
            finite = embeds.isfinite().all(dim=2).all(dim=1) & pooled.isfinite().all(dim=1)
            wrong = (~finite).nonzero()[:, 0].tolist()
            bad = {row: f"{prompts[row]!r:.60} has embeddings that are not finite" for row in wrong}
            tensors = {"prompt_embeds": embeds[finite], "pooled_prompt_embeds": pooled[finite]}
            self._write("text", number, tensors, bad, count=int(finite.sum()))

    def encode_latents(self, encode: EncodeImages) -> None:
        """Write this rank's share of the shards of latents."""
        mine = self._missing("latents", len(self.shards))
        wanted = {n: list(dict.fromkeys(image for group in self.shards[n] for image in group.images)) for n in mine}
        images = ((self.refs[image], self.shards[number][0].size) for number in mine for image in wanted[number])
        calls = ((self._source(ref), size, str(ref)) for ref, size in images)
        results = self._in_order(sized_latent if self.layout == "released" else resized_image, calls)
        total = self.world * sum(map(len, wanted.values()))
        with tqdm(total=total, desc="images", unit="image", disable=self.rank > 0) as bar:
            for number in mine:
                latents, bad = {}, {}
                for start in range(0, len(wanted[number]), self.run.batch_size):
                    batch = wanted[number][start : start + self.run.batch_size]
                    pixels = dict(zip(batch, itertools.islice(results, len(batch)), strict=True))
                    latents |= self._encode_batch(pixels, encode, bad)
                    bar.update(len(batch) * self.world)
                left = [group.without(bad) for group in self.shards[number]]
                rows = [latents[image] for group in left if group is not None for image in group.images]
                height, width = rows[0].shape[1:] if rows else (0, 0)
                tensors = {"latents": torch.stack(rows)} if rows else {}
                self._write("latents", number, tensors, bad, count=len(rows), height=height, width=width)

    def _encode_batch(
        self, pixels: dict[int, np.ndarray | str], encode: EncodeImages, bad: dict[int, str]
    ) -> dict[int, Tensor]:
        """Return {image index: latents}. `bad` receives a message for each unreadable image and non-finite latent."""
        bad |= {image: found for image, found in pixels.items() if isinstance(found, str)}
        pixels = {image: found for image, found in pixels.items() if not isinstance(found, str)}
        if not pixels:
            return {}
        read = torch.from_numpy(np.stack(list(pixels.values())))
        made = read if self.layout == "released" else encode(read.permute(0, 3, 1, 2).float() / 255)
        latents = dict(zip(pixels, made.to("cpu", torch.bfloat16), strict=True))
        for image, found in latents.items():
            if not bool(found.isfinite().all()):
                bad[image] = f"{self.refs[image]} has latents that are not finite"
        return latents

    def finish(self) -> None:
        """Write summary.json, prompts.json, groups.safetensors and index.json. All shards must exist."""
        prompt_rows, text = self._text_rows()
        groups, pairs, latents = [], [], []
        for number, planned in enumerate(self.shards):
            part = self._part("latents", number)
            bad = {int(image): message for image, message in part["bad"].items()}
            first = 0
            for group in planned:
                left = group.without(bad)
                if (wrong := next((bad[image] for image in group.images if image in bad), None)) is not None:
                    lost = len(group.pairs) - (len(left.pairs) if left else 0)
                    self.dropped.bad("image that cannot be encoded", wrong, lost)
                if left is None:
                    continue
                if left.prompt in prompt_rows:
                    row = {"prompt": prompt_rows[left.prompt], "shard": len(latents), "first": first}
                    row |= {"pictures": len(left.images), "first_pair": len(pairs), "pairs": len(left.pairs)}
                    groups.append(row)
                    pairs += [(*pair, -1) for pair in left.pairs]
                else:
                    message = f"{left.prompt!r:.60} has no embeddings"
                    self.dropped.bad("prompt without embeddings", message, len(left.pairs))
                first += len(left.images)
            if first != part["count"]:
                raise ValueError(
                    f"{self.folder / part['file']}: got {part['count']} images; expected {first}: the images have "
                    f"changed; delete {self.folder} and prepare again"
                )
            if first:
                latents.append({key: part[key] for key in ("file", "count", "height", "width", "sha256")})
        self._check_left(groups)
        summary = {"pairs_read": self.read, "pairs": len(pairs), "groups": len(groups), "prompts": len(prompt_rows)}
        summary |= {"images": sum(shard["count"] for shard in latents), "dropped": dict(self.dropped.counts)}
        summary |= {"named": self.dropped.named}
        write_if_changed(self.folder / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1))
        write_if_changed(self.folder / "prompts.json", json.dumps(list(prompt_rows), ensure_ascii=False, indent=0))
        write_tables(self.folder, self.manifest, groups, pairs, {"latents": latents, "text": text})
        for path in itertools.chain(self.folder.glob(f"{TEMPORARY}*"), self.folder.glob(f"parts/{TEMPORARY}*")):
            path.unlink()

    def _text_rows(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Return each prompt's row in the text shards, and the entries of index.json for the text shards."""
        kept, parts = [], [self._part("text", number) for number in range(len(self.prompts))]
        for prompts, part in zip(self.prompts, parts, strict=True):
            kept += [prompt for row, prompt in enumerate(prompts) if str(row) not in part["bad"]]
        files = [{key: part[key] for key in ("file", "count", "sha256")} for part in parts if part["count"]]
        return {prompt: row for row, prompt in enumerate(kept)}, files

    def _check_left(self, groups: Sequence[object]) -> None:
        if not groups:
            raise ValueError(f"{self.source}: no pair is left of {self.read}: {self.dropped}")

    def _part_file(self, kind: str, number: int) -> Path:
        return self.folder / "parts" / f"{kind}-{number:05d}.json"

    def _part(self, kind: str, number: int) -> dict[str, Any]:
        return read_json(self._part_file(kind, number))

    def _sizes(self, start: int) -> list[list[int] | str]:
        return json.loads(self._part_file("sizes", start // SIZES).read_text(encoding="utf-8"))

    def _is_measured(self, start: int) -> bool:
        """Return whether the file of image sizes exists and, with on_bad "refuse", has the size of each image."""
        if not self._part_file("sizes", start // SIZES).is_file():
            return False
        return self.run.on_bad == "skip" or not any(isinstance(size, str) for size in self._sizes(start))

    def _missing(self, kind: str, count: int) -> list[int]:
        """Return the numbers of the shards that this rank still has to write. Rank r writes shards r, r + world, ..."""
        return [number for number in range(self.rank, count, self.world) if not self._is_done(kind, number)]

    def _is_done(self, kind: str, number: int) -> bool:
        if not self._part_file(kind, number).is_file():
            return False
        part = self._part(kind, number)
        file = self.folder / part["file"]
        if part["planned"] != self._planned(kind, number) or (part["bad"] and self.run.on_bad == "refuse"):
            return False
        if part["count"] > 0 and (not file.is_file() or file.stat().st_size != part["bytes"]):
            return False
        return part["count"] == 0 or not self.run.verify or file_digest(file) == part["sha256"]

    def _planned(self, kind: str, number: int) -> str:
        if kind == "text":
            return text_digest(json.dumps(self.prompts[number]))
        named = ((group, [str(self.refs[image]) for image in group.images]) for group in self.shards[number])
        return text_digest(json.dumps([(group.prompt, group.size, images, group.pairs) for group, images in named]))

    def _write(self, kind: str, number: int, tensors: dict[str, Tensor], bad: dict[int, str], **facts: int) -> None:
        """Write a shard and its record. Raises ValueError if on_bad is "refuse" and `bad` is not empty."""
        if bad and self.run.on_bad == "refuse":
            self.dropped.bad("", next(iter(bad.values())))
        name = f"{kind}-{number:05d}.safetensors"
        data = save({key: tensor.contiguous() for key, tensor in tensors.items()}) if facts["count"] else b""
        if data:
            write_atomically(self.folder / name, data)
        about = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **facts, "bad": bad}
        about["planned"] = self._planned(kind, number)
        write_atomically(self._part_file(kind, number), json.dumps(about, ensure_ascii=False))

    def _source(self, ref: ImageRef) -> Path | bytes | str:
        return attempt(image_source, ref, self.images)


def _stored_size(pair: Preference, space: LatentSpace) -> Size | str:
    problem = space.problem(pair.shape)
    return f"{pair.chosen}: {problem}" if problem else (8 * pair.shape[1], 8 * pair.shape[2])
