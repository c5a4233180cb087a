"""MicroBatcher: one-sample calls from several threads are scored together.

    batcher = MicroBatcher(score, max_batch_size=8, max_wait_ms=10)     # score: list of items -> one result per item
    result = batcher.submit(item).result()                              # from any thread

The scores of this package's latent rewards do not depend on the other samples of a batch: noise comes from a seed.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _Entry(Generic[Item, Result]):
    item: Item
    key: Hashable
    size: int
    future: "Future[Result]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class MicroBatcher(Generic[Item, Result]):
    """Thread-safe queue that passes waiting items to `score` in batches, on one worker thread.

    An item is one sample, or several samples of one caller, which stay together (`size`). An item waits until
    `max_batch_size` samples with its key wait, but at most `max_wait_ms` after its arrival if the worker is free. If
    `score` raises for a batch, each item of the batch is scored alone: an invalid sample fails only its own future. The
    worker is a daemon thread, which the first `submit` starts.

    Args:
        score: takes a list of items with equal keys and returns one result per item, in order.
        max_batch_size: largest number of samples in a batch. A larger item is a batch of its own.
        max_wait_ms: milliseconds that an item waits for others; 0 takes what is there.
        max_queue: largest number of waiting samples; at least `max_batch_size`.
        key: items with different keys are never in one batch; default: all items have one key.
        size: number of samples in an item; default: 1.
    """

    def __init__(
        self,
        score: Callable[[list[Item]], Sequence[Result]],
        *,
        max_batch_size: int = 8,
        max_wait_ms: float = 10.0,
        max_queue: int = 256,
        key: Callable[[Item], Hashable] | None = None,
        size: Callable[[Item], int] | None = None,
    ) -> None:
        if max_batch_size < 1 or not 0 <= max_wait_ms < float("inf"):
            got = f"max_batch_size={max_batch_size}, max_wait_ms={max_wait_ms}"
            raise ValueError(f"got {got}; expected at least 1 sample and 0 milliseconds or more")
        if max_queue < max_batch_size:
            raise ValueError(f"max_queue: got {max_queue}; expected at least max_batch_size, {max_batch_size}")
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait_ms / 1000, max_queue
        self._score, self._key, self._size = score, key or (lambda item: None), size or (lambda item: 1)
        self._waiting: list[_Entry[Item, Result]] = []
        self._changed = threading.Condition()  # of _waiting and _closed
        self._closed = False
        self._scoring = 0  # samples of the batch that is being scored
        self._worker: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Number of samples that wait. Samples that are being scored do not count."""
        return sum(entry.size for entry in self._waiting)

    @property
    def load(self) -> int:
        """Number of samples that wait or are being scored."""
        with self._changed:
            return self.waiting + self._scoring

    def submit(self, item: Item, *, timeout: float | None = None) -> "Future[Result]":
        """Queue one item and return the future of its result. In asyncio: `await asyncio.wrap_future(future)`.

        timeout: seconds to wait for room in a full queue; None: without limit; 0: not at all. Raises queue.Full after
        the timeout, and RuntimeError if the batcher is closed. The future raises what `score` raised for the item.
        """
        entry = _Entry[Item, Result](item, self._key(item), self._size(item))
        with self._changed:
            room = self._changed.wait_for(lambda: self._closed or self._has_room(entry), timeout)
            if self._closed:
                raise RuntimeError("this MicroBatcher is closed and takes no more samples")
            if not room:
                raise queue.Full(f"{self.max_queue} samples wait already, the limit max_queue: try again later")
            self._waiting.append(entry)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="MicroBatcher", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return entry.future

    def _has_room(self, entry: _Entry[Item, Result]) -> bool:
        return not self._waiting or self.waiting + entry.size <= self.max_queue

    def close(self) -> None:
        """Take no more items, finish those that were taken, and stop the worker thread. May be called twice."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join()

    def __enter__(self) -> "MicroBatcher[Item, Result]":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _work(self) -> None:
        while batch := self._next_batch():
            live = [entry for entry in batch if entry.future.set_running_or_notify_cancel()]
            if live:
                self._finish(live)

    def _next_batch(self) -> list[_Entry[Item, Result]]:
        """Wait for a batch, and take it from the queue. The batch is empty once the batcher is closed and drained."""
        with self._changed:
            self._scoring = 0
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return []
            oldest = self._waiting[0]  # no other thread takes items
            self._changed.wait_for(
                lambda: self._closed or self._is_full(oldest),
                timeout=max(0.0, oldest.arrived + self.max_wait - time.monotonic()),
            )
            batch = self._batch_of(oldest)
            self._scoring = sum(entry.size for entry in batch)
            self._waiting = [entry for entry in self._waiting if entry not in batch]
            self._changed.notify_all()
            return batch

    def _batch_of(self, oldest: _Entry[Item, Result]) -> list[_Entry[Item, Result]]:
        """Return the entries that follow `oldest` in the queue and have its key, as many as fit into a batch."""
        batch, room = list[_Entry[Item, Result]](), self.max_batch_size
        for entry in self._waiting:
            if entry.key == oldest.key:
                room -= entry.size
                if batch and room < 0:
                    break
                batch.append(entry)
        return batch

    def _is_full(self, oldest: _Entry[Item, Result]) -> bool:
        alike = [entry for entry in self._waiting if entry.key == oldest.key]
        return sum(entry.size for entry in alike) >= self.max_batch_size

    def _finish(self, batch: list[_Entry[Item, Result]]) -> None:
        """Set the result or the error of each future of the batch."""
        try:
            results = list(self._score([entry.item for entry in batch]))
            if len(results) != len(batch):
                raise RuntimeError(f"score: got {len(results)} results for {len(batch)} samples; expected one for each")
        except BaseException as error:  # noqa: BLE001  (a future left without a result would wait for ever)
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            LOG.warning("a batch of %d failed (%s: %s); scoring one at a time", len(batch), type(error).__name__, error)
            for entry in batch:
                self._finish([entry])
            return
        for entry, result in zip(batch, results, strict=True):
            entry.future.set_result(result)
