"""SHA-256 of tensors: what is read back is what was written, and one model is told from another."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLED = 256
"""Values per tensor that a fingerprint looks at."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and every bit, whatever the order and the device; 64 hexadecimal digits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """A digest of names, dtypes, shapes and evenly spaced values of a module's tensors; 16 hexadecimal digits.

    Reads a few kilobytes per tensor, so that billions of weights cost no time: it tells models apart, and does not see
    a single changed weight.
    """
    sampled = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        stride = max(1, tensor.numel() // SAMPLED)
        sampled[f"{name} {tuple(tensor.shape)}"] = tensor.detach().flatten()[::stride]
    return digest(sampled)[:16]


def text_digest(text: str) -> str:
    """Of a text as UTF-8; 16 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
