"""What a training step costs, phase by phase: seconds always, peak memory where it can be had.

Memory is what a phase holds at its worst above what was held when the step began (weights, optimiser state), in MiB:
the activations. On CUDA it is the allocator's own count and free of charge, so that every step reports it. On the CPU
it is the sum of live tensor storages, watched by a `TorchDispatchMode`; that slows a step about twofold, so that only
profiled steps report it (and their seconds are left out). It sees every tensor that an operator returns, neither the
workspace inside an operator nor the allocator's fragmentation.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


class LiveStorage(TorchDispatchMode):
    """Counts the bytes of the storages that operators return while it is active: `live` now, `peak` since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def restart(self) -> None:
        """Begin a new peak at what is alive now."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        """Add a storage that is neither counted yet nor one of the operator's inputs (a view, an in-place result)."""
        key = storage._cdata
        if key in self._seen or key in given:
            return
        size = storage.nbytes()
        self._seen[key] = weakref.finalize(storage, self._release, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.pop(key, None)


class PhaseMeter:
    """Seconds and peak memory of the named phases of a step; phases of one name add up within a step.

        meter.start_step(profile=step % 25 == 1)
        with meter.phase("rollout"):
            ...
        metrics |= meter.finish_step()      # {"seconds/rollout": 1.2, "memory_mib/rollout": 310.0}

    Outside a step phases are not measured, so that an evaluation may run the same code. Phases do not nest.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._on_cuda = self.device.type == "cuda"
        self._in_step = False
        self._tracker: LiveStorage | None = None
        self._held = 0
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}

    def start_step(self, *, profile: bool = False) -> None:
        """Begin a step. profile: watch memory on the CPU in this step (on CUDA it is always watched)."""
        self._in_step = True
        self._seconds, self._bytes = {}, {}
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
            self._held = torch.cuda.memory_allocated(self.device)
        self._tracker = LiveStorage() if profile and not self._on_cuda else None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block. On CUDA it waits for the device at both ends."""
        if not self._in_step:
            yield
            return
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        if self._tracker is None:
            yield
        else:
            self._tracker.restart()
            with self._tracker:
                yield
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
            self._note_peak(name, torch.cuda.max_memory_allocated(self.device) - self._held)
        elif self._tracker is not None:
            self._note_peak(name, self._tracker.peak)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def _note_peak(self, name: str, size: int) -> None:
        self._bytes[name] = max(self._bytes.get(name, 0), size)

    def finish_step(self) -> dict[str, float]:
        """End the step: seconds per phase (not for a step slowed by profiling), and MiB per phase where known."""
        self._in_step = False
        profiled, self._tracker = self._tracker is not None, None
        report = {} if profiled else {f"seconds/{name}": value for name, value in self._seconds.items()}
        return report | {f"memory_mib/{name}": size / MIB for name, size in self._bytes.items()}
