"""Quantise frozen linear layers to 8 or 4 bits with bitsandbytes (pip extra `quant`). Gradients reach the inputs."""

import torch
from torch import nn

from dinalrm_align.train.state import bitsandbytes

QUANTIZATIONS = ("none", "int8", "nf4")
"""int8: LLM.int8(), arXiv 2208.07339, with inputs above 6 in half precision. nf4: QLoRA, arXiv 2305.14314."""


def check_quantization(kind: str) -> None:
    """Raise ValueError unless `kind` is none, int8 or nf4, and ImportError if bitsandbytes is needed but missing."""
    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization: got {kind!r}; known: {', '.join(QUANTIZATIONS)}")
    if kind != "none":
        bitsandbytes()


def quantise_linears(module: nn.Module, kind: str, device: torch.device | str, dtype: torch.dtype) -> None:
    """Replace every nn.Linear in `module` by a frozen quantised copy on `device`. `module` must be on the CPU.

    kind: "int8" or "nf4". dtype: dtype in which nf4 layers compute; int8 layers ignore it.
    """
    bnb = bitsandbytes()
    for name, linear in [(name, part) for name, part in module.named_modules() if type(part) is nn.Linear]:
        weight, bias = linear.weight.detach().cpu(), linear.bias
        sizes, meta = (linear.in_features, linear.out_features, bias is not None), torch.device("meta")
        if kind == "int8":
            packed = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device=meta)
            packed.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        else:
            packed = bnb.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device=meta)
            packed.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=packed)
            packed.support_avx512bf16_for_cpu = False  # else some CPUs repack a weight that another layer shares
        packed.bias = bias
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, packed.to(device).requires_grad_(False))
