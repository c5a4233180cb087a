"""Compare the folders of two runs bit for bit, apart from times."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from dinalrm_align.train.metrics import read_metrics

TIMED = ("curves.png",)
"""Files that show seconds, which only have to exist."""


def differences(one: Path, other: Path) -> list[str]:
    """Differences between two finished runs by file, leftover temporary files included."""
    names = [{str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (one, other)]
    found = [f"{name}: only in one of them" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if Path(name).name not in TIMED and not _same(_content(one / name), _content(other / name)):
            found.append(f"{name}: differs")
    return found


def _content(path: Path) -> Any:
    """The content of a file without times, for `_same`."""
    if path.name == "metrics.jsonl":
        return [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "elapsed"))} for row in read_metrics(path)
        ]
    if path.name == "state.json":  # the rest are times, and digests of compared files
        state = json.loads(path.read_text())
        return {name: state[name] for name in ("step", "num_processes", "identity")}
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return [{name: file.get_tensor(name) for name in file.keys()}, file.metadata()]
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return path.read_bytes()


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, torch.Tensor):
        return _same(one.numpy(), other.numpy())
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return type(one) is type(other) and one == other
