"""Run code on tensors that have shape, dtype and device but no storage: full-size networks in no memory, in seconds.

Floating-point tensors are fake (torch's FakeTensor on a fake CPU, whose fused attention saves as much for the backward
pass as the GPU's flash attention; the meta device would materialise the score matrix). Integer tensors, masks made of
them and literals are real, so that code may index and branch on tokens and grids. Reading a number off a fake tensor
returns a value that passes checks: True, 0 or 1.0.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from dinalrm_align.train.cost import tensors_among

aten = torch.ops.aten
INTEGER_FACTORIES = ("aten::randint", "aten::arange", "aten::randperm")
"""Factories that make integers unless another dtype is given."""


class _FakeFloatMode(TorchDispatchMode):
    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_among((args, kwargs))
        fakes = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not fakes and (tensors or _makes_integers(func, kwargs)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _passing_value(args[0].dtype)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _mask_as_indices(index)])
        if fakes < len(tensors):
            args, kwargs = tree_map(self._as_fake, (args, kwargs))
        return func(*args, **kwargs)

    def _as_fake(self, leaf: Any) -> Any:
        real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
        return self.fake.from_tensor(leaf, static_shapes=True) if real else leaf


def _makes_integers(func: Any, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return func.name().startswith(INTEGER_FACTORIES) if dtype is None else not dtype.is_floating_point


def _passing_value(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


def _mask_as_indices(index: Tensor | None) -> Iterable[Tensor | None]:
    """A real boolean mask as integer indices, as indexing converts it."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with _disable_current_modes():
        return index.nonzero(as_tuple=True)


class FakeFloats:
    """A mode in which floating-point tensors are fake: `with fake_floats.active(): ...`."""

    def __init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.fake, _FakeFloatMode(self.fake):
            yield

    def empty_like(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same shape and dtype; real zeros for integers, except packed weights (8 bits)."""
        if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.int8):
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        with self.fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def replace_tensors(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Replace every parameter and buffer by make(tensor); shared tensors stay shared.

    Returns the new tensors by the id of the old ones.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    new_ids: set[int] = set()
    for part in (part for module in modules for part in module.modules()):
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) in new_ids:
                    continue
                if id(tensor) not in made:
                    new = make(tensor.detach())
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, new
                    new_ids.add(id(new))
                tensors[name] = made[id(tensor)][1]
    return {key: new for key, (_, new) in made.items()}


NF4_BLOCK = 64


class _UnpackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        weight = inputs.new_empty(shape)
        return F.linear(inputs, weight, None if bias is None else bias.to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


class PackedLinear(nn.Linear):
    """A meta-device stand-in for bitsandbytes' frozen linear layers, with as many bytes and the same operations.

    The layer keeps its packed weight and unpacks it into the input's dtype in each forward and backward pass. "nf4":
    4 bits and one float32 scale per block of 64 weights. "int8": 8 bits and one float32 scale per row; the 8-bit
    product is counted in the input's dtype.
    """

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        count = linear.weight.numel()
        size, scales = (count // 2, -(-count // NF4_BLOCK)) if kind == "nf4" else (count, linear.out_features)
        dtype = torch.uint8 if kind == "nf4" else torch.int8
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, device="meta"))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return _UnpackedLinear.apply(inputs, self.weight, self.bias, (self.out_features, self.in_features))


def pack_linears(module: nn.Module, kind: str) -> None:
    """Replace every nn.Linear below `module` by a `PackedLinear`."""
    for name, linear in [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, PackedLinear(linear, kind))
