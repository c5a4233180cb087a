"""Encoded preference pairs on disk: safetensors shards of scaled latents and text embeddings.

A group consists of images of one prompt and the pairs of these images that raters compared. The smallest group is one
pair. The directory holds:

    index.json             format, manifest, concept names; for each shard: rows, latent size, hash. Written last.
    prompts.json           the distinct prompts; prompt i belongs to row i, counted over all text shards
    groups.safetensors     for each group: prompt, shard, row of its first image in the shard, number of images, row of
                           its first pair, number of pairs
                           for each pair: chosen, rejected (rows within the group), label, concept (-1: unknown)
    text-00000.safetensors     prompt_embeds (n, L, D), pooled_prompt_embeds (n, P)
    latents-00000.safetensors  latents (n, C, H, W), one size per shard; images of a group are adjacent

Training shuffles all groups of an image size. The shuffle is cheap, because reading a group is one contiguous read
(about one megabyte for two images of 1024 x 1024 in bfloat16).
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Self, Unpack

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from dinalrm_align.data import shards
from dinalrm_align.data.batches import BatchOrder, PairSource
from dinalrm_align.data.formats.record import INVALID, Cell, Preference, check_preference
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.models.text import Conditions
from dinalrm_align.train.digest import text_digest
from dinalrm_align.train.files import atomically, file_digest, make_folder
from dinalrm_align.train.settings import check_integer


class LatentPairs(PairSource):
    """`PairSource` that reads a directory written by `LatentPairsWriter` or `prepare`.

    An item of a batch is a group: images of one prompt and all their pairs. With on_bad="skip", a shard that is
    missing, truncated or inconsistent with index.json is left out, too.
    """

    def __init__(self, directory: str | Path, **order: Unpack[BatchOrder]) -> None:
        super().__init__(**order)
        self.directory = Path(directory)
        index = shards.read_index(self.directory)
        self.manifest, self.concepts = index.manifest, index.concepts
        self.prompts = shards.read_prompt_list(self.directory, index)
        self._columns = {name: column.numpy() for name, column in shards.read_columns(self.directory, index).items()}
        self._text_starts = np.cumsum([0, *(shard.count for shard in index.text)])
        self._bad: dict[str, str] = {}
        self._latents = [self._open(shard, shards.LATENTS) for shard in index.latents]
        self._text = [self._open(shard, shards.TEXT) for shard in index.text]
        prompt, shard = self._columns["prompt"], self._columns["shard"]
        text_shard = np.searchsorted(self._text_starts, prompt, side="right") - 1
        whole = np.array([file is not None for file in self._latents])[shard]
        whole &= np.array([file is not None for file in self._text])[text_shard]
        self._invalid = self._invalid_groups()
        whole[self._invalid] = False
        if self._bad or self._invalid:
            messages = [*self._bad.values(), *self.dropped.messages.get(INVALID, [])]
            warnings.warn(
                f"{self.directory}: {len(self._bad)} shards cannot be read; {np.sum(~whole)} of {len(whole)} groups "
                f"are left out. {'; '.join(messages[:3])}",
                stacklevel=2,
            )
        shapes = np.array([file.shape if file else (0, 0, 0) for file in self._latents])
        self._arrange([self.prompts[row] for row in prompt.tolist()], sizes=shapes[shard], usable=whole)

    def _invalid_groups(self) -> list[int]:
        """Return the groups with a record that `check_preference` refuses, checking each prompt and label once."""
        labels, valid, invalid = self._columns["label"].tolist(), set(), list[int]()
        cells = [Cell(str(self.directory), 0, row, "latents") for row in (0, 1)]
        columns = (self._columns[name].tolist() for name in ("prompt", "first_pair", "pairs"))
        for group, (prompt, first, count) in enumerate(zip(*columns, strict=True)):
            try:
                for record in {(prompt, label) for label in labels[first : first + count]} - valid:
                    Preference(self.prompts[prompt], *cells, label=record[1], encoded=True)
                    valid.add(record)
            except ValueError as error:
                self.dropped.bad(INVALID, f"{self._where(group)}: {error}", count)
                invalid.append(group)
        return invalid

    def _open(self, shard: shards.Shard, tensors: dict[str, int]) -> shards.RowFile | None:
        try:
            return shards.open_shard(self.directory, shard, tensors)
        except (ValueError, OSError) as error:
            if self.dropped.on_bad == "refuse":
                raise
            self._bad[shard.file] = str(error)
            self.dropped.drop("unreadable shard", str(error))
            return None

    def digest(self) -> str:
        files = ("index.json", "prompts.json", "groups.safetensors")
        return text_digest(
            "".join(
                [*(file_digest(self.directory / name) for name in files), *sorted(self._bad), *map(str, self._invalid)]
            )
        )

    def _where(self, unit: int) -> str:
        return f"{self.directory}, group {unit}"

    def _load(self, unit: int) -> list[Tensor]:
        shard, first, count, prompt = (
            int(self._columns[name][unit]) for name in ("shard", "first", "pictures", "prompt")
        )
        return [self._latents[shard].read("latents", first, count), *self._read_text(prompt)]

    def _collate(self, groups: np.ndarray, items: Sequence[Sequence[Tensor]]) -> PairBatch:
        rows = {name: self._columns[name][groups] for name in shards.GROUP_COLUMNS}
        counts = rows["pictures"]
        latents, *texts = zip(*items, strict=True)
        group = torch.from_numpy(np.repeat(np.arange(len(groups)), counts))
        embeds, pooled = (torch.cat(column)[group] for column in texts)
        pairs = np.concatenate([np.arange(f, f + n) for f, n in zip(rows["first_pair"], rows["pairs"])])
        first_image = np.repeat(np.cumsum(counts) - counts, rows["pairs"])
        columns = {name: self._columns[name][pairs] for name in shards.PAIR_COLUMNS}
        concept = columns.pop("concept")
        for name in ("chosen", "rejected"):
            columns[name] = columns[name].astype(np.int64) + first_image
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
        return [self._text[shard].read(name, row) for name in shards.TEXT]


class LatentPairsWriter:
    """Context manager that writes a new directory for `LatentPairs`, and completes it on exit unless an error occurred.

    manifest: how latents and embeddings were encoded. shard_size: images per latent shard, and prompts per text shard.
    """

    def __init__(self, directory: str | Path, manifest: PairManifest, *, shard_size: int = 1024) -> None:
        self.directory = Path(directory)
        if (self.directory / "index.json").exists():
            raise FileExistsError(f"{self.directory} already holds a data set; write to another directory")
        make_folder(self.directory)
        check_integer("shard_size", shard_size, low=1)
        self.manifest, self.shard_size = manifest, shard_size
        self._prompts: dict[str, int] = {}
        self._concepts: dict[str, int] = {}
        self._groups: list[dict[str, int]] = []
        self._pairs: list[tuple[int, int, float, int]] = []
        self._pending_text: list[tuple[Tensor, Tensor]] = []
        self._text_sizes: tuple[tuple[int, ...], ...] | None = None
        self._pending_latents: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}
        self._shards: dict[str, list[dict[str, int | str]]] = {"text": [], "latents": []}

    def __enter__(self) -> Self:
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
        """Add n images of one prompt and pairs of the images. The embeddings of each distinct prompt are stored once.

        Args:
            latents: (n, C, H, W), scaled.
            prompt_embeds, pooled_prompt_embeds: (L, D) and (P,).
            chosen, rejected: indices in `latents` of the two images of each pair; default: one pair, (0, 1).
            label: for each pair, the probability that a rater prefers the chosen image; default: 1.

        Raises TypeError or ValueError for invalid tensors (see `PairBatch`). The embeddings of all prompts must have
        equal shapes.
        """
        text = prompt_embeds, pooled_prompt_embeds
        sizes = tuple(tuple(part.shape) for part in text)
        if self._text_sizes not in (None, sizes):
            raise ValueError(f"embeddings of {prompt!r:.60}: got shapes {sizes}; expected {self._text_sizes}")
        self._text_sizes = sizes
        label = label.tolist() if isinstance(label, Tensor) else [1.0] * len(chosen) if label is None else label
        names = [None] * len(chosen) if concepts is None else concepts
        for first, second, value, concept in zip(chosen, rejected, label, names, strict=True):
            cells = (Cell(str(self.directory), 0, row, "latents") for row in (first, second))
            check_preference(Preference(prompt, *cells, label=value, concept=concept, encoded=True))
        label = list(map(float, label))
        PairBatch(
            latents,
            Conditions([prompt] * len(latents), *(part.expand(len(latents), *part.shape) for part in text)),
            torch.tensor(chosen),
            torch.tensor(rejected),
            torch.tensor(label),
            torch.zeros(len(latents), dtype=torch.long),
            None if concepts is None else tuple(concepts),
        )
        if prompt not in self._prompts:
            self._prompts[prompt] = len(self._prompts)
            self._pending_text.append(text)
            if len(self._pending_text) >= self.shard_size:
                self._flush_text()
        group = {"prompt": self._prompts[prompt], "pictures": len(latents)}
        self._groups.append(group | {"first_pair": len(self._pairs), "pairs": len(chosen)})
        numbers = [self._concepts.setdefault(name, len(self._concepts)) for name in concepts or ()]
        self._pairs += zip(chosen, rejected, label, numbers or [-1] * len(chosen), strict=True)
        pending = self._pending_latents.setdefault(tuple(latents.shape[1:]), [])
        pending.append((len(self._groups) - 1, latents))
        if sum(len(stored) for _, stored in pending) >= self.shard_size:
            self._flush_latents(tuple(latents.shape[1:]))

    def close(self) -> None:
        """Complete the data set: write the remaining shards, prompts.json, groups.safetensors and index.json."""
        if not self._groups:
            raise ValueError(f"no pairs were added to {self.directory}")
        if self._pending_text:
            self._flush_text()
        for size in list(self._pending_latents):
            self._flush_latents(size)
        prompts, concepts = json.dumps(list(self._prompts), ensure_ascii=False, indent=1), list(self._concepts)
        shards.write_if_changed(self.directory / "prompts.json", prompts)
        tables = self._groups, self._pairs, self._shards
        shards.write_tables(self.directory, self.manifest, *tables, concepts=concepts)

    def _flush_text(self) -> None:
        columns = map(torch.stack, zip(*self._pending_text, strict=True))
        self._save("text", dict(zip(shards.TEXT, columns, strict=True)), count=len(self._pending_text))
        self._pending_text = []

    def _flush_latents(self, size: tuple[int, ...]) -> None:
        groups, latents = zip(*self._pending_latents.pop(size), strict=True)
        first = 0
        for group, stored in zip(groups, latents, strict=True):
            self._groups[group] |= {"shard": len(self._shards["latents"]), "first": first}
            first += len(stored)
        self._save("latents", {"latents": torch.cat(latents)}, count=first, height=size[1], width=size[2])

    def _save(self, kind: str, tensors: dict[str, Tensor], **facts: int) -> None:
        name = f"{kind}-{len(self._shards[kind]):05d}.safetensors"
        with atomically(self.directory / name) as temporary:
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, temporary)
        self._shards[kind].append({"file": name, **facts})
