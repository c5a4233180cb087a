"""Prefetching of batches in threads, so that a GPU does not wait for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Batch = TypeVar("Batch")


class Prefetched(Generic[Batch]):
    """A function micro-step -> batch that reads the next `ahead` batches in threads; a context manager.

    read: micro-step -> batch, a pure function that threads may call. Batches may be requested in any order; an error of
    `read` is raised when its batch is requested. ahead: 0 reads each batch on request.
    """

    def __init__(self, read: Callable[[int], Batch], *, ahead: int, threads: int = 4) -> None:
        self._read, self._ahead = read, ahead
        self._threads = ThreadPoolExecutor(min(threads, ahead), "batches") if ahead else None
        self._pending: dict[int, Future[Batch]] = {}

    def __call__(self, micro_step: int) -> Batch:
        if self._threads is None:
            return self._read(micro_step)
        wanted = range(micro_step, micro_step + 1 + self._ahead)
        for step in [step for step in self._pending if step not in wanted]:
            self._pending.pop(step).cancel()
        for step in wanted:
            if step not in self._pending:
                self._pending[step] = self._threads.submit(self._read, step)
        return self._pending.pop(micro_step).result()

    def __enter__(self) -> "Prefetched[Batch]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
