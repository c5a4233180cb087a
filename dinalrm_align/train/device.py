"""Check the requested device, copy tensors to it, start the accelerator of a run, and report lost ranks."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from torch import Tensor


def available_device(device: torch.device | str) -> torch.device:
    """Return `device` as a torch.device; raise ValueError if the device is invalid or not available."""
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


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`. A copy from the CPU to a GPU goes through pinned memory: the host does not wait."""
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def start_accelerator(
    run: Any, model_dtype: str, *, minutes: float, tracker: str = "none", autocast: bool = False
) -> tuple[Accelerator, str]:
    """Seed the global RNGs; return the `Accelerator` of a run and the name of the dtype for frozen weights.

    Args:
        run: settings of the run; the fields device, dtype, seed and output_dir are read.
        model_dtype: dtype to use on a GPU if run.dtype is "auto". On the CPU, "auto" stands for float32.
        minutes: timeout of collective operations, in minutes.
        tracker: name of the experiment tracker, one of `none`, `wandb` and `tensorboard`.
        autocast: whether to use bfloat16 autocast on a GPU. Ignored if frozen weights are float32.
    """
    if run.device != "auto":
        available_device(run.device)
    on_gpu = run.device != "cpu" and torch.cuda.is_available()
    dtype = run.dtype if run.dtype != "auto" else model_dtype if on_gpu else "float32"
    accelerator = Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if autocast and on_gpu and dtype != "float32" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(minutes=minutes))],
        log_with=None if tracker == "none" else tracker,
        project_dir=run.output_dir,
    )
    set_seed(run.seed % 2**31, device_specific=True)
    return accelerator, dtype


@contextmanager
def with_others() -> Iterator[None]:
    """Context manager that raises ConnectionError if a collective call fails because a rank failed or timed out."""
    try:
        yield
    except RuntimeError as error:  # NCCL raises the subclass DistBackendError, gloo RuntimeError
        first_line = str(error).strip().split("\n")[0]
        raise ConnectionError(
            f"another process was lost: it failed or exceeded loop.timeout; see its output ({first_line:.200})"
        ) from error
