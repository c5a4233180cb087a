"""Count the cost of a workload on fake tensors (no weights, no GPU), or measure it with random weights on CUDA.

Counted bytes are the storages of all live tensors at the peak. The count excludes workspaces of operators and
fragmentation of the allocator. Operations are counted in two ways, called F2 and M0:

- F2: FLOPs of matrix products, convolutions and attention, with two FLOPs per multiply-accumulate. F2 includes the
  blocks recomputed by gradient checkpointing. Flash attention's backward pass recomputes attention scores and is
  counted as 2.5 times the FLOPs of the forward pass.
- M0: multiply-accumulates without attention. Most tools that papers use report M0.

Time on an H100 SXM is modelled from the kernels, one for each operator of torch that is not a view. A kernel takes the
longest of: its FLOPs at 65 % of the peak rate of its dtype (bfloat16 989 TFLOP/s, float32 67, float32 convolutions 495
in TF32, torch's default); the bytes of its inputs and outputs at 80 % of 3.35 TB/s; and 4 microseconds, a launch. The
model knows no caches, no fusion (`--memory.compile`) and no waits of the host.

Measured bytes are those of the CUDA caching allocator. Measured time is the median over runs, from CUDA events.
"""

import multiprocessing
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, shape_wrapper
from tqdm import tqdm

from dinalrm_align.align.savings.config import FULL, Architecture, Case
from dinalrm_align.align.savings.workloads import build_networks, workload_of
from dinalrm_align.models.quantization import check_quantization
from dinalrm_align.train.cost import CPU_ATTENTION, LiveStorage, tensors_among

FLASH_BACKWARD, MATH_BACKWARD = 2.5, 2.0
"""Attention's backward FLOPs per forward FLOP, if scores are recomputed (flash attention) or stored (math)."""
MATRIX, MATRIX_REPEATS = 8192, 20
NOT_MEASURED = "int8 weights are counted, not measured"
aten = torch.ops.aten
PEAK, PEAK_FLOAT32, PEAK_TF32 = {torch.bfloat16: 989e12, torch.float16: 989e12}, 67e12, 495e12
BANDWIDTH, COMPUTE, TRAFFIC, LAUNCH = 3.35e12, 0.65, 0.8, 4e-6
"""Model of an H100 SXM: bytes/s, reached shares of peak FLOPs and of peak bandwidth, seconds per launch."""
NO_KERNEL = {
    "aten::empty", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided", "aten::empty_like",
    "aten::_unsafe_view", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::is_same_size",
}  # fmt: skip
FORMULAS = {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()}}


class FakeFloats(TorchDispatchMode):
    """A dispatch mode in which floating-point tensors have no storage. Activate it by `with fake.active(): ...`.

    Floating-point tensors become torch's FakeTensor on the CPU. There, fused attention stores as much for the backward
    pass as flash attention on a GPU. (On the meta device, attention would store the score matrix.) Integer tensors, and
    masks computed from integer tensors, are real, so that code can branch on token ids and index with them. `item()` of
    a fake tensor returns a dummy value: True, 0 or 1.0, depending on the dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.fake, self:
            yield

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor like `tensor`, or real zeros if its dtype is bool or an integer wider than 8 bits."""
        if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.int8):
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        with self.fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_among((args, kwargs))
        fakes = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not fakes and (tensors or _makes_integers(func, kwargs.get("dtype"))):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _mask_as_indices(index)])
        if fakes < len(tensors):
            args, kwargs = tree_map_only(Tensor, self._as_fake, (args, kwargs))
        return func(*args, **kwargs)

    def _as_fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor, static_shapes=True)


def _makes_integers(func: Any, dtype: torch.dtype | None) -> bool:
    integer_factories = ("aten::randint", "aten::arange", "aten::randperm")  # unless another dtype is given
    return func.name().startswith(integer_factories) if dtype is None else not dtype.is_floating_point


def _mask_as_indices(index: Tensor | None) -> Iterable[Tensor | None]:
    """Convert a real (not fake) boolean mask to integer indices of its True elements; return other indices as is."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with _disable_current_modes():
        return index.nonzero(as_tuple=True)


@dataclass(frozen=True)
class Cost:
    """Counted cost of one run of a workload.

    Args:
        weights: bytes of the weights on the device.
        state: bytes of the optimiser's moments.
        activations: bytes of all other tensors at the peak.
        f2: FLOPs of matrix products, convolutions and attention, recomputation included; two per multiply-accumulate.
        f2_kept: the value f2 would have if attention stored its score matrix instead of recomputing it.
        m0: multiply-accumulates without attention.
        attention: FLOPs of attention, included in f2.
        kernels: number of kernels.
        moved: bytes of all kernels' inputs and outputs.
        seconds: modelled time on an H100.
    """

    weights: int
    state: int
    activations: int
    f2: int
    f2_kept: int
    m0: int
    attention: int
    kernels: int = 0
    moved: int = 0
    seconds: float = 0.0

    @property
    def memory(self) -> int:
        return self.weights + self.state + self.activations


class OperationCounter(LiveStorage):
    """A dispatch mode that tracks live bytes and counts kernels and FLOPs, faster than torch's FlopCounterMode."""

    def __init__(self) -> None:
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.operations: Counter[str] = Counter()
        self.kernels, self.moved, self.seconds = 0, 0, 0.0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # fast path, called very often
        result = super().__torch_dispatch__(func, types, args, kwargs)
        formula, flops = FORMULAS.get(func._overloadpacket), 0
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=result)
            self.operations[str(func._overloadpacket)] += flops
        if not _is_view(func):
            self._launch(func.name(), flops, tensors_among((args, kwargs, result)))
        return result

    def _launch(self, name: str, flops: int, tensors: Sequence[Tensor]) -> None:
        """Add one kernel. An expanded tensor counts with the bytes of its storage."""
        moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
        peak = PEAK.get(dtype, PEAK_TF32 if name.startswith("aten::convolution") else PEAK_FLOAT32)
        self.kernels += 1
        self.moved += moved
        self.seconds += max(flops / (peak * COMPUTE), moved / (BANDWIDTH * TRAFFIC), LAUNCH)

    def totals(self) -> dict[str, int | float]:
        """Return the counts so far as a dict of the fields of `Cost` that are not bytes of memory."""
        attention = {name: count for name, count in self.operations.items() if "scaled_dot_product" in name}
        backward = sum(count for name, count in attention.items() if "backward" in name)
        recomputed = round(backward * (1 - MATH_BACKWARD / FLASH_BACKWARD))
        total, inside = self.operations.total(), sum(attention.values())
        operations = dict(f2=total, f2_kept=total - recomputed, m0=(total - inside) // 2, attention=inside)
        return operations | dict(kernels=self.kernels, moved=self.moved, seconds=self.seconds)


@cache
def _is_view(func: Any) -> bool:
    """Return whether an operator launches no kernel: it returns a view, or memory that it does not write."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return func._schema.name in NO_KERNEL or any(alias is not None and not alias.is_write for alias in aliases)


def count(case: Case, architecture: Architecture) -> Cost:
    """Return the cost of running the configuration's workload once, after AdamW's moments have been allocated."""
    fake = FakeFloats()
    networks = build_networks(architecture, case, fake.empty_like)
    counter = OperationCounter()
    with fake.active():
        prepare, run = workload_of(networks)
        with counter:
            prepare()
            state = counter.live
            counter.restart()
            counter.clear()
            run()
    return Cost(networks.weight_bytes(), state, counter.peak - state, **counter.totals())


def count_all(cases: Sequence[Case], *, workers: int) -> dict[Case, Cost]:
    """Count the cost of every configuration with full-size networks in `workers` processes. Returns {case: cost}."""
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(count, case, FULL): case for case in cases}
        done = tqdm(as_completed(futures), total=len(futures), desc="counted", dynamic_ncols=True)
        return {futures[future]: future.result() for future in done}


@dataclass(frozen=True)
class Measured:
    """Median time in ms, peak bytes of CUDA tensors (`memory`), and peak bytes reserved by torch (`reserved`)."""

    memory: int
    reserved: int
    milliseconds: float

    def teraflops(self, f2: int) -> float:
        return f2 / self.milliseconds / 1e9


def measure(case: Case, architecture: Architecture, *, warmup: int, repeats: int) -> Measured:
    """Run a workload with random weights on the CUDA GPU: first `warmup` unmeasured runs, then `repeats` measured runs.

    Raises ValueError if weights are int8, whose cost can be counted, but not measured, and ImportError if weights are
    nf4 and bitsandbytes is not installed.
    """
    for kind in (case.base_quant, case.reward_quant):
        check_quantization(kind)
        if kind == "int8":
            raise ValueError(NOT_MEASURED)
    generator = torch.Generator("cuda").manual_seed(0)

    def make(tensor: Tensor) -> Tensor:
        new = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cuda")
        return new.normal_(0, 0.02, generator=generator) if tensor.is_floating_point() else new

    prepare, run = workload_of(build_networks(architecture, case, make, "cuda"))
    prepare()
    for _ in range(warmup):
        run()
    return _timed(run, repeats)


def measure_all(cases: Sequence[Case], *, warmup: int, repeats: int) -> dict[Case, Measured | str]:
    """Measure every configuration with full-size networks. Returns {case: measurement, or error message}."""
    found: dict[Case, Measured | str] = {}
    for case in tqdm(cases, desc="measured", dynamic_ncols=True):
        try:
            found[case] = measure(case, FULL, warmup=warmup, repeats=repeats)
        except torch.OutOfMemoryError:
            found[case] = "out of memory"
        except (ImportError, ValueError) as error:  # quantised weights
            found[case] = str(error)
        torch.cuda.empty_cache()
    return found


def _timed(run: Callable[[], object], repeats: int) -> Measured:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    milliseconds = statistics.median(begin.elapsed_time(end) for begin, end in events)
    return Measured(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved(), milliseconds)


def matrix_rate() -> float:
    """Return the TFLOP/s of an 8192 x 8192 bfloat16 matrix product on the CUDA GPU, as a practical upper limit."""
    left, right = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    for _ in range(3):
        left @ right
    measured = _timed(lambda: [left @ right for _ in range(MATRIX_REPEATS)], repeats=5)
    return measured.teraflops(2 * MATRIX**3 * MATRIX_REPEATS)
