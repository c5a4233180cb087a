"""What a case costs when it is really run, on random weights: bytes, milliseconds, rates.

On CUDA bytes are the caching allocator's own, and time is the median between CUDA events after warm-up. On the CPU
(small stacks, to check the prediction) bytes are the profiler's, operators' workspaces included.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dinalrm_align.align.savings.architectures import Architecture
from dinalrm_align.align.savings.case import Case
from dinalrm_align.align.savings.subject import build_subject
from dinalrm_align.align.savings.work import work_of

MATRIX, MATRIX_REPEATS = 8192, 20


@dataclass(frozen=True)
class Measured:
    """memory: bytes at the peak, weights included. reserved: bytes that the allocator took for it; None on a CPU."""

    memory: int
    reserved: int | None
    milliseconds: float

    def teraflops(self, f2: int) -> float:
        """Per second, of a case that counts `f2` operations."""
        return f2 / self.milliseconds / 1e9


def random_weights(device: torch.device) -> Callable[[Tensor], Tensor]:
    """make for `build_subject`: normal with a standard deviation of 0.02, integers 0; the same in every run."""
    generator = torch.Generator(device).manual_seed(0)

    def make(tensor: Tensor) -> Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        return new.normal_(0, 0.02, generator=generator) if tensor.is_floating_point() else new

    return make


def measure(
    case: Case, architecture: Architecture, device: torch.device | str, *, warmup: int = 2, repeats: int = 5
) -> Measured:
    """Run the case `warmup` times, then `repeats` times watched. Raises ValueError for what cannot be run on `device`:
    quantised weights, which are counted with stand-ins and have no kernels here.
    """
    device = torch.device(device)
    if "none" != case.base_quant or "none" != case.reward_quant:
        raise ValueError(f"{case}: quantised weights are counted, not measured; leave base_quant and reward_quant out")
    subject = build_subject(architecture, case, random_weights(device), device)
    work = work_of(subject)
    work.prepare()
    for _ in range(warmup):
        work.run()
    if device.type == "cuda":
        return _on_cuda(work.run, device, repeats)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work.run()
        seconds.append(time.perf_counter() - began)
    held = subject.weight_bytes() + (_moment_bytes(subject.policy.parameters) if case.trains else 0)
    return Measured(held + profiled_peak(work.run), None, 1e3 * statistics.median(seconds))


def _moment_bytes(parameters: dict[str, Tensor]) -> int:
    """Of AdamW: two float32 numbers per trained one."""
    return 8 * sum(parameter.numel() for parameter in parameters.values())


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
    """The most bytes that `run` holds on the CPU above what was held before, by torch.profiler's memory events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def matrix_rate(device: torch.device | str) -> float:
    """TFLOP/s of a product of two bfloat16 matrices of 8192 x 8192 on a CUDA device, the most a network could reach."""
    device = torch.device(device)
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    measured = _on_cuda(lambda: [left @ right for _ in range(MATRIX_REPEATS)], device, repeats=5)
    return measured.teraflops(2 * MATRIX**3 * MATRIX_REPEATS)
