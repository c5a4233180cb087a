"""What a case costs, counted on imagined tensors: bytes at the peak, floating-point operations. No weights, no GPU.

Bytes: live storages (`cost.LiveStorage`), so neither workspaces inside an operator nor an allocator's fragmentation.

Operations come in two conventions. F2: two per multiply-accumulate of matrix products, convolutions and attention, as
they are executed: recomputed blocks, and the scores that flash attention recomputes in its backward pass (2.5 times its
forward), included. M0: multiply-accumulates without attention, as the tool that papers commonly count with reports.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from dinalrm_align.align.savings.architectures import Architecture
from dinalrm_align.align.savings.case import Case
from dinalrm_align.align.savings.imagined import Imagination
from dinalrm_align.align.savings.subject import build_subject
from dinalrm_align.align.savings.work import work_of
from dinalrm_align.train.cost import CPU_ATTENTION, LiveStorage

FLASH_BACKWARD, MATH_BACKWARD = 2.5, 2.0
"""Attention's backward pass over its forward: with the scores computed once more, and with the scores kept."""
FORMULAS = {**flop_registry, **{operator: shape_wrapper(formula) for operator, formula in CPU_ATTENTION.items()}}


@dataclass(frozen=True)
class Cost:
    """weights: bytes of the networks on the device. state: bytes of the optimiser's moments. activations: the most
    that is held above both. f2, m0: see above; attention: the part of f2 that is attention's; f2_kept: f2, had
    attention kept its scores.
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
        """All that is held at the peak, in bytes."""
        return self.weights + self.state + self.activations


class Counter(LiveStorage):
    """Watches live storages, and counts operations by operator. (torch's own counter would take twice as long.)"""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked for very often
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
        spared = round(backward * (1 - MATH_BACKWARD / FLASH_BACKWARD))
        read = sum(attention.values())
        return {"f2": total, "f2_kept": total - spared, "m0": (total - read) // 2, "attention": read}


def count(case: Case, architecture: Architecture) -> Cost:
    """The cost of doing the case's work once; of an update, one after the first."""
    imagination = Imagination()
    subject = build_subject(architecture, case, imagination.empty_like)
    counter = Counter()
    with imagination.active():
        work = work_of(subject)
        with counter:
            work.prepare()
            state = counter.live
            counter.restart()
            counter.operations.clear()
            work.run()
    return Cost(subject.weight_bytes(), state, counter.peak - state, **counter.totals())
