"""Measure the cost of a training step by phase: seconds, peak memory and floating-point operations.

Seconds on CUDA are those between two events in the device's queue, so that the host does not wait for the end of
a phase. They include the time in which the device idles.

Memory is the peak within a phase minus the memory allocated at the start of the step, in MiB. On CUDA it is read from
the allocator at every step. On the CPU it is the total size of live tensor storages, measured only on profiled steps.
The CPU value excludes fragmentation and the workspaces of kernels. Profiled steps are slow, so they report no seconds.

FLOPs are counted only on profiled steps, by torch's `FlopCounterMode`, for matrix products, convolutions and attention.
A multiply-accumulate counts as two FLOPs. Recomputation by gradient checkpointing is included.
"""

import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker

MIB = 2**20
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(grad, query, key, value),
}  # fmt: skip  # formulas that `FlopCounterMode` lacks


def tensors_among(values: Any) -> list[torch.Tensor]:
    """Return a list of all tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class LiveStorage(TorchDispatchMode):
    """Dispatch mode that counts bytes of tensors: `live` is the present total, `peak` its maximum since `restart()`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def restart(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = {tensor.untyped_storage()._cdata for tensor in tensors_among((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in [tensor.untyped_storage() for tensor in tensors_among(result)]:
            if storage._cdata not in self._seen and storage._cdata not in inputs:  # no view or in-place result
                size = storage.nbytes()
                self._seen[storage._cdata] = weakref.finalize(storage, self._release, storage._cdata, size)
                self.live += size
                self.peak = max(self.peak, self.live)
        return result

    def _release(self, key: int, size: int) -> None:
        self.live -= size
        self._seen.pop(key, None)


class _NoModules(ModuleTracker):
    """Module tracker without hooks. Hooks of the default tracker would keep recomputed activations in memory."""

    __enter__ = __exit__ = lambda self, *args: None


class PhaseMeter:
    """Measures seconds, peak memory and FLOPs of the named phases of a step.

        meter.start_step(profile=step % 25 == 1)
        with meter.phase("rollout"):
            ...
        metrics |= meter.finish_step()      # {"memory_mib/rollout": 310.0, "gflops/rollout": 54.2}

    If a phase runs several times in a step, seconds and FLOPs are summed and the highest memory peak is reported.
    Phases must not be nested. Outside of a step, `phase` measures nothing, so that evaluation can call the same code.
    `profile_every`: the training loop `fit` profiles updates 1, 1 + profile_every, ...; 0 disables profiling.
    """

    def __init__(self, device: torch.device | str, profile_every: int = 0) -> None:
        self.device, self.profile_every = torch.device(device), profile_every
        self._on_cuda = self.device.type == "cuda"
        self._in_step = False

    def start_step(self, *, profile: bool = False) -> None:
        """Begin a step. If `profile`, count FLOPs and, on the CPU, memory. On CUDA, memory is always measured."""
        self._in_step, self._profiled = True, profile
        self._tracker: LiveStorage | None = None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []  # at both ends of each phase
        self._bytes: defaultdict[str, int] = defaultdict(int)
        self._flops: defaultdict[str, int] = defaultdict(int)
        if self._on_cuda:
            self._allocated = torch.cuda.memory_allocated(self.device)
        elif profile:
            self._tracker = LiveStorage()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Context manager that measures its block as phase `name`."""
        if not self._in_step:
            yield
            return
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            start = self._event()
        began = time.perf_counter()
        if self._tracker is not None:
            self._tracker.restart()
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        counter.mod_tracker = _NoModules()
        with self._tracker or nullcontext(), counter if self._profiled else nullcontext():
            yield
        if self._profiled:
            self._flops[name] += counter.get_total_flops()
        if self._on_cuda:
            self._events.append((name, start, self._event()))
            peak = torch.cuda.max_memory_allocated(self.device) - self._allocated
            self._bytes[name] = max(self._bytes[name], peak)
            return
        self._seconds[name] += time.perf_counter() - began
        if self._tracker is not None:
            self._bytes[name] = max(self._bytes[name], self._tracker.peak)

    def _event(self) -> torch.cuda.Event:
        """Return an event at the present end of the device's queue of work."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def finish_step(self) -> dict[str, float]:
        """End the step; return its metrics by name.

        On CUDA, the host must have waited for the end of the last phase; `fit` has when it reads the gradient's norm.

        Every phase has `gflops/<phase>` on profiled steps and `seconds/<phase>` on other steps. On CUDA, every step has
        `memory_mib/<phase>` too; on the CPU, only profiled steps have it.
        """
        self._in_step, self._tracker = False, None
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        report = {} if self._profiled else {f"seconds/{name}": value for name, value in self._seconds.items()}
        report |= {f"memory_mib/{name}": size / MIB for name, size in self._bytes.items()}
        return report | {f"gflops/{name}": count / 1e9 for name, count in self._flops.items()}
