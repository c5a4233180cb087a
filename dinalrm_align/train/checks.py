"""Checks of tensor values, which do not make the host wait for a GPU once each.

To read a value, the host waits until the GPU has done all work in its queue; the GPU then idles until the host has
queued new work. `check` therefore measures on the device and judges on the host:

    check((~torch.isfinite(latents)).sum(), refuse)      # refuse([count]) raises an error, or returns

- On the CPU, `check` judges at once.
- Inside `deferred()`, measurements on a GPU are collected, and read in one transfer by `Readings.read` or at the end of
  the block. Then the judges are called in the order of their checks, so that the first failed check raises its error.
- Elsewhere, `check` reads its measurement at once: the host waits.

A deferred check raises the same error as an immediate one, but later: from the end of the block, not from the call that
was given the bad value. The training loop defers to the end of the backward passes, before the optimiser's step.
If the block raises an error, pending checks are judged first: they are of earlier values, often the cause of the error.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from torch import Tensor

Judge = Callable[[list[float]], None]
"""Takes the measured values as floats. Raises an error, or warns, if they are bad."""


class Readings:
    """Measurements on devices that wait to be read, with their judges."""

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, Judge]] = []

    def add(self, measured: Tensor, judge: Judge) -> None:
        self._pending.append((measured, judge))

    def read(self, values: Sequence[Tensor | float] = ()) -> list[float]:
        """Judge all pending measurements, and return `values`, scalars, as floats. Waits at most once per device."""
        pending, self._pending = self._pending, []
        tensors = [measured for measured, _ in pending] + [value for value in values if isinstance(value, Tensor)]
        rows = iter(_floats(tensors))
        for (_, judge), row in zip(pending, rows):
            judge(row)
        return [next(rows)[0] if isinstance(value, Tensor) else float(value) for value in values]


_DEFERRING: ContextVar[Readings | None] = ContextVar("deferring", default=None)


@contextmanager
def deferred() -> Iterator[Readings]:
    """Context manager in which checks on a GPU wait to be read together, at the latest at the end of the block.

    A block inside another one leaves its checks to the outer block.
    """
    outer = _DEFERRING.get()
    if outer is not None:
        yield outer
        return
    readings = Readings()
    token = _DEFERRING.set(readings)
    try:
        yield readings
    except Exception:
        with suppress(RuntimeError):  # of the device, from which nothing may be readable any more
            readings.read()
        raise
    finally:
        _DEFERRING.reset(token)
    readings.read()


def check(measured: Tensor, judge: Judge) -> None:
    """Call `judge` with the values of `measured`, a tensor of any shape: at once, or later inside `deferred()`."""
    readings = _DEFERRING.get()
    if readings is None or measured.device.type == "cpu":
        judge(measured.detach().flatten().tolist())
    else:
        readings.add(measured.detach(), judge)


def _floats(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Return the values of each tensor. The tensors of a device are read in one transfer, as float64."""
    found: list[list[float]] = [[] for _ in tensors]
    for device in {tensor.device for tensor in tensors}:
        places = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[place].detach().flatten().double() for place in places]).tolist()
        for place in places:
            count = tensors[place].numel()
            found[place], flat = flat[:count], flat[count:]
    return found
