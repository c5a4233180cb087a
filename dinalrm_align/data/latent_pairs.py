"""Pre-encoded preference pairs on disk: safetensors shards of scaled latents and cached text embeddings.

    index.json             format, manifest, concept names, the shards with counts, sizes and hashes; written last
    prompts.json           the distinct prompts; row i of the text shards belongs to prompt i
    groups.safetensors     per group: prompt, shard, first picture in it, pictures, first pair, pairs
                           per pair: chosen, rejected (rows within the group), label, concept (-1: unknown)
    text-00000.safetensors     prompt_embeds (n, L, D), pooled_prompt_embeds (n, P)
    latents-00000.safetensors  latents (n, C, H, W), one size a shard; the pictures of a group lie side by side

A plain pair is a group of two pictures. Batches hold groups of one picture size. The order is a full shuffle, not one
in blocks: the pictures of a group are one piece of a file, of a megabyte at 1024 x 1024 in bfloat16 (and a prompt's
embeddings another), which disks read from anywhere about as fast as in a row; each is read once an epoch.
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Unpack

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinalrm_align.data.batches import BatchOrder, IndexedPairs
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.data.shards import (
    FORMAT,
    GROUP_COLUMNS,
    LATENTS,
    PAIR_COLUMNS,
    TEXT,
    RowFile,
    Shard,
    open_shard,
    read_columns,
    read_index,
    read_prompt_list,
)
from dinalrm_align.models.text import Conditions, check_prompts
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.durable import atomically, file_digest, write_atomically
from dinalrm_align.train.files import make_folder
from dinalrm_align.train.settings import check_integer


class LatentPairs(IndexedPairs):
    """A PairSource over a directory written by `LatentPairsWriter` or `prepare`; its units are groups of images.

    Args:
        directory: the folder of index.json.
        on_bad: for shards that are missing, truncated or differ from the index: "refuse" raises; "skip" leaves their
            groups out with a warning.
        order: see `BatchOrder`.
    """

    def __init__(
        self, directory: str | Path, *, on_bad: Literal["refuse", "skip"] = "refuse", **order: Unpack[BatchOrder]
    ) -> None:
        super().__init__(**order)
        self.directory = Path(directory)
        index = read_index(self.directory)
        self.manifest = index.manifest
        self.concepts = index.concepts
        self.prompts = read_prompt_list(self.directory, index)
        columns = read_columns(self.directory, index)
        self._columns = {name: column.numpy() for name, column in columns.items()}
        self._text_starts = np.cumsum([0, *(shard.count for shard in index.text)])
        self._bad: dict[str, str] = {}
        self._latents = [self._open(shard, LATENTS, on_bad) for shard in index.latents]
        self._text = [self._open(shard, TEXT, on_bad) for shard in index.text]
        prompt, shard = self._columns["prompt"], self._columns["shard"]
        text_shard = np.searchsorted(self._text_starts, prompt, side="right") - 1
        whole = np.array([file is not None for file in self._latents])[shard]
        whole &= np.array([file is not None for file in self._text])[text_shard]
        if self._bad:
            warnings.warn(
                f"{self.directory}: {len(self._bad)} shards cannot be read; {np.sum(~whole)} of {len(whole)} groups "
                f"are left out. {'; '.join(list(self._bad.values())[:3])}",
                stacklevel=2,
            )
        sizes = np.array([(shard.height, shard.width) for shard in index.latents])[shard]
        self._arrange([self.prompts[row] for row in prompt.tolist()], sizes=sizes, usable=whole)

    def _open(self, shard: Shard, tensors: dict[str, int], on_bad: str) -> RowFile | None:
        try:
            return open_shard(self.directory, shard, tensors)
        except (ValueError, OSError) as error:
            if on_bad != "skip":
                raise
            self._bad[shard.file] = str(error)
            return None

    def digest(self) -> str:
        files = ("index.json", "prompts.json", "groups.safetensors")
        return text_digest("".join([*(file_digest(self.directory / name) for name in files), *sorted(self._bad)]))

    def _read(self, groups: np.ndarray) -> PairBatch:
        rows = {name: self._columns[name][groups] for name in GROUP_COLUMNS}
        counts = rows["pictures"]
        latents = [
            self._latents[shard].read("latents", first, count)
            for shard, first, count in zip(rows["shard"].tolist(), rows["first"].tolist(), counts.tolist())
        ]
        texts = [self._read_text(prompt) for prompt in rows["prompt"].tolist()]
        group = torch.from_numpy(np.repeat(np.arange(len(groups)), counts))
        embeds, pooled = (torch.cat(column)[group] for column in zip(*texts, strict=True))
        pairs = np.concatenate([np.arange(f, f + n) for f, n in zip(rows["first_pair"], rows["pairs"])])
        first_picture = np.repeat(np.cumsum(counts) - counts, rows["pairs"])
        columns = {name: self._columns[name][pairs] for name in PAIR_COLUMNS}
        concept = columns.pop("concept")
        for name in ("chosen", "rejected"):
            columns[name] = columns[name].astype(np.int64) + first_picture
        return PairBatch(
            latents=torch.cat(latents),
            conditions=Conditions(
                [self.prompts[prompt] for prompt in np.repeat(rows["prompt"], counts)], embeds, pooled
            ),
            group=group,
            concepts=tuple(self.concepts[i] for i in concept.tolist()) if (concept >= 0).all() else None,
            **{name: torch.from_numpy(column) for name, column in columns.items()},
        )

    def _read_text(self, prompt: int) -> list[Tensor]:
        shard = int(np.searchsorted(self._text_starts, prompt, side="right")) - 1
        row = prompt - int(self._text_starts[shard])
        return [self._text[shard].read(name, row) for name in TEXT]


class LatentPairsWriter:
    """Writes a directory for LatentPairs; a context manager, complete only when the block ends without an error.

    Args:
        directory: created; must not hold an index.json.
        manifest: how latents and embeddings are made.
        shard_size: pictures (and prompts) a shard.
    """

    def __init__(self, directory: str | Path, manifest: PairManifest, *, shard_size: int = 1024) -> None:
        self.directory = Path(directory)
        if (self.directory / "index.json").exists():
            raise FileExistsError(f"{self.directory} already holds a data set; write to another directory")
        make_folder(self.directory)
        check_integer("shard_size", shard_size, low=1)
        self.manifest = manifest
        self.shard_size = shard_size
        self._prompts: dict[str, int] = {}
        self._concepts: dict[str, int] = {}
        self._groups: list[dict[str, int]] = []
        self._pairs: dict[str, list[float]] = {name: [] for name in PAIR_COLUMNS}
        self._pending_text: list[tuple[Tensor, Tensor]] = []
        self._text_sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        self._pending_latents: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        self._shards: dict[str, list[dict[str, int | str]]] = {"text": [], "latents": []}

    def __enter__(self) -> "LatentPairsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def add(
        self,
        prompt: str,
        latents: Tensor,
        *,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        chosen: Sequence[int] = (0,),
        rejected: Sequence[int] = (1,),
        label: Sequence[float] | None = None,
        concepts: Sequence[str] | None = None,
    ) -> None:
        """Add one group: latents (n, C, H, W) of one prompt, its prompt_embeds (L, D) and pooled_prompt_embeds (P,).

        chosen, rejected: rows of `latents` of each pair, by default the plain pair (0, 1). label: 1 for each pair
        unless given. The embeddings of a prompt seen before are not stored again. Raises as PairBatch does, and
        ValueError for embeddings of another size than those before.
        """
        check_prompts([prompt])
        sizes = tuple(prompt_embeds.shape), tuple(pooled_prompt_embeds.shape)
        if self._text_sizes not in (None, sizes):
            raise ValueError(f"embeddings of {prompt!r:.60} have shapes {sizes}; those before {self._text_sizes}")
        self._text_sizes = sizes
        embeds, pooled = (part.expand(len(latents), *part.shape) for part in (prompt_embeds, pooled_prompt_embeds))
        PairBatch(
            latents,
            Conditions([prompt] * len(latents), embeds, pooled),
            torch.tensor(chosen),
            torch.tensor(rejected),
            torch.ones(len(chosen)) if label is None else torch.tensor(label, dtype=torch.float32),
            torch.zeros(len(latents), dtype=torch.long),
            None if concepts is None else tuple(concepts),
        )
        if prompt not in self._prompts:
            self._prompts[prompt] = len(self._prompts)
            self._pending_text.append((prompt_embeds, pooled_prompt_embeds))
            if len(self._pending_text) >= self.shard_size:
                self._flush_text()
        self._groups.append(
            {
                "prompt": self._prompts[prompt],
                "pictures": len(latents),
                "first_pair": len(self._pairs["chosen"]),
                "pairs": len(chosen),
            }
        )
        self._pairs["chosen"] += chosen
        self._pairs["rejected"] += rejected
        self._pairs["label"] += [1.0] * len(chosen) if label is None else label
        names = [None] * len(chosen) if concepts is None else concepts
        self._pairs["concept"] += [
            -1 if c is None else self._concepts.setdefault(c, len(self._concepts)) for c in names
        ]
        pending = self._pending_latents.setdefault(tuple(latents.shape[1:]), [])
        pending.append((len(self._groups) - 1, latents))
        if sum(len(stored) for _, stored in pending) >= self.shard_size:
            self._flush_latents(tuple(latents.shape[1:]))

    def close(self) -> None:
        """Write what is pending and the index, which makes the directory complete."""
        if not self._groups:
            raise ValueError(f"no pairs were added to {self.directory}")
        if self._pending_text:
            self._flush_text()
        for size in list(self._pending_latents):
            self._flush_latents(size)
        columns = {name: torch.tensor([group[name] for group in self._groups]) for name in GROUP_COLUMNS}
        columns |= {name: torch.tensor(self._pairs[name]) for name in PAIR_COLUMNS}
        _save(columns, self.directory / "groups.safetensors")
        _write_json(list(self._prompts), self.directory / "prompts.json")
        index = {
            "format": FORMAT,
            "manifest": dataclasses.asdict(self.manifest),
            "concepts": list(self._concepts),
            **self._shards,
        }
        _write_json(index, self.directory / "index.json")

    def _flush_text(self) -> None:
        embeds, pooled = (torch.stack(column) for column in zip(*self._pending_text, strict=True))
        name = f"text-{len(self._shards['text']):05d}.safetensors"
        _save({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}, self.directory / name)
        self._shards["text"].append({"file": name, "count": len(embeds)})
        self._pending_text = []

    def _flush_latents(self, size: tuple[int, ...]) -> None:
        groups, latents = zip(*self._pending_latents.pop(size), strict=True)
        first = 0
        for group, stored in zip(groups, latents, strict=True):
            self._groups[group] |= {"shard": len(self._shards["latents"]), "first": first}
            first += len(stored)
        name = f"latents-{len(self._shards['latents']):05d}.safetensors"
        _save({"latents": torch.cat(latents)}, self.directory / name)
        self._shards["latents"].append({"file": name, "count": first, "height": size[1], "width": size[2]})


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    with atomically(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def _write_json(content: object, path: Path) -> None:
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))
