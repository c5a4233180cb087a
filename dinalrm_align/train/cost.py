"""What a training step costs, phase by phase: seconds, peak memory, floating-point operations.

Memory is what a phase holds at its worst above what was held when the step began (weights, optimiser state), in MiB:
the activations. On CUDA it is the allocator's own count and free of charge, so that every step reports it. On the CPU
it is the sum of live tensor storages, watched by a `TorchDispatchMode`; that slows a step about twofold, so that only
profiled steps report it (and their seconds are left out). It sees every tensor that an operator returns, neither the
workspace inside an operator nor the allocator's fragmentation.

FLOPs are those of matrix products, convolutions and attention, as they are executed: two per multiply-accumulate, the
recomputation of checkpointed blocks included, element-wise work left out. They are counted on profiled steps, by
torch's `FlopCounterMode`, which has no formula for the CPU's attention kernels; here they are.
"""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

MIB = 2**20
GIGA = 1e9

Shape = Sequence[int]


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Attention of query (B, H, Q, D) to key (B, H, K, D), value (B, H, K, V): scores and their product with value."""
    batch, heads, queries, depth = query
    return 2 * batch * heads * queries * key[-2] * (depth + value[-1])


def attention_backward_flops(_: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any) -> int:
    """Its backward: the scores again, then the gradients of scores, value, query and key."""
    batch, heads, queries, depth = query
    return 2 * batch * heads * queries * key[-2] * (3 * depth + 2 * value[-1])


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def tensors_among(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operator is given or gives: themselves, and those in its lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_among(value)


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
        given = {tensor.untyped_storage()._cdata for tensor in tensors_among((*args, *kwargs.values()))}
        result = func(*args, **kwargs)
        for tensor in tensors_among((result,)):
            self._count(tensor.untyped_storage(), given)
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


class _OneScope(ModuleTracker):
    """Knows no modules. The tracker that a flop counter comes with puts hooks on their inputs and outputs, which keep
    alive what checkpointing recomputes in the backward pass: a profiled step would show twice its memory.
    """

    def __enter__(self) -> "_OneScope":
        return self

    def __exit__(self, *args: object) -> None:
        pass


class PhaseMeter:
    """Seconds, peak memory and FLOPs of the named phases of a step; phases of one name add up within a step.

        meter.start_step(profile=step % 25 == 1)
        with meter.phase("rollout"):
            ...
        metrics |= meter.finish_step()      # {"memory_mib/rollout": 310.0, "gflops/rollout": 54.2}

    Outside a step phases are not measured, so that an evaluation may run the same code. Phases do not nest.
    """

    def __init__(self, device: torch.device | str, profile_every: int = 0) -> None:
        """profile_every: steps between two that `loop.fit` profiles, the first included; 0: none."""
        self.device = torch.device(device)
        self.profile_every = profile_every
        self._on_cuda = self.device.type == "cuda"
        self._in_step = False
        self._profiled = False
        self._tracker: LiveStorage | None = None
        self._held = 0
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}
        self._flops: dict[str, int] = {}

    def start_step(self, *, profile: bool = False) -> None:
        """Begin a step. profile: count FLOPs in it, and on the CPU watch memory (on CUDA that is always watched)."""
        self._in_step, self._profiled = True, profile
        self._seconds, self._bytes, self._flops = {}, {}, {}
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
        if self._tracker is not None:
            self._tracker.restart()
        with self._tracker or nullcontext(), self._counting(name):
            yield
        if self._on_cuda:
            torch.cuda.synchronize(self.device)
            self._note_peak(name, torch.cuda.max_memory_allocated(self.device) - self._held)
        elif self._tracker is not None:
            self._note_peak(name, self._tracker.peak)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def _counting(self, name: str) -> Iterator[None]:
        """Add what is computed meanwhile to the phase's FLOPs, in a profiled step."""
        if not self._profiled:
            yield
            return
        counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        counter.mod_tracker = _OneScope()
        with counter:
            yield
        self._flops[name] = self._flops.get(name, 0) + counter.get_total_flops()

    def _note_peak(self, name: str, size: int) -> None:
        self._bytes[name] = max(self._bytes.get(name, 0), size)

    def finish_step(self) -> dict[str, float]:
        """End the step: per phase its seconds (not of a step slowed by profiling), MiB where known, and of a profiled
        step GFLOPs.
        """
        self._in_step, self._tracker = False, None
        report = {} if self._profiled else {f"seconds/{name}": value for name, value in self._seconds.items()}
        report |= {f"memory_mib/{name}": size / MIB for name, size in self._bytes.items()}
        return report | {f"gflops/{name}": count / GIGA for name, count in self._flops.items()}
