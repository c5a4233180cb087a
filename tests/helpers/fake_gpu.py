"""A CUDA GPU that is not there: finds tensors on the wrong device, and counts how often the host waits for the GPU.

    with FakeGpu() as gpu:
        main(["--device=cuda", ...])
    assert not gpu.faults, gpu.report()

Every tensor is on the CPU, and every value is that of the CPU's kernels. Storages that code sends to "cuda" get a tag,
and `tensor.device` answers cuda:0 for them (`fake_torch.py`). A dispatch mode looks at the storages of every operator's
tensors: in the forward pass, in the backward pass, in recomputation, and in threads that start inside the context.

`faults`: what CUDA would refuse, or would compute from data that is not there.
    - tensors of two devices in one operator. As on CUDA, a 0-dim CPU tensor may enter a pointwise operator that writes
      to the GPU, a CPU index may index a GPU tensor, and `copy_` copies between devices;
    - a random generator of another device than the tensor;
    - `numpy()` or `pin_memory()` of a GPU tensor;
    - the result of a `non_blocking` copy to the CPU, or the time of an event, read before the host has waited for it.
`waits`: calls that stop the host until the GPU has done all earlier work, to read a value or to synchronise.
`uploads`: copies to the GPU without `non_blocking`, which stop the host in the same way.

A tensor that C++ code makes inside an operator (zeros for an undefined gradient, a causal mask) has no known device,
and takes that of the tensors that it meets. Not checked: what CUDA kernels demand of dtypes and sizes, memory, several
streams or GPUs, the values of CUDA's random numbers, and autocast("cuda"), which is autocast("cpu") here.

Import bitsandbytes, diffusers and peft before entering: bitsandbytes looks for CUDA's libraries when torch has CUDA.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate.state import AcceleratorState, GradientState
from fake_torch import REAL, cuda_functions, generator_on_gpu, mark, memory_of, on_gpu, tensor_methods, torch_functions
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = f"{Path(__file__).parents[2]}/"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor}
INDEX_WRITING = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
TAKES_CPU_SCALAR = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}  # and pointwise operators
READS_BACK = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.allclose.default, aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default,
    aten.unique_consecutive.default, aten.bincount.default, aten.repeat_interleave.Tensor, aten.multinomial.default,
}  # fmt: skip


class FakeGpu:
    """Context manager in which torch has one CUDA GPU (see the module's docstring).

    strict: raise RuntimeError at the first fault, for its traceback.
    """

    def __init__(self, *, strict: bool = False) -> None:
        self.strict, self.operators = strict, 0
        self.faults, self.waits, self.uploads = Counter[str](), Counter[str](), Counter[str]()
        self.queued = self.reached = 0  # asynchronous copies and events: how many there are, how many have completed
        self._stack = ExitStack()

    def __enter__(self) -> "FakeGpu":
        forget_accelerator()
        self._stack.callback(forget_accelerator)
        for owner, names in (
            (Tensor, tensor_methods(self)),
            (torch, torch_functions(self)),
            (torch.cuda, cuda_functions(self)),
            (torch._C, {"_group_tensors_by_device_and_dtype": _grouped(torch._C._group_tensors_by_device_and_dtype)}),
            (torch.autocast, {"__init__": _on_cpu(torch.autocast.__init__)}),
            (threading.Thread, {"_bootstrap_inner": self._checked(threading.Thread._bootstrap_inner)}),
        ):
            for name, value in names.items():
                self._stack.enter_context(patch.object(owner, name, value, create=True))
        self._stack.enter_context(_Operators(self))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _checked(self, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        def checked(thread: threading.Thread) -> None:
            with _Operators(self):
                run(thread)

        return checked

    def report(self, most: int = 40) -> str:
        """Return faults, waits and uploads by place, the most frequent first."""
        lines = [f"{self.operators} operators on the fake GPU"]
        for name, counter in (("faults", self.faults), ("waits", self.waits), ("uploads", self.uploads)):
            lines.append(f"{counter.total()} {name} at {len(counter)} places")
            lines += [f"{count:7d}  {what}" for what, count in counter.most_common(most)]
        return "\n".join(lines)

    # ------------------------------------------------------------------ what is recorded

    def fault(self, what: str) -> None:
        self.faults[f"{what} @ {place()}"] += 1
        if self.strict:
            raise RuntimeError(f"fake GPU: {what}")

    def wait(self, what: str) -> None:
        self.waits[f"{what} @ {place()}"] += 1
        self.reached = self.queued

    def upload(self, what: str) -> None:
        self.uploads[f"{what} @ {place()}"] += 1
        self.reached = self.queued

    def check_arrival(self, tensor: Tensor) -> None:
        """Record a fault if the tensor is a copy to the CPU that may not be complete."""
        if (memory := memory_of(tensor)).get("arrives", 0) > self.reached:
            self.fault("a non_blocking copy to the CPU is read before the host has waited for it")
            memory["arrives"] = 0

    def check_generator(self, what: str, generator: torch.Generator, to_gpu: bool | None) -> None:
        if to_gpu is not None and generator_on_gpu(generator) != to_gpu:
            self.fault(f"{what}: generator on {'cpu' if to_gpu else 'cuda'}, tensor on {'cuda' if to_gpu else 'cpu'}")

    def check_operator(self, func: Any, args: tuple, kwargs: dict[str, Any], strangers: list[Tensor]) -> None:
        """Check an operator that has a tensor on the GPU. strangers: its tensors on the CPU."""
        self.operators += 1
        if func in READS_BACK:
            self.wait(func._schema.name.removeprefix("aten::").replace("_local_scalar_dense", "item"))
        if func in COPIES:
            non_blocking = kwargs.get("non_blocking", len(args) > 2 and args[2])
            if any(each is strangers[0] for each in _flat(args[:1])) if strangers else False:
                self.wait("copy_ to the CPU")
            elif strangers and strangers[0].dim() and not non_blocking:
                self.upload("copy_")
            return
        if func in INDEXING | INDEX_WRITING:
            strangers = self._check_index(func, args, strangers)
        elif strangers and (torch.Tag.pointwise in func.tags or func in TAKES_CPU_SCALAR):
            given = dict(zip((each.name for each in func._schema.arguments), args)) | kwargs
            written = [given.get(each.name) for each in func._schema.arguments if each.is_write]
            strangers = [each for each in strangers if each.dim() or _among(each, written)]
        if strangers:
            shapes = ", ".join(f"{str(each.dtype)[6:]} {tuple(each.shape)}" for each in strangers[:3])
            self.fault(f"{func}: tensors on cuda and cpu in one operator; on cpu: {shapes}")

    def _check_index(self, func: Any, args: tuple, strangers: list[Tensor]) -> list[Tensor]:
        """Record what reading or writing at indices costs. Return the tensors that must not be on the CPU."""
        indices = [index for index in args[1] if index is not None]
        filled = func in INDEX_WRITING and args[2].numel() == 1  # with one value, CUDA fills instead of indexing
        for index in indices:
            if index.dtype in (torch.bool, torch.uint8) and not filled:
                self.wait("index by a mask")
            elif on_gpu(index) is False:
                self.upload("index on the CPU")
        allowed = [] if _among(args[0], strangers) else [*indices, *(args[2:3] if filled else ())]
        return [each for each in strangers if not _among(each, allowed)]

    def move(self, tensor: Tensor, to_gpu: bool, options: dict[str, Any], non_blocking: bool = False) -> Tensor:
        """Return a copy on the other device; a tensor that is there already is only converted."""
        here = on_gpu(tensor)
        if here is None or here == to_gpu:
            moved = REAL["to"](tensor, **options) if options else tensor
            if here is None:
                mark(moved, to_gpu)
            return moved
        self.check_arrival(tensor)
        copied = _Move.apply(tensor, self, here, options)
        if non_blocking and not to_gpu:
            self.queued += 1
            memory_of(copied)["arrives"] = self.queued
        elif not to_gpu:
            self.wait("copy to the CPU")
        elif not non_blocking:
            self.upload("copy to the GPU")
        return copied


class _Operators(TorchDispatchMode):
    """Checks the devices of every operator's tensors, and tags its results."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = _flat((*args, *kwargs.values()))
        tensors = [each for each in given if isinstance(each, Tensor)]
        places = [on_gpu(tensor) for tensor in tensors]
        any_gpu, any_cpu = True in places, False in places
        if any_cpu:
            for tensor in tensors:
                self.gpu.check_arrival(tensor)
        if tensors:
            for generator in (each for each in given if isinstance(each, torch.Generator)):
                self.gpu.check_generator(str(func), generator, places[0])
        if any_gpu:
            strangers = [tensor for tensor, place in zip(tensors, places) if place is False]
            self.gpu.check_operator(func, args, kwargs, strangers)
        result = func(*args, **kwargs)
        if (any_gpu or not any_cpu) and func not in COPIES:
            known = [tensor for tensor, place in zip(tensors, places) if place is not None]
            for made in _flat((result,)):
                if isinstance(made, Tensor) and not _among(made, known):
                    mark(made, True if any_gpu else on_gpu(made) or None)
        return result


class _Move(torch.autograd.Function):
    """A copy to the other device. The gradient is copied back."""

    @staticmethod
    def forward(ctx, tensor: Tensor, gpu: FakeGpu, here: bool, options: dict[str, Any]) -> Tensor:
        ctx.gpu, ctx.here, ctx.dtype = gpu, here, tensor.dtype
        copied = REAL["to"](tensor.detach(), **{"dtype": tensor.dtype, **options, "copy": True})
        mark(copied, not here)
        return copied

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.gpu.move(grad, ctx.here, {"dtype": ctx.dtype}), None, None, None


def _flat(values: Iterable[Any]) -> list[Any]:
    """Return an operator's arguments or results, of which lists are one level deep, as one list."""
    return [each for value in values for each in (value if isinstance(value, list | tuple) else (value,))]


def _among(tensor: Tensor, others: Iterable[Any]) -> bool:
    return any(tensor is other for other in others)


def _grouped(group: Callable[..., dict]) -> Callable[..., dict]:
    """Return torch's grouping of an optimiser's tensors with the devices that Python sees."""

    def grouped(lists: list[list[Tensor]], *args: Any) -> dict:
        groups = group(lists, *args).items()
        return {(members[0][0][0].device, dtype): members for (_, dtype), members in groups}

    return grouped


def _on_cpu(init: Callable[..., None]) -> Callable[..., None]:
    def autocast(this: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(this, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return autocast


def forget_accelerator() -> None:
    """Let the next `Accelerator` look for devices again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def place(most: int = 3) -> str:
    """Return the lines of this project that are being run, the innermost first, without those of the fake GPU."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < most:
        path = frame.f_code.co_filename
        if path.startswith(ROOT) and not path.endswith(("/fake_gpu.py", "/fake_torch.py")):
            found.append(f"{path.removeprefix(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(found) or "outside this project"
