"""The cost of a case: counted on fake tensors (no weights, no GPU), or measured with random weights.

Counted bytes are live storages at the peak (`cost.LiveStorage`), without workspaces inside operators and allocator
fragmentation. Operations have two conventions. F2: two per multiply-accumulate of matrix products, convolutions and
attention as executed, including recomputed blocks and the scores that flash attention recomputes in its backward pass
(2.5 times its forward). M0: multiply-accumulates without attention, as tools commonly used in papers report.

Measured bytes are those of the CUDA caching allocator, and time is the median between CUDA events after warm-up. On the
CPU (small networks, to check the count) bytes come from the profiler and include operators' workspaces.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry, shape_wrapper

from dinalrm_align.align.savings.config import Architecture, Case
from dinalrm_align.align.savings.fake_tensors import FakeFloats
from dinalrm_align.align.savings.workloads import build_networks, workload_of
from dinalrm_align.train.cost import CPU_ATTENTION, LiveStorage

FLASH_BACKWARD, MATH_BACKWARD = 2.5, 2.0
"""FLOPs of attention's backward pass over its forward: with recomputed scores, and with stored scores."""
MATRIX, MATRIX_REPEATS = 8192, 20
FORMULAS = {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()}}


@dataclass(frozen=True)
class Cost:
    """Counted cost of a case, in bytes and operations.

    Args:
        weights: of the networks on the device.
        state: of the optimiser's moments.
        activations: peak above both.
        f2, m0: see above.
        f2_kept: f2 if attention stored its scores.
        attention: attention's part of f2.
    """

    weights: int
    state: int
    activations: int
    f2: int
    f2_kept: int
    m0: int
    attention: int

    @property
    def memory(self) -> int:
        """Bytes at the peak."""
        return self.weights + self.state + self.activations


class Counter(LiveStorage):
    """Tracks live storages and counts operations by operator, in half the time of torch's own counter."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # fast path, called very often
        result = super().__torch_dispatch__(func, types, args, kwargs)
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            name = str(func._overloadpacket)
            self.operations[name] = self.operations.get(name, 0) + formula(*args, **(kwargs or {}), out_val=result)
        return result

    def totals(self) -> dict[str, int]:
        """f2, f2_kept, m0 and attention so far."""
        total = sum(self.operations.values())
        attention = {name: count for name, count in self.operations.items() if "scaled_dot_product" in name}
        backward = sum(count for name, count in attention.items() if "backward" in name)
        recomputed = round(backward * (1 - MATH_BACKWARD / FLASH_BACKWARD))
        inside = sum(attention.values())
        return {
            "f2": total,
            "f2_kept": total - recomputed,
            "m0": (total - inside) // 2,
            "attention": inside,
        }


def count(case: Case, architecture: Architecture) -> Cost:
    """Count one run of the case's workload; for updates, one after the first."""
    fake = FakeFloats()
    networks = build_networks(architecture, case, fake.empty_like)
    counter = Counter()
    with fake.active():
        workload = workload_of(networks)
        with counter:
            workload.prepare()
            state = counter.live
            counter.restart()
            counter.operations.clear()
            workload.run()
    return Cost(networks.weight_bytes(), state, counter.peak - state, **counter.totals())


@dataclass(frozen=True)
class Measured:
    """Measured cost. memory: bytes at the peak, including weights; reserved: by the allocator, None on a CPU."""

    memory: int
    reserved: int | None
    milliseconds: float

    def teraflops(self, f2: int) -> float:
        """TFLOP/s, given the counted operations."""
        return f2 / self.milliseconds / 1e9


def random_weights(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A factory for `build_networks`: normal with a standard deviation of 0.02 and a fixed seed; integers are 0."""
    generator = torch.Generator(device).manual_seed(0)

    def make(tensor: Tensor) -> Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return new.normal_(0, 0.02, generator=generator) if tensor.is_floating_point() else new

    return make


def measure(
    case: Case, architecture: Architecture, device: torch.device | str, *, warmup: int = 2, repeats: int = 5
) -> Measured:
    """Run the case's workload `warmup` times, then measure it `repeats` times. Raises ValueError for quantised weights,
    which are counted with stand-ins and have no kernels here.
    """
    device = torch.device(device)
    if case.base_quant != "none" or case.reward_quant != "none":
        raise ValueError(f"{case}: quantised weights are counted, not measured; leave base_quant and reward_quant out")
    networks = build_networks(architecture, case, random_weights(device), device)
    workload = workload_of(networks)
    workload.prepare()
    for _ in range(warmup):
        workload.run()
    if device.type == "cuda":
        return _on_cuda(workload.run, device, repeats)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        workload.run()
        seconds.append(time.perf_counter() - began)
    held = networks.weight_bytes()
    if case.trains:
        held += sum(8 * p.numel() for p in networks.policy.parameters.values())  # AdamW's moments, float32
    return Measured(held + profiled_peak(workload.run), None, 1e3 * statistics.median(seconds))


def _on_cuda(run: Callable[[], object], device: torch.device, repeats: int) -> Measured:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    events = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize(device)
    return Measured(
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        statistics.median(begin.elapsed_time(end) for begin, end in events),
    )


def profiled_peak(run: Callable[[], object]) -> int:
    """Peak bytes on the CPU above those held before `run`, from the profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def matrix_rate(device: torch.device | str) -> float:
    """TFLOP/s of a product of two bfloat16 matrices of 8192 x 8192, an upper bound for networks on this CUDA device."""
    device = torch.device(device)
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    measured = _on_cuda(lambda: [left @ right for _ in range(MATRIX_REPEATS)], device, repeats=5)
    return measured.teraflops(2 * MATRIX**3 * MATRIX_REPEATS)
