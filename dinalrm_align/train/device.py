"""The requested device, and the error when another rank is lost."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def available_device(device: torch.device | str) -> torch.device:
    """The device of this name; ValueError if torch does not know it or this machine does not have it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}; expected cpu, cuda, cuda:0, ...") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, and torch finds no CUDA GPU on this machine; leave it out, or choose cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {found}; this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if found.type == "meta":
        raise ValueError("device: got meta, on which tensors hold no values; choose cpu or cuda")
    return found


@contextmanager
def with_others() -> Iterator[None]:
    """Turn a failed collective within the block into ConnectionError (an OSError): a rank failed or timed out."""
    try:
        yield
    except RuntimeError as error:  # DistBackendError is one; gloo raises it bare
        first_line = str(error).strip().split("\n")[0]
        raise ConnectionError(
            f"another process was lost: it failed or exceeded loop.timeout; see its output ({first_line:.200})"
        ) from error
