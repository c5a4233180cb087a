"""SHA-256 of tensors and texts, to verify files and to identify models."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLED = 256  # values per tensor in a fingerprint


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and every bit, for any order and device; 64 hexadecimal digits."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Digest of names, dtypes, shapes and evenly spaced values of a module's tensors; 16 hexadecimal digits.

    Fast for billions of weights; single changed weights go unnoticed.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    sampled = {f"{n} {tuple(t.shape)}": t.detach().flatten()[:: max(1, t.numel() // SAMPLED)] for n, t in tensors}
    return digest(sampled)[:16]


def text_digest(text: str) -> str:
    """Digest of a text as UTF-8; 16 hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
