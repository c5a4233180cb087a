"""Sealed folders: state.json holds the size and SHA-256 of every other file and a digest of itself. Torch-free.

A sealed folder is read back byte for byte as it was written, or refused.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.train.durable import file_digest, write_file

STATE = "state.json"


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write state.json: `facts` (JSON values), and size and digest of every file in the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(folder.iterdir())
    }
    write_file(folder / STATE, _text({**facts, "files": files}))


def open_sealed(folder: Path) -> dict[str, Any]:
    """The facts of a sealed folder. Raises ValueError, naming the first file that is missing or damaged."""
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    content = path.read_bytes()
    try:
        state = json.loads(content)
        del state["sha256"]
        intact = content == _text(state).encode()
    except (ValueError, TypeError, KeyError, RecursionError):  # not JSON, not an object, no digest
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged or of another version: its {len(content)} bytes do not match their digest")
    for name, mark in state.pop("files").items():
        check_mark(folder / name, mark)
    return state


def check_mark(path: Path, mark: Mapping[str, Any], *, prefix: bool = False) -> None:
    """Raise ValueError unless the file, or (prefix) its beginning, has the `bytes` and `sha256` of `mark`."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size, expected = path.stat().st_size, mark["bytes"]
    if size != expected and not prefix:
        raise ValueError(f"{path} is damaged: got {size} bytes, expected {expected}")
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(expected)) if prefix else hashlib.file_digest(file, "sha256")
    if digest.hexdigest() != mark["sha256"]:
        raise ValueError(f"{path} is damaged: its first {expected} bytes are not those that were written")


def _text(state: Mapping[str, Any]) -> str:
    """state.json with the digest of everything else in it."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "sha256": digest}, indent=1, sort_keys=True) + "\n"
