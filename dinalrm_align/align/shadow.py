"""Half-precision copies (shadows) of a float32 LoRA, with which a half-precision base model runs.

AdamW needs float32 weights, because bfloat16 would round its updates away. But a float32 LoRA on a bfloat16 base casts
the inputs of every projection to float32 and multiplies there. So the forward uses shadows: the LoRA's matrices, cast
to the base's dtype in one pass when the transformer's forward starts. Every change of the float32 weights therefore
takes effect, whether by an optimiser, a moving average, a file, or an exchange of storages. At SD3.5-M's size and rank
32, a cast reads and writes 0.14 GB, less than 0.1 % of a forward's time at batch size 8. Autograd casts the gradients
of all shadows back to float32 in one pass per backward, and adds them up in the float32 weights.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional


def cast_all(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies of `tensors` in `dtype`, as parts of one buffer. The number of operators is always the same."""
    buffer = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)
    parts = buffer.split([tensor.numel() for tensor in tensors])
    copies = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
    torch._foreach_copy_(copies, tensors)
    return copies


class _Cast(torch.autograd.Function):
    """`cast_all`, whose backward casts the gradients back, again in one pass."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = masters[0].dtype
        return tuple(cast_all(masters, dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(cast_all([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(found) for gradient in gradients)


class ShadowedLinear(nn.Linear):
    """A LoRA matrix without bias. `weight` is trained; `forward` uses `shadow`."""

    shadow: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.shadow)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the shadow, which has an autograd graph and cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "shadow"}


class Shadows:
    """The shadows of an adapter on `transformer`, in the dtype of the transformer. They are made at every forward.

    After a forward without gradient, the shadows of the last forward with gradient are restored, because gradient
    checkpointing runs blocks again in the backward, without the transformer's own forward.
    """

    def __init__(self, transformer: SD3Transformer2DModel, adapter: str) -> None:
        self.layers = [part for part in transformer.modules() if isinstance(part, LoraLayer) and adapter in part.lora_A]
        self.matrices = [part[adapter] for layer in self.layers for part in (layer.lora_A, layer.lora_B)]
        self.kept: list[Tensor] = []
        for layer in self.layers:
            layer.cast_input_dtype_enabled = False
        for matrix in self.matrices:
            matrix.__class__ = ShadowedLinear
        transformer.register_forward_pre_hook(self.make)
        transformer.register_forward_hook(self.restore, always_call=True)

    def make(self, transformer: SD3Transformer2DModel, inputs: Any) -> None:
        """Set the shadows to the present weights, connected to the weights by autograd if gradients are enabled."""
        if not self.layers[0].disable_adapters:
            shadows = _Cast.apply(transformer.dtype, *(matrix.weight for matrix in self.matrices))
            self._set(shadows)
            if torch.is_grad_enabled():
                self.kept = list(shadows)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"kept": []}

    def restore(self, transformer: SD3Transformer2DModel, inputs: Any, output: Any) -> None:
        self._set(self.kept)

    def _set(self, shadows: Sequence[Tensor]) -> None:
        for matrix, shadow in zip(self.matrices, shadows):
            matrix.shadow = shadow
