"""Are two runs the same, bit for bit? Everything that a run leaves in its folder, times left out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from dinalrm_align.train.metrics import read_metrics

TIMED = ("curves.png",)
"""Files that show seconds: they need only be there."""


def differences(one: Path, other: Path) -> list[str]:
    """What of `one` (a finished run: weights, averages, optimiser, random states, metrics, evaluations, exports) is not
    the same in `other`, by file; leftovers under temporary names count too.
    """
    names = [{str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} for run in (one, other)]
    found = [f"{name}: only in one of them" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if Path(name).name not in TIMED and not _same(_content(one / name), _content(other / name)):
            found.append(f"{name}: differs")
    return found


def _content(path: Path) -> Any:
    """What a file says, times left out, in a form that `_same` compares."""
    if path.name == "metrics.jsonl":
        return [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "elapsed"))} for row in read_metrics(path)
        ]
    if path.name == "state.json":  # beside these: times, and digests of files that are compared themselves
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
