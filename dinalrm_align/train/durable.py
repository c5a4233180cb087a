"""Atomic writes: a file or folder is either complete or absent, even after a kill or a power failure. Torch-free.

Content is written under a temporary name in the same folder, flushed to disk and renamed. What a kill leaves under a
temporary name is overwritten by the next write of the same file or folder.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dinalrm_align.train.files import make_folder

TEMPORARY, DISCARDED = ".tmp_", ".old_"
"""Prefixes of the names of what is being written and of what is being deleted."""


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file that replaces `path` when the block ends; its suffix is that of `path`."""
    make_folder(path.parent)
    temporary = path.with_name(TEMPORARY + path.name)
    yield temporary
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that replaces `path` when the block ends; if it raises, it is deleted."""
    temporary, old = path.with_name(TEMPORARY + path.name), path.with_name(DISCARDED + path.name)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        make_folder(temporary)
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            flush(written)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        flush(path.parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)  # frees the disk, which may be full
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file atomically, text as UTF-8. Raises OSError, naming the file."""
    with atomically(path) as temporary:
        write_file(temporary, content)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in place. Raises OSError, naming the file."""
    try:
        with open(path, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:  # one raised by a write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard_folder(folder: Path) -> None:
    """Delete a folder, renaming it first so that a partly deleted one is never taken for complete."""
    hidden = folder.with_name(DISCARDED + folder.name)
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
