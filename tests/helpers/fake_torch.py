"""What torch answers on the fake GPU (`fake_gpu.py`): devices of tensors, copies, factories, `torch.cuda`.

Each function returns {name: replacement} for a `FakeGpu`, which records faults, waits and uploads. A replacement holds
in every thread and inside functions of torch, where a TorchFunctionMode would not be active.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
REAL = {name: getattr(Tensor, name) for name in ("device", "to", "numpy", "tolist", "__array__", "__deepcopy__")}
RealGenerator = torch.Generator
LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")
FROM_DATA = ("tensor", "as_tensor", "asarray", "new_tensor")
MEMORY = ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
IDLE = (
    "set_device", "empty_cache", "reset_peak_memory_stats", "_lazy_init", "set_rng_state", "set_rng_state_all",
    "manual_seed", "manual_seed_all", "ipc_collect", "init",
)  # fmt: skip


def memory_of(tensor: Tensor) -> dict[str, Any]:
    """Return the attributes of a tensor's storage, which all its views share; {} if it has no plain storage."""
    try:
        return vars(tensor.untyped_storage())
    except NotImplementedError:  # sparse and opaque tensors
        return {}


def on_gpu(tensor: Tensor) -> bool | None:
    """Return whether a tensor is on the GPU; None if its device is not known yet."""
    return memory_of(tensor).get("on_gpu", False)


def mark(tensor: Tensor, place: bool | None) -> None:
    if not tensor.is_meta:
        memory_of(tensor)["on_gpu"] = place


def is_gpu(device: Any) -> bool:
    return isinstance(device, int) or torch.device(device).type == "cuda"


class _AnyGenerator(type(RealGenerator)):
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, RealGenerator)


GPU_GENERATORS: set[int] = set()
"""Addresses of generators on the GPU. Operators get another Python object for a generator, with the same address."""


class Generator(RealGenerator, metaclass=_AnyGenerator):
    """A CPU generator that knows the device it was asked for."""

    def __new__(cls, device: torch.device | str = "cpu") -> "Generator":
        generator = super().__new__(cls, "cpu")
        if is_gpu(device):
            GPU_GENERATORS.add(generator._cdata)
            weakref.finalize(generator, GPU_GENERATORS.discard, generator._cdata)
        return generator

    @property
    def device(self) -> torch.device:
        return CUDA if generator_on_gpu(self) else CPU


def generator_on_gpu(generator: RealGenerator) -> bool:
    return generator._cdata in GPU_GENERATORS


def device_of(this: Tensor) -> torch.device:
    found = REAL["device"].__get__(this)
    return CUDA if found.type == "cpu" and on_gpu(this) is not False else found


def tensor_methods(gpu: Any) -> dict[str, Any]:
    """Return methods and properties of `Tensor`."""

    def to(this: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        if isinstance(other := kwargs.pop("other", args[0] if args else None), Tensor):
            args = (other.device, other.dtype, *args[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[:3], **kwargs)
        copy = copy or (len(args) > 3 and args[3])
        if this.is_meta or (device is not None and device.type == "meta"):
            return REAL["to"](this, *args[:3], copy=copy, **kwargs)
        options = {"dtype": dtype, "memory_format": memory_format, "copy": copy or None}
        options = {name: value for name, value in options.items() if value is not None}
        if copy:
            options["dtype"] = dtype or this.dtype
        return gpu.move(this, on_gpu(this) if device is None else device.type == "cuda", options, non_blocking)

    def host_only(name: str) -> Callable[..., Any]:
        def method(this: Tensor, *args: Any, **kwargs: Any) -> Any:
            gpu.check_arrival(this)
            if on_gpu(this):
                gpu.fault(f"{name}() of a GPU tensor")
            return REAL[name](this, *args, **kwargs)

        return method

    def tolist(this: Tensor) -> Any:
        gpu.check_arrival(this)
        if on_gpu(this) and this.dim():  # a 0-dim tensor is read by `item`
            gpu.wait("tolist")
        return REAL["tolist"](this)

    def deepcopy(this: Tensor, memo: dict[int, Any]) -> Tensor:
        copied = REAL["__deepcopy__"](this, memo)
        mark(copied, on_gpu(this))
        return copied

    def pin_memory(this: Tensor, *args: Any) -> Tensor:
        if on_gpu(this):
            gpu.fault("pin_memory() of a GPU tensor")
        pinned = this.clone()
        memory_of(pinned)["pinned"] = True
        return pinned

    return {
        "device": property(device_of),
        "is_cuda": property(lambda this: device_of(this).type == "cuda"),
        "is_cpu": property(lambda this: device_of(this).type == "cpu"),
        "get_device": lambda this: 0 if device_of(this).type == "cuda" else -1,
        "to": to,
        "type_as": to,
        "cuda": lambda this, device=None, non_blocking=False, **kwargs: gpu.move(this, True, kwargs, non_blocking),
        "cpu": lambda this, **kwargs: gpu.move(this, False, kwargs),
        "numpy": host_only("numpy"),
        "__array__": host_only("__array__"),
        "tolist": tolist,
        "__deepcopy__": deepcopy,
        "pin_memory": pin_memory,
        "is_pinned": lambda this, *args: memory_of(this).get("pinned", False),
        "record_stream": lambda this, stream: None,
        **{name: _factory(gpu, getattr(Tensor, name)) for name in NEW},
    }


def _factory(gpu: Any, make: Callable[..., Any]) -> Callable[..., Any]:
    """Return `make`, a function that makes a tensor, with device="cuda" and with its generator checked."""
    name = make.__name__

    def factory(*args: Any, **kwargs: Any) -> Any:
        source = args[0] if args and isinstance(args[0], Tensor) else None
        device, pinned = kwargs.pop("device", None), kwargs.pop("pin_memory", False)
        to_gpu = is_gpu(device) if device is not None else source is not None and on_gpu(source)
        if kwargs.get("generator") is not None:
            gpu.check_generator(name, kwargs["generator"], to_gpu)
        if name in FROM_DATA and name != "new_tensor" and source is not None:
            if device is not None:
                source = gpu.move(source, to_gpu, {})
            return source if name != "tensor" and not kwargs else make(source, *args[1:], **kwargs)
        if name in FROM_DATA:
            for each in tree_leaves(args[-1:]):
                if isinstance(each, Tensor) and on_gpu(each):
                    gpu.wait(f"item, by {name}(...)")
            if to_gpu:
                gpu.upload(f"{name}(...)")
        if device is not None:
            kwargs["device"] = CPU if is_gpu(device) else device
        made = make(*args, **kwargs)
        mark(made, to_gpu)
        if pinned:
            memory_of(made)["pinned"] = True
        return made

    return factory


def torch_functions(gpu: Any) -> dict[str, Any]:
    """Return functions and classes of `torch`."""

    def on_cpu(name: str) -> Callable[..., Any]:
        real = getattr(torch, name)
        return lambda device="cuda": real("cpu" if device == "cuda" else device)

    factories = (*LIKE, *(each.__name__ for each in _device_constructors() if hasattr(torch, each.__name__)))
    return {
        "Generator": Generator,
        **{name: on_cpu(name) for name in ("is_autocast_enabled", "get_autocast_dtype")},
        **{name: _factory(gpu, getattr(torch, name)) for name in factories},
    }


def cuda_functions(gpu: Any) -> dict[str, Any]:
    """Return functions and classes of `torch.cuda`: one device of 80 GiB, on which no memory is in use."""

    class Event:
        """A point in the GPU's work. Its time can be read after the host has waited for it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.at = 0

        def record(self, stream: Any = None) -> None:
            gpu.queued += 1
            self.at = gpu.queued

        def query(self) -> bool:
            return self.at <= gpu.reached

        def synchronize(self) -> None:
            if not self.query():
                gpu.wait("Event.synchronize")

        def elapsed_time(self, end: "Event") -> float:
            """Return milliseconds: one for each event and asynchronous copy between the two events."""
            if not (self.query() and end.query() and self.at and end.at):
                gpu.fault("elapsed_time of an event that was not recorded, or that the host has not waited for")
            return float(end.at - self.at)

        def wait(self, stream: Any = None) -> None:
            pass

    class Stream:
        device = CUDA

        def synchronize(self) -> None:
            gpu.wait("Stream.synchronize")

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record()
            return event

        def wait_stream(self, stream: Any) -> None:
            pass

        wait_event = wait_stream

    stream, memory = Stream(), 80 << 30
    properties = SimpleNamespace(name="no GPU", major=9, minor=0, total_memory=memory, multi_processor_count=132)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "get_device_name": properties.name, "get_device_capability": (9, 0), "get_device_properties": properties,
        "mem_get_info": (memory, memory), "current_stream": stream, "default_stream": stream, "Stream": stream,
        **dict.fromkeys(MEMORY, 0), **dict.fromkeys(IDLE),
    }  # fmt: skip
    return {
        **{name: lambda *args, answer=answer, **kwargs: answer for name, answer in answers.items()},
        "Event": Event,
        "device": lambda *args: nullcontext(),
        "stream": lambda *args: nullcontext(),
        "synchronize": lambda *args: gpu.wait("synchronize"),
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
    }
