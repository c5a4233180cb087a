"""Run code on tensors that have shape, dtype and device, and no values: full-size networks in no memory, in seconds.

Floating-point tensors are imagined (torch's FakeTensor on a fake CPU: the CPU's fused attention keeps as much as the
GPU's flash attention does, while the meta device would write out the matrix of scores). Integer tensors, masks made of
them and literals are real, so that code may index and branch on tokens and grids. Where code reads a number off an
imagined tensor to check it, it gets one that passes: True, 0 or 1.0.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from dinalrm_align.train.cost import tensors_among

aten = torch.ops.aten
WHOLE_NUMBERS = ("aten::randint", "aten::arange", "aten::randperm")
"""Factories that make integers unless they are asked for another dtype."""


class _FloatsAreImagined(TorchDispatchMode):
    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_among((args, kwargs))
        imagined = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if not imagined and (tensors or _makes_whole_numbers(func, kwargs)):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _passing(args[0].dtype)
        if kwargs.get("generator") is not None:
            kwargs["generator"] = None
        if func is aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _places(index)])
        if imagined < len(tensors):
            args, kwargs = tree_map(self._imagine, (args, kwargs))
        return func(*args, **kwargs)

    def _imagine(self, leaf: Any) -> Any:
        real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
        return self.fake.from_tensor(leaf, static_shapes=True) if real else leaf


def _makes_whole_numbers(func: Any, kwargs: dict[str, Any]) -> bool:
    dtype = kwargs.get("dtype")
    return func.name().startswith(WHOLE_NUMBERS) if dtype is None else not dtype.is_floating_point


def _passing(dtype: torch.dtype) -> bool | int | float:
    """What a check reads off an imagined tensor: all is finite, nothing is bad, values are moderate."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0


def _places(index: Tensor | None) -> Iterable[Tensor | None]:
    """A real mask as the integers it stands for, which is what indexing makes of it."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with _disable_current_modes():
        return index.nonzero(as_tuple=True)


class Imagination:
    """A world of imagined tensors: `with imagination.active(): ...`, over modules that `imagine` moved there."""

    def __init__(self) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    @contextmanager
    def active(self) -> Iterator[None]:
        with self.fake, _FloatsAreImagined(self.fake):
            yield

    def empty_like(self, tensor: Tensor) -> Tensor:
        """An imagined tensor of that shape and dtype; a real one, all 0, where it holds integers of more than 8 bits
        (those of 8 are packed weights).
        """
        if not tensor.is_floating_point() and tensor.dtype not in (torch.uint8, torch.int8):
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
        with self.fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def replace_tensors(modules: Iterable[nn.Module], make: Callable[[Tensor], Tensor]) -> dict[int, Tensor]:
    """Put make(tensor) in the place of every parameter and buffer; what was one object stays one.

    Returns what stands for what, by the id of the former.
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
