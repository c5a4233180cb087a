"""A sealed folder: its state.json tells size and SHA-256 of every other file, and a digest of its own text.

What is read back from a sealed folder is, byte for byte, what was written, or it is refused. Torch-free.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.train.durable import file_digest, write_file

STATE = "state.json"


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write state.json: `facts` (JSON values), and size and digest of every file that lies in the folder."""
    files = {path.name: mark_of(path) for path in sorted(folder.iterdir())}
    write_file(folder / STATE, _text({**facts, "files": files}))


def open_sealed(folder: Path) -> dict[str, Any]:
    """The facts of a sealed folder. ValueError, naming the first file that is missing or not as it was written."""
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    content = path.read_bytes()
    try:
        state = json.loads(content)
        del state["sha256"]
        whole = content == _text(state).encode()
    except (ValueError, TypeError, KeyError, RecursionError):  # no JSON, no object, no digest
        whole = False
    if not whole:
        raise ValueError(
            f"{path} is damaged, or of another version: its {len(content)} bytes do not match their digest"
        )
    for name, mark in state.pop("files").items():
        check_mark(folder / name, mark)
    return state


def mark_of(path: Path) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def check_mark(path: Path, mark: Mapping[str, Any]) -> None:
    """ValueError unless the file is there and has this size and digest."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    size = path.stat().st_size
    if size != mark["bytes"]:
        raise ValueError(f"{path} is damaged: got {size} bytes, expected {mark['bytes']}")
    if file_digest(path) != mark["sha256"]:
        raise ValueError(f"{path} is damaged: its {size} bytes are not those that were written")


def _text(state: Mapping[str, Any]) -> str:
    """state.json, the digest of everything else in it included."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "sha256": digest}, indent=1, sort_keys=True) + "\n"
