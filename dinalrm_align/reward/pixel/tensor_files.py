"""Tensors out of files that torch saved, without running what such a file asks to be run.

`read_state_dict` is `torch.load(weights_only=True)`. `read_module_tensors` is for files that hold a whole pickled
module: every class and function that the file names is replaced by an empty stand-in while the tensors around it are
read, so that nothing named by the file is imported or called.
"""

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinalrm_align.train.files import reading


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Names and tensors of a file that torch saved, on the CPU; key: the entry that holds them, where one does.

    ValueError when the file is no such file, asks for anything but tensors to be made, or has no such entry.
    """
    with reading("file of tensors", path):
        content = _load(path)
    if key is not None:
        if not isinstance(content, Mapping) or not isinstance(content.get(key), Mapping):
            raise ValueError(f"{path}: got {_kind(content)}; expected a dict with the entry {key!r}")
        content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: got {_kind(content)}; expected names and tensors")
    return dict(content)


class _StandIn:
    """What every class and function that a pickle names becomes: takes anything, does nothing, keeps its state."""

    def __new__(cls, *args: Any, **options: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *args: Any, **options: Any) -> None: ...


def read_module_tensors(path: Path) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a pickled torch.nn.Module, by their state_dict names, on the CPU.

    ValueError when the file is not what `torch.save(module)` writes since torch 1.6, or names what torch never lets a
    file name (os, sys).
    """
    with reading("pickled module", path):
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        with torch.serialization.safe_globals([*map(_stand_in, set(named) - {"builtins.set"}), set]):
            content = _load(path)
    if isinstance(content, Mapping):
        content = content.get("model", content)  # saved beside other things
    if not isinstance(content, _StandIn):
        raise ValueError(f"{path}: got {_kind(content)}; expected a pickled torch.nn.Module")
    return dict(_tensors(content, ""))


def _load(path: Path) -> Any:
    """What torch's reader of tensors makes of a file, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # torch's own sentence recommends to run the file's code
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "GLOBAL" in line or "Unpickler error" in line), lines[-1])
        raise ValueError(f"it asks for more than tensors: {reason.rpartition('error: ')[2][:160]}") from error


def _stand_in(full_name: str) -> type[_StandIn]:
    """A stand-in that torch's reader finds under this name, "module.name"."""
    module, _, name = full_name.rpartition(".")
    return type(name, (_StandIn,), {"__module__": module})


def _tensors(module: _StandIn, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """As `torch.nn.Module.state_dict` walks a module, on stand-ins."""
    state = vars(module)
    transient = state.get("_non_persistent_buffers_set", ())
    for kind, left_out in (("_parameters", ()), ("_buffers", transient)):
        for name, tensor in _entries(state, kind):
            if isinstance(tensor, Tensor) and name not in left_out:
                yield prefix + name, tensor.detach()
    for name, child in _entries(state, "_modules"):
        if isinstance(child, _StandIn):
            yield from _tensors(child, f"{prefix}{name}.")


def _entries(state: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    entries = state.get(kind)
    return list(entries.items()) if isinstance(entries, Mapping) else []


def _kind(content: Any) -> str:
    """What a file holds, in a few words."""
    if isinstance(content, Mapping):
        return f"a dict with the entries {sorted(map(str, content))[:4]}"
    return "a pickled object" if isinstance(content, _StandIn) else f"a {type(content).__name__}"
