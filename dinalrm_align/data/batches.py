"""Batches of a data set of preference pairs: shuffled for training, in stored order for evaluation."""

import functools
import hashlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, Required, Self, TypedDict, Unpack

import numpy as np
from torch import Tensor

from dinalrm_align.data.formats import read_preferences
from dinalrm_align.data.formats.record import Dropped, Preference
from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.models.latent_space import LatentSpace
from dinalrm_align.train.files import InputError
from dinalrm_align.train.settings import check_integer

AT_ONCE = 4
"""Number of parquet row groups whose rows are shuffled together, see `ShuffledBatches`."""


class BatchOrder(TypedDict, total=False):
    """Options that control how a `PairSource` forms batches.

    batch_size: number of items per batch. An item is one pair or one group (images of one prompt with all their pairs).
    seed: seed of the shuffles; default 0.
    held_out_prompts: number of distinct prompts kept for validation and left out of training; default 0.
    on_bad: what to do about an item that is invalid or cannot be read: "refuse" (default) raises, "skip" warns and
        leaves it out.
    space: latents that the model reads. Items with other latents are invalid. Default: not checked.
    """

    batch_size: Required[int]
    seed: int
    held_out_prompts: int
    on_bad: Literal["refuse", "skip"]
    space: LatentSpace | None


class ShuffledBatches:
    """Endless sequence of shuffled training batches, each given by the indices of its items (see `BatchOrder`).

    A batch depends only on the seed and the batch's index. Resuming a run thus needs only its step. Rank r of W ranks
    reads batches r, r + W, r + 2 W, ... Every epoch shuffles the items again. If fewer than `batch_size`
    items of an image size are left at the end of an epoch, they are used in a later epoch, so that no item is lost.

    buckets: for each image size, the indices of its items. All items of a batch come from one bucket.
    batch_size: number of items per batch.
    blocks: (N,) index of each item's parquet row group, for data that is read one row group at a time.
    With `blocks`, an epoch visits row groups in random order, and shuffles the items of AT_ONCE row groups together.

    Raises ValueError if every bucket is smaller than a batch.
    """

    def __init__(
        self, buckets: Sequence[np.ndarray], batch_size: int, seed: int, *, blocks: np.ndarray | None = None
    ) -> None:
        self.buckets = [bucket for bucket in buckets if len(bucket)]
        self.batch_size, self.seed, self._blocks = batch_size, seed, blocks
        if not any(len(bucket) >= batch_size for bucket in self.buckets):
            raise ValueError(
                f"batch_size: got {batch_size}; expected at most the largest bucket, sizes "
                f"{[len(bucket) for bucket in buckets][:8]}: use a smaller batch or more pairs"
            )
        self.per_epoch = sum(len(bucket) // batch_size for bucket in self.buckets)
        self._current: tuple[int, np.ndarray] = -1, np.empty((0, batch_size), dtype=np.int64)

    def at(self, index: int) -> np.ndarray:
        """Return the indices of the items in batch number `index`: int64, (batch_size,)."""
        units = sum(len(bucket) for bucket in self.buckets)
        epoch = index * self.batch_size // units
        while self._batches_before(epoch + 1) <= index:
            epoch += 1
        current, order = self._current
        if current != epoch:
            order = self._order_of(epoch)
            self._current = epoch, order  # one assignment, for threads
        return order[index - self._batches_before(epoch)]

    def _batches_before(self, epoch: int) -> int:
        return sum(epoch * len(bucket) // self.batch_size for bucket in self.buckets)

    def _order_of(self, epoch: int) -> np.ndarray:
        size, batches = self.batch_size, []
        rng, shuffles = self._shuffles(epoch)
        left = [epoch * len(bucket) % size for bucket in self.buckets]  # units of earlier shuffles in no batch yet
        earlier = max(-(-over // len(bucket)) for over, bucket in zip(left, self.buckets))
        before = [self._shuffles(epoch - back)[1] for back in range(earlier, 0, -1)]
        for number, bucket in enumerate(self.buckets):
            row = np.concatenate([*(shuffle[number] for shuffle in before), shuffles[number]])
            row = row[earlier * len(bucket) - left[number] :]
            batches.append(row[: len(row) // size * size].reshape(-1, size))
        order = np.concatenate(batches)
        if self._blocks is None:
            return rng.permutation(order)
        return order[np.argsort(self._portions(epoch)[order].max(axis=1), kind="stable")]

    def _shuffles(self, epoch: int) -> tuple[np.random.Generator, list[np.ndarray]]:
        rng = np.random.default_rng([self.seed, epoch])
        shuffles = [rng.permutation(bucket) for bucket in self.buckets]
        if self._blocks is not None:
            portions = self._portions(epoch)
            shuffles = [shuffle[np.argsort(portions[shuffle], kind="stable")] for shuffle in shuffles]
        return rng, shuffles

    def _portions(self, epoch: int) -> np.ndarray:
        """Split row groups at random into sets of AT_ONCE row groups. Return the index of each item's set, (N,)."""
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(int(self._blocks.max()) + 1)
        return (np.argsort(order) // AT_ONCE)[self._blocks]


class BatchesInOrder(Sequence[PairBatch]):
    """Batches of items sorted by image size, with items of equal size in stored order. A batch is read when indexed."""

    def __init__(self, read: Callable[[np.ndarray], PairBatch], buckets: Sequence[np.ndarray], size: int) -> None:
        self._read = read
        self._units = [bucket[i : i + size] for bucket in buckets for i in range(0, len(bucket), size)]

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> PairBatch:
        return self._read(self._units[index])


def held_out(prompts: Sequence[str], number: int) -> set[str]:
    """Return the set of the `number` prompts with the smallest SHA-256 hashes, to hold out for validation."""
    distinct = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if number >= len(distinct):
        raise ValueError(f"held_out_prompts: got {number}; expected fewer than the {len(distinct)} distinct prompts")
    return set(distinct[:number])


class PairSource(ABC):
    """Abstract data set of preference pairs. Its training batches depend only on the seed, the step and the rank.

    Subclasses implement `_load`, which reads the tensors of one item from files, `_where`, which names an item in error
    messages, and `_collate`, which joins items to a batch. A subclass that runs encoders in `_collate` must set
    `reads_files_only` to False. Its batches are not read in background threads. `dropped` counts what was left out.
    """

    manifest: PairManifest
    reads_files_only = True

    def __init__(self, **order: Unpack[BatchOrder]) -> None:
        self._batch_size, self._seed = order["batch_size"], order.get("seed", 0)
        self._num_held_out = order.get("held_out_prompts", 0)
        self.dropped, self._space = Dropped(order.get("on_bad", "refuse")), order.get("space")
        self._unreadable: set[int] = set()
        check_integer("batch_size", self._batch_size, low=1)
        check_integer("seed", self._seed)
        check_integer("held_out_prompts", self._num_held_out)

    def _find_pairs(self, source: Path, layout: str) -> list[Preference]:
        """Return the pairs of `source`. Warns about records and files that are left out."""
        found = list(read_preferences(source, layout, self.dropped.bad, strict=False))
        if self.dropped.counts:
            messages = [message for reason in self.dropped.messages.values() for message in reason]
            count = self.dropped.counts.total()
            warnings.warn(f"{source}: {count} parts or rows left out. {'; '.join(messages[:3])}", stacklevel=4)
        if not found:
            why = "; mine with a smaller --mine.min_gap: none passed the filter" * (layout == "mined")
            raise ValueError(f"{source} holds no pairs that can be read{why}")
        return found

    def _arrange(
        self,
        prompts: Sequence[str],
        *,
        sizes: np.ndarray | None = None,
        usable: np.ndarray | None = None,
        blocks: np.ndarray | None = None,
    ) -> None:
        """Group the N items by image size, and split each group into training and held-out items.

        prompts: prompt of each item. sizes: (N, k) integers, image size of each item; None if all have one size.
        usable: (N,) bool, False for items to leave out. blocks: (N,) index of each item's parquet row group.
        """
        units = np.arange(len(prompts)) if usable is None else np.flatnonzero(usable)
        self._buckets = [units]
        if sizes is not None:
            used = sizes[units]
            buckets = {tuple(size): units[(used == size).all(axis=1)] for size in np.unique(used, axis=0).tolist()}
            self._buckets = [bucket for size, bucket in buckets.items() if self._fits(size, bucket)]
        left = [prompts[unit] for bucket in self._buckets for unit in bucket.tolist()]
        if not left:
            raise ValueError(f"no pair is left of {len(prompts)}: {self.dropped}")
        keep_out = held_out(left, self._num_held_out)
        is_out = np.array([prompt in keep_out for prompt in prompts])
        self._held_out = [bucket[is_out[bucket]] for bucket in self._buckets]
        self._trained = [bucket[~is_out[bucket]] for bucket in self._buckets]
        self._blocks = blocks

    def _fits(self, size: Sequence[int], bucket: np.ndarray) -> bool:
        problem = None if self._space is None else self._space.problem(size)
        if problem:
            message = f"{self._where(int(bucket[0]))}: {problem}"
            self.dropped.bad("latents that the model does not read", message, len(bucket))
        return problem is None

    @abstractmethod
    def _load(self, unit: int) -> Sequence[Tensor]:
        """Read an item: latents (n, C, h, w) and, if stored, prompt_embeds (1, L, D), pooled_prompt_embeds (1, P)."""

    @abstractmethod
    def _where(self, unit: int) -> str: ...

    @abstractmethod
    def _collate(self, units: np.ndarray, items: Sequence[Sequence[Tensor]]) -> PairBatch: ...

    def _item(self, unit: int) -> Sequence[Tensor] | None:
        """Read and check an item. Returns None for an invalid one if on_bad is "skip"; "refuse" raises."""
        if unit in self._unreadable:
            return None
        try:
            loaded = self._load(unit)
            item = [t.float() if t.is_floating_point() and t.itemsize not in (2, 4) else t for t in loaded]
            for name, dims, tensor in zip(("latents", "prompt_embeds", "pooled_prompt_embeds"), (4, 3, 2), item):
                if not tensor.is_floating_point() or tensor.dim() != dims or not bool(tensor.isfinite().all()):
                    got = f"{tensor.dtype} {tuple(tensor.shape)}"
                    expected = f"finite floating numbers (no NaN, no infinite values) in {dims} dimensions"
                    raise InputError(f"{self._where(unit)}: {name}: got {got}; expected {expected}")
        except (ValueError, OSError) as error:
            if self.dropped.on_bad == "refuse":
                raise error if isinstance(error, OSError) else InputError(str(error)) from error
            self._unreadable.add(unit)
            self.dropped.drop("unreadable item", str(error))
            warnings.warn(f"an item is left out, {len(self._unreadable)} in all: {error}", stacklevel=2)
            return None
        return item

    def _read(self, units: np.ndarray) -> PairBatch | None:
        """Read a batch without its invalid items; None if none is left."""
        items = [self._item(unit) for unit in units.tolist()]
        kept = units[[item is not None for item in items]]
        return self._collate(kept, [item for item in items if item is not None]) if len(kept) else None

    def check_latents(self) -> None:
        """Read one item of each image size, so that what fits no model fails before training."""
        for bucket in self._buckets:
            self._item(int(bucket[0]))

    @abstractmethod
    def digest(self) -> str:
        """Return a hash of the prompts, pairs and labels. Pixels and latents are not read."""

    @functools.cached_property
    def _batches(self) -> ShuffledBatches:
        """Training batches. Created on first use: a data set for evaluation may be too small for a training batch."""
        return ShuffledBatches(self._trained, self._batch_size, self._seed, blocks=self._blocks)

    def __len__(self) -> int:
        """Return the number of training batches per epoch, summed over all ranks."""
        return self._batches.per_epoch

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """Return the training batch of process `rank`, out of `world` processes, at micro-step `step`."""
        for index in range(step * world + rank, step * world + rank + self._batches.per_epoch):
            batch = self._read(self._batches.at(index))
            if batch is not None:  # else every item of the batch is left out: take the next one
                return batch
        raise InputError(f"no item of {self._batches.per_epoch} batches can be read: {self.dropped}")

    def validation(self) -> Sequence[PairBatch]:
        """Return the batches of the held-out prompts in stored order. A batch is read when indexed."""
        return self._in_order(self._held_out)

    def in_order(self) -> Sequence[PairBatch]:
        """Return the batches of all pairs, held-out prompts included, in stored order. A batch is read when indexed."""
        return self._in_order(self._buckets)

    def _in_order(self, buckets: Sequence[np.ndarray]) -> Sequence[PairBatch]:
        if self.dropped.on_bad == "skip":  # reads every item twice, so that all readers see the same batches
            buckets = [bucket[[self._item(unit) is not None for unit in bucket.tolist()]] for bucket in buckets]
        return BatchesInOrder(self._read, buckets, self._batch_size)


class Prefetched:
    """Callable that returns the batch of a micro-step, and prefetches the next `ahead` batches in background threads.

    Must be used as a context manager, which stops the threads on exit. Batches may be requested in any order. An
    error in a thread is raised when the batch of the same micro-step is requested. ahead=0 uses no threads.
    """

    def __init__(self, read: Callable[[int], PairBatch], *, ahead: int) -> None:
        self._read, self._ahead = read, ahead
        self._threads = ThreadPoolExecutor(min(4, ahead), "batches") if ahead else None
        self._pending: dict[int, Future[PairBatch]] = {}

    def __call__(self, micro_step: int) -> PairBatch:
        if self._threads is None:
            return self._read(micro_step)
        wanted = range(micro_step, micro_step + 1 + self._ahead)
        for step in [step for step in self._pending if step not in wanted]:
            self._pending.pop(step).cancel()
        for step in wanted:
            if step not in self._pending:
                self._pending[step] = self._threads.submit(self._read, step)
        return self._pending.pop(micro_step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
