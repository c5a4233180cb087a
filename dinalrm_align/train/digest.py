"""SHA-256 digests of tensors, modules and texts."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

SAMPLED = 256  # minimum number of values that a fingerprint reads from a large tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal SHA-256 of names, dtypes, shapes and values of tensors, regardless of order and device."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Return a fast digest of a module's parameters and buffers, as 16 hexadecimal digits.

    The digest covers names, dtypes, shapes and at least 256 evenly spaced values of each tensor; tensors with fewer
    values are read in full. A change of a few values in a large tensor can leave the digest unchanged.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    sampled = {f"{n} {tuple(t.shape)}": t.detach().flatten()[:: max(1, t.numel() // SAMPLED)] for n, t in tensors}
    return digest(sampled)[:16]


def text_digest(text: str) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a text, encoded as UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]
