"""Preference pairs of pictures, encoded into a directory for `LatentPairs`: stoppable at any moment, by many processes.

Beside what `data.latent_pairs` lists, the directory holds

    prepared.json            what it is made of and how; the settings that the next start is compared with
    parts/sizes-00000.json   (height, width) of the pictures of the source, or what is wrong with one
    parts/text-00000.json    of each finished file: its hash and size in bytes, and what could not be encoded
    parts/latents-00000.json

A file is written whole, then its part: what has a part, and a file of that size, is done. Every file depends on the
source, the settings and its number alone, so any process may write it, and one that was damaged is written again. When
all are there, the tables and at last index.json are written.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from dinalrm_align.data.config import PrepareRun
from dinalrm_align.data.formats import find_layout, read_preferences
from dinalrm_align.data.formats.record import ImageRef, image_source
from dinalrm_align.data.pairs import EncodeImages, EncodePrompts, PairManifest
from dinalrm_align.data.plan import Dropped, Group, filter_pairs, pictures_of, plan_groups, plan_shards
from dinalrm_align.data.shards import FORMAT
from dinalrm_align.data.workers import InOrder, attempt, loaded, measured, resized
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.durable import TEMPORARY, file_digest, write_atomically
from dinalrm_align.train.files import make_folder, read_json

PREPARED = "prepared.json"
PREPARED_FORMAT = "dinalrm_align.prepared/1"
SETTINGS = (
    "text_length",
    "buckets",
    "group",
    "label",
    "filter",
    "max_pairs",
    "shard_size",
    "prompts_per_shard",
    "seed",
)
FACTOR = 8
"""Pixels per latent, each way."""
SIZES = 4096
"""Pictures per file of sizes."""


class Preparation:
    """The work of one process of `world`; its stages are called in order by all of them, each waiting for all others.

    Args:
        run: the settings.
        folder: where the pairs go.
        manifest: of the encoders.
        in_order: `workers.worker_processes`.
        rank, world: this process, and how many.

    Raises ValueError when the folder holds pairs of other settings, FileExistsError when it holds something else, and
    what `preferences.read_preferences` raises.
    """

    def __init__(
        self, run: PrepareRun, folder: Path, manifest: PairManifest, *, in_order: InOrder, rank: int = 0, world: int = 1
    ) -> None:
        self.run, self.folder, self.manifest = run, folder, manifest
        self.rank, self.world, self._in_order = rank, world, in_order
        self.source = Path(run.source)
        if not self.source.exists():
            raise FileNotFoundError(f"no preference data {self.source}; expected a file or folder, as HPDv3/train.json")
        self.layout = find_layout(self.source) if run.layout == "auto" else run.layout
        self.images = Path(run.images) if run.images else self.source if self.source.is_dir() else self.source.parent
        self.dropped = Dropped(run.on_bad)
        pairs = read_preferences(self.source, self.layout, self.dropped.bad, strict=self.layout != "released")
        every = [pair.preferred_first() for pair in itertools.islice(pairs, run.max_pairs)]
        self.read = len(every)
        self.pairs = filter_pairs(every, run.filter, self.dropped)
        self.pictures = pictures_of(self.pairs)
        if rank == 0:
            self._begin()
        self.shards: list[list[Group]] = []
        self.prompts: list[list[str]] = []

    def _begin(self) -> None:
        """Write prepared.json, or compare it."""
        settings = {name: value for name, value in dataclasses.asdict(self.run).items() if name in SETTINGS}
        if self.source.is_dir():
            files = sorted([*self.source.glob("*.parquet"), *self.source.glob("*.csv")])
            source = text_digest("".join(f"{file.name} {file.stat().st_size}\n" for file in files))
        else:
            source = file_digest(self.source)
        made = {name: sample["values"] for name, sample in dataclasses.asdict(self.manifest)["encoded_with"].items()}
        facts = {"layout": self.layout, "source": source, "encoded with": made}
        numbers = [self.manifest.vae_scaling_factor, self.manifest.vae_shift_factor, self.manifest.text_length]
        content = {"format": PREPARED_FORMAT, **facts, "scaling, shift, text length": numbers, **settings}
        content = json.loads(json.dumps(content))
        path = self.folder / PREPARED
        if path.is_file():
            there = read_json(path)
            names = [name for name in {**there, **content} if there.get(name) != content.get(name)]
            if names:
                raise ValueError(
                    f"{self.folder} holds pairs that were prepared otherwise: {names[0]}: got "
                    f"{content.get(names[0])!r:.80}, there {there.get(names[0])!r:.80}; go on with the same source and "
                    "settings, or choose another folder"
                )
            return
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise FileExistsError(f"{self.folder} holds other files and no {PREPARED}; write to a new folder")
        make_folder(self.folder / "parts")
        write_atomically(path, json.dumps(content, indent=1))

    # ---------------------------------------------------------------------------------------------- 1. sizes, and plan

    def measure(self) -> None:
        """Note the size of every picture, from the head of its file; of latents, as it is told."""
        if self.layout == "released":
            return
        starts = range(self.rank * SIZES, len(self.pictures), self.world * SIZES)
        mine = [start for start in starts if not self._is_measured(start)]
        calls = ((*self._source(p), str(p)) for start in mine for p in self.pictures[start : start + SIZES])
        results = self._in_order(measured, calls)
        for start in self._bar(mine, "sizes", f" {SIZES} pictures"):
            sizes = list(itertools.islice(results, min(SIZES, len(self.pictures) - start)))
            write_atomically(self._sizes_file(start), json.dumps(sizes))

    def plan(self) -> None:
        """Settle what goes into which file; every process comes to the same."""
        sizes: list[Any] = []
        if self.layout == "released":  # chosen and rejected of each pair in turn, none of them twice
            sizes = [tuple(FACTOR * side for side in pair.shape[1:]) for pair in self.pairs for _ in range(2)]
        else:
            for start in range(0, len(self.pictures), SIZES):
                sizes += json.loads(self._sizes_file(start).read_text(encoding="utf-8"))
        known = {
            picture: (number, size if isinstance(size, str) else tuple(size))
            for number, (picture, size) in enumerate(zip(self.pictures, sizes, strict=True))
        }
        groups = plan_groups(self.pairs, known, self.run, self.dropped)
        if not groups:
            raise ValueError(f"{self.source}: no pair is left of {self.read}: {self.summary()}")
        self.shards = plan_shards(groups, self.run.shard_size)
        prompts, size = list(dict.fromkeys(group.prompt for group in groups)), self.run.prompts_per_shard
        self.prompts = [prompts[start : start + size] for start in range(0, len(prompts), size)]

    # ------------------------------------------------------------------------------------------------ 2. text, latents

    def encode_text(self, encode: EncodePrompts) -> None:
        """Every distinct prompt once. encode: prompts -> (n, L, D), (n, P)."""
        for number in self._bar(
            self._missing("text", len(self.prompts)), "text", f" {self.run.prompts_per_shard} prompts"
        ):
            prompts = self.prompts[number]
            embeds, pooled = (tensor.to("cpu", torch.bfloat16) for tensor in encode(prompts))
            whole = embeds.isfinite().all(dim=2).all(dim=1) & pooled.isfinite().all(dim=1)
            bad = {
                row: f"{prompts[row]!r:.60} has embeddings that are not finite"
                for row in (~whole).nonzero()[:, 0].tolist()
            }
            self._refuse(bad)
            tensors = {"prompt_embeds": embeds[whole], "pooled_prompt_embeds": pooled[whole]}
            self._write("text", number, tensors, {"count": int(whole.sum()), "bad": bad})

    def encode_latents(self, encode: EncodeImages) -> None:
        """Every picture of every file. encode: (B, 3, H, W) in [0, 1] -> scaled latents (B, C, h, w)."""
        mine = self._missing("latents", len(self.shards))
        wanted = {number: _distinct(self.shards[number]) for number in mine}
        calls = (
            (*self._source(self.pictures[picture]), self.shards[number][0].size, str(self.pictures[picture]))
            for number in mine
            for picture in wanted[number]
        )
        results = self._in_order(loaded if self.layout == "released" else resized, calls)
        bar = tqdm(
            total=self.world * sum(map(len, wanted.values())), desc="pictures", unit="picture", disable=self.rank > 0
        )
        with bar:
            for number in mine:
                latents, bad = {}, {}
                for batch in _batches(wanted[number], self.run.batch_size):
                    made = self._encode_batch(batch, list(itertools.islice(results, len(batch))), encode, bad)
                    latents.update(made)
                    bar.update(len(batch) * self.world)
                self._refuse(bad)
                left = [group.without(bad) for group in self.shards[number]]
                rows = [latents[picture] for group in left if group is not None for picture in group.pictures]
                tensors = {"latents": torch.stack(rows)} if rows else {}
                height, width = rows[0].shape[1:] if rows else (0, 0)
                self._write(
                    "latents", number, tensors, {"count": len(rows), "height": height, "width": width, "bad": bad}
                )

    def _encode_batch(
        self, batch: Sequence[int], pixels: Sequence[np.ndarray | str], encode: EncodeImages, bad: dict[int, str]
    ) -> dict[int, Tensor]:
        """The latents of the pictures of these numbers; what is wrong with the others goes into `bad`."""
        bad |= {picture: found for picture, found in zip(batch, pixels) if isinstance(found, str)}
        whole = {picture: found for picture, found in zip(batch, pixels) if not isinstance(found, str)}
        if not whole:
            return {}
        read = torch.from_numpy(np.stack(list(whole.values())))
        made = read if self.layout == "released" else encode(read.permute(0, 3, 1, 2).float() / 255)
        latents = dict(zip(whole, made.to("cpu", torch.bfloat16)))
        bad |= {
            picture: f"{self.pictures[picture]} has latents that are not finite"
            for picture, made in latents.items()
            if not bool(made.isfinite().all())
        }
        return latents

    # ------------------------------------------------------------------------------------------------------ 3. tables

    def finish(self) -> None:
        """Write the tables and the index, once all files are there. One process calls it."""
        prompt_rows, text = self._text_rows()
        groups, pairs, latents = [], [], []
        for number, planned in enumerate(self.shards):
            part = self._part("latents", number)
            bad = {int(picture): sentence for picture, sentence in part["bad"].items()}
            first, number_of_file = 0, len(latents)
            for group in planned:
                left = group.without(bad)
                if (wrong := next((bad[picture] for picture in group.pictures if picture in bad), None)) is not None:
                    lost = len(group.pairs) - (len(left.pairs) if left else 0)
                    self.dropped.bad("picture that cannot be encoded", wrong, lost)
                if left is None:
                    continue
                if left.prompt in prompt_rows:
                    row = {"prompt": prompt_rows[left.prompt], "shard": number_of_file, "first": first}
                    groups.append(
                        row | {"pictures": len(left.pictures), "first_pair": len(pairs), "pairs": len(left.pairs)}
                    )
                    pairs += left.pairs
                else:
                    sentence = f"{left.prompt!r:.60} has no embeddings"
                    self.dropped.bad("prompt without embeddings", sentence, len(left.pairs))
                first += len(left.pictures)
            if first != part["count"]:
                raise ValueError(
                    f"{self.folder / part['file']} holds {part['count']} pictures, {first} were planned: pictures "
                    f"changed since; delete {self.folder} and prepare again"
                )
            if first:
                latents.append({key: part[key] for key in ("file", "count", "height", "width", "sha256")})
        if not groups:
            raise ValueError(f"{self.source}: no pair is left of {self.read}: {self.summary()}")
        columns = {name: torch.tensor([group[name] for group in groups]) for name in groups[0]}
        chosen, rejected, label = zip(*pairs)
        columns |= {"chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected), "label": torch.tensor(label)}
        columns["concept"] = torch.full((len(pairs),), -1)
        _write_new(self.folder / "groups.safetensors", save(columns))
        _write_new(self.folder / "prompts.json", json.dumps(list(prompt_rows), ensure_ascii=False, indent=0))
        about = {"pairs_read": self.read, "pairs": len(pairs), "groups": len(groups), "prompts": len(prompt_rows)}
        about |= {"pictures": sum(shard["count"] for shard in latents), "dropped": dict(self.dropped.counts)}
        _write_new(
            self.folder / "summary.json",
            json.dumps({**about, "named": self.dropped.named}, ensure_ascii=False, indent=1),
        )
        index = {"format": FORMAT, "manifest": dataclasses.asdict(self.manifest), "concepts": []}
        _write_new(self.folder / "index.json", json.dumps({**index, "latents": latents, "text": text}, indent=1))
        for left in itertools.chain(self.folder.glob(f"{TEMPORARY}*"), self.folder.glob(f"parts/{TEMPORARY}*")):
            left.unlink()

    def _text_rows(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Prompt -> row of the text files, and these as the index lists them."""
        rows: dict[str, int] = {}
        files = []
        for number, prompts in enumerate(self.prompts):
            part = self._part("text", number)
            for place, prompt in enumerate(prompts):
                if str(place) not in part["bad"]:
                    rows[prompt] = len(rows)
            if part["count"]:
                files.append({key: part[key] for key in ("file", "count", "sha256")})
        return rows, files

    def summary(self) -> str:
        """How many pairs were left out, by reason, with the first names of what could not be read."""
        lines = [f"{count} pairs: {reason}" for reason, count in self.dropped.counts.most_common()]
        lines += [f"  {sentence}" for named in self.dropped.named.values() for sentence in named]
        return "\n".join(lines) if lines else "no pair was left out"

    # ------------------------------------------------------------------------------------------------------- files

    def _sizes_file(self, start: int) -> Path:
        return self.folder / "parts" / f"sizes-{start // SIZES:05d}.json"

    def _is_measured(self, start: int) -> bool:
        """What could not be read is looked at again where it is refused: it may have been mended."""
        path = self._sizes_file(start)
        refused = self.run.on_bad == "refuse"
        return path.is_file() and not (refused and any(isinstance(size, str) for size in json.loads(path.read_text())))

    def _part(self, kind: str, number: int) -> dict[str, Any]:
        return read_json(self.folder / "parts" / f"{kind}-{number:05d}.json")

    def _missing(self, kind: str, count: int) -> list[int]:
        """The files of a kind that this process has to write; which are its own does not depend on what is there, for
        others may be writing while it looks.
        """
        return [number for number in range(self.rank, count, self.world) if not self._is_done(kind, number)]

    def _is_done(self, kind: str, number: int) -> bool:
        path = self.folder / "parts" / f"{kind}-{number:05d}.json"
        if not path.is_file():
            return False
        part = read_json(path)
        file = self.folder / part["file"]
        if part["planned"] != self._planned(kind, number) or (part["bad"] and self.run.on_bad == "refuse"):
            return False
        if part["count"] == 0:
            return True
        if not file.is_file() or file.stat().st_size != part["bytes"]:
            return False
        return not self.run.verify or file_digest(file) == part["sha256"]

    def _planned(self, kind: str, number: int) -> str:
        """A digest of what goes into a file."""
        if kind == "text":
            return text_digest(json.dumps(self.prompts[number]))
        return text_digest(
            json.dumps([
                [group.prompt, group.size, [str(self.pictures[picture]) for picture in group.pictures], group.pairs]
                for group in self.shards[number]
            ])
        )  # fmt: skip

    def _write(self, kind: str, number: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        name = f"{kind}-{number:05d}.safetensors"
        data = save({key: tensor.contiguous() for key, tensor in tensors.items()}) if facts["count"] else b""
        if data:
            write_atomically(self.folder / name, data)
        about = {"file": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), **facts}
        about["planned"] = self._planned(kind, number)
        write_atomically(self.folder / "parts" / f"{kind}-{number:05d}.json", json.dumps(about, ensure_ascii=False))

    def _refuse(self, bad: dict[int, str]) -> None:
        """Refuse the first of what is bad before anything is written, where such is refused."""
        if bad and self.run.on_bad == "refuse":
            self.dropped.bad("", next(iter(bad.values())))

    def _source(self, picture: ImageRef) -> tuple[object]:
        return (attempt(image_source, picture, self.images),)

    def _bar(self, numbers: Sequence[int], what: str, unit: str) -> Iterator[int]:
        return tqdm(numbers, desc=what, unit=unit, disable=self.rank > 0)


def _distinct(groups: Sequence[Group]) -> list[int]:
    return list(dict.fromkeys(picture for group in groups for picture in group.pictures))


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _write_new(path: Path, content: str | bytes) -> None:
    """Write a file unless it is there with this content."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)
