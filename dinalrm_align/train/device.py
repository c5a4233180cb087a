"""Where arithmetic happens: a device that was asked for exists, or a sentence says that it does not."""

import torch


def available_device(device: torch.device | str) -> torch.device:
    """The device of that name. ValueError when torch knows no such device, or this machine does not have it."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: got {device!r}; expected cpu, cuda, cuda:0, ...") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA GPU on this machine; leave it out, or choose cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {found}: this machine has {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if found.type == "meta":
        raise ValueError("device meta: tensors there hold no values, nothing can be computed; choose cpu or cuda")
    return found
