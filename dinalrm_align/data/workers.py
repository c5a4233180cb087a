"""Run a function in worker processes, with results in the order of the calls. Torch-free."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from dinalrm_align.data.formats.released import load_latent

InOrder = Callable[[Callable[..., Any], Iterable[tuple]], Iterator[Any]]
"""(function, arguments of each call) -> results in the order of the calls. The result of a call that fails with
ValueError or OSError is the message, a str. A first argument that is a str (an earlier failure) is also the result."""


@contextmanager
def worker_processes(number: int) -> Iterator[InOrder]:
    """Yield a function of type `InOrder` that runs calls in `number` processes. number=0 uses the calling process."""
    if number == 0:
        yield lambda function, calls: (_call(function, *call) for call in calls)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by torch's threads
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_exit_with_parent)

    def in_order(function: Callable[..., Any], calls: Iterable[tuple]) -> Iterator[Any]:
        pending: deque[Future] = deque()
        for call in calls:
            pending.append(pool.submit(_call, function, *call))
            if len(pending) > 8 * number:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    try:
        yield in_order
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return `function(*arguments)`, or the error message if the call raises ValueError or OSError."""
    try:
        return function(*arguments)
    except (ValueError, OSError) as error:
        return str(error)


def sized_latent(source: bytes, size: tuple[int, int], name: str) -> np.ndarray:
    """Load latents (C, h, w) from the bytes of a .npy file. Raises ValueError unless `size` is (8 h, 8 w)."""
    latents = load_latent(source, name)
    if (8 * latents.shape[1], 8 * latents.shape[2]) != tuple(size):
        raise ValueError(f"{name}: got latents {latents.shape}; expected those of {size[0]} x {size[1]} pixels")
    return latents


def _call(function: Callable[..., Any], source: Any, *arguments: Any) -> Any:
    return source if isinstance(source, str) else attempt(function, source, *arguments)


def _exit_with_parent() -> None:
    """Start a thread that ends this worker when its parent process ends."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
