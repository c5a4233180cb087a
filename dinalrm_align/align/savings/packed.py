"""Stand-ins for bitsandbytes' frozen linear layers, where there are no weights: as many bytes, the same work.

As there, a layer keeps its packed weight alone, unpacks it into the input's dtype for each product, forward and
backward, and lets it go. nf4: 4 bits and one float32 scale per block of 64 weights; int8: 8 bits and one float32
scale per row (the 8-bit product itself is counted as one in the input's dtype).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64


class _Unpacked(torch.autograd.Function):
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
    """Of the sizes of `linear`; on the meta device, to be given storage like any other module."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        count = linear.weight.numel()
        size, scales = (count // 2, -(-count // BLOCK)) if kind == "nf4" else (count, linear.out_features)
        dtype = torch.uint8 if kind == "nf4" else torch.int8
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device="meta"), requires_grad=False)
        self.register_buffer("scales", torch.empty(scales, device="meta"))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return _Unpacked.apply(inputs, self.weight, self.bias, (self.out_features, self.in_features))


def pack_linears(module: nn.Module, kind: str) -> None:
    """Put a stand-in in the place of every nn.Linear below `module`, as `quantise.quantise_linears` does."""
    for name, linear in [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, PackedLinear(linear, kind))
