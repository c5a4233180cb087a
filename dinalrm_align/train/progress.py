"""A progress bar of a stage of a run, such as an evaluation."""

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

Item = TypeVar("Item")


def progress(items: Sequence[Item], stage: str) -> Iterable[Item]:
    """Iterate over `items` with a progress bar named `stage`, which disappears at its end.

    Where standard error is not a terminal, the bar is one line at the start. Only rank 0 shows it.
    """
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank > 0 or len(items) < 2:
        return items
    if not sys.stderr.isatty():
        print(f"{stage}: {len(items)} batches", file=sys.stderr, flush=True)
        return items
    return tqdm(items, desc=stage, unit="batch", leave=False, dynamic_ncols=True)
