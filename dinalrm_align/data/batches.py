"""The order of batches of a data set of pairs: shuffled for training, in order for evaluation."""

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Required, Self, TypedDict, Unpack

import numpy as np

from dinalrm_align.data.pairs import PairBatch, PairManifest
from dinalrm_align.train.settings import check_integer

AT_ONCE = 4
"""Blocks that are mixed, see `ShuffledBatches`."""


class BatchOrder(TypedDict, total=False):
    """How a data set is divided into batches of units: pairs, or groups of images. seed, held_out_prompts: default 0.

    held_out_prompts: number of distinct prompts kept from training for `validation`.
    """

    batch_size: Required[int]
    seed: int
    held_out_prompts: int


class ShuffledBatches:
    """Batches of `batch_size` units from buckets that are never mixed, reshuffled every epoch.

    Batch `index` is a pure function of (seed, index), so a run resumes from its step alone and ranks share the work by
    taking every world-th index. Each bucket is an endless sequence of shuffles of its units, cut into batches; epoch e
    has the batches that end within the first e + 1 shuffles. Units that do not fill a batch start the first batch of
    the next epoch, so none is left out.

    buckets: the units of each. blocks: block of each unit, for data that is read a block at a time (a row group of a
    parquet file); blocks are then visited in random order, AT_ONCE of them mixed. Raises ValueError when no bucket
    fills a batch.
    """

    def __init__(
        self,
        buckets: Sequence[np.ndarray],
        batch_size: int,
        seed: int,
        *,
        blocks: np.ndarray | None = None,
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
        """The units of batch `index`: (batch_size,) int64."""
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
        """When in the epoch each unit's block is read, counted in portions of AT_ONCE blocks."""
        order = np.random.default_rng([self.seed, epoch, 1]).permutation(int(self._blocks.max()) + 1)
        return (np.argsort(order) // AT_ONCE)[self._blocks]


class BatchesInOrder(Sequence[PairBatch]):
    """Every unit of some buckets once, in order; each batch is read when it is indexed."""

    def __init__(self, read: Callable[[np.ndarray], PairBatch], buckets: Sequence[np.ndarray], size: int) -> None:
        self._read = read
        self._units = [bucket[i : i + size] for bucket in buckets for i in range(0, len(bucket), size)]

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> PairBatch:
        return self._read(self._units[index])


def held_out(prompts: Sequence[str], number: int) -> set[str]:
    """The `number` distinct prompts with the smallest SHA-256, independent of the order of the data."""
    distinct = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if number >= len(distinct):
        raise ValueError(f"held_out_prompts: got {number}; expected fewer than the {len(distinct)} distinct prompts")
    return set(distinct[:number])


class PairSource(ABC):
    """Pairs to train and validate on: N numbered units, which a subclass reads. Batches are pure functions of the step.

    reads_files_only: whether batches may be read in other threads; False where encoders run.
    """

    manifest: PairManifest
    reads_files_only = True

    def __init__(self, **order: Unpack[BatchOrder]) -> None:
        self._batch_size, self._seed = order["batch_size"], order.get("seed", 0)
        self._num_held_out = order.get("held_out_prompts", 0)
        check_integer("batch_size", self._batch_size, low=1)
        check_integer("seed", self._seed)
        check_integer("held_out_prompts", self._num_held_out)

    def _arrange(
        self,
        prompts: Sequence[str],
        *,
        sizes: np.ndarray | None = None,
        usable: np.ndarray | None = None,
        blocks: np.ndarray | None = None,
    ) -> None:
        """Decide which units are trained on and which are held out.

        sizes (N, k): units of different sizes are never in one batch. usable (N,) bool: default all. blocks (N,): see
        `ShuffledBatches`.
        """
        units = np.arange(len(prompts)) if usable is None else np.flatnonzero(usable)
        keep_out = held_out([prompts[unit] for unit in units.tolist()], self._num_held_out)
        is_out = np.array([prompt in keep_out for prompt in prompts])
        self._buckets = [units]
        if sizes is not None:
            used = sizes[units]
            self._buckets = [units[(used == size).all(axis=1)] for size in np.unique(used, axis=0)]
        self._held_out = [bucket[is_out[bucket]] for bucket in self._buckets]
        self._trained = [bucket[~is_out[bucket]] for bucket in self._buckets]
        self._blocks = blocks

    @abstractmethod
    def _read(self, units: np.ndarray) -> PairBatch: ...

    @abstractmethod
    def digest(self) -> str:
        """A digest of prompts, pairs and labels, but not of the images or latents."""

    @functools.cached_property
    def _batches(self) -> ShuffledBatches:
        """Created when training asks: a data set used only for evaluation may be smaller than a batch."""
        return ShuffledBatches(self._trained, self._batch_size, self._seed, blocks=self._blocks)

    def __len__(self) -> int:
        """Batches per epoch, over all ranks."""
        return self._batches.per_epoch

    def batch_at(self, step: int, rank: int = 0, world: int = 1) -> PairBatch:
        """The batch of micro-step `step` on process `rank` of `world`, in the stored dtype."""
        return self._read(self._batches.at(step * world + rank))

    def validation(self) -> Sequence[PairBatch]:
        """The pairs of the held-out prompts, in the order of the data, read whenever they are indexed."""
        return BatchesInOrder(self._read, self._held_out, self._batch_size)

    def in_order(self) -> Sequence[PairBatch]:
        """All pairs, in the order of the data."""
        return BatchesInOrder(self._read, self._buckets, self._batch_size)


class Prefetched:
    """A function micro-step -> batch that reads the next `ahead` batches in threads; a context manager.

    Batches may be requested in any order; an error of `read`, which threads call, is raised when its batch is
    requested. ahead 0 reads each batch on request.
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
