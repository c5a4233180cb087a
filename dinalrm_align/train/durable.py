"""Writing files and folders that are whole or not there, whenever the program is killed or the machine goes down.

A file is written under a temporary name, flushed to disk and renamed; a folder loses its name before it loses its
files. What a kill leaves behind under a temporary name is overwritten by the next write of that name. Torch-free.
"""

import hashlib
import os
import shutil
from pathlib import Path

from dinalrm_align.train.files import make_folder

TEMPORARY, DISCARDED = ".tmp_", ".old_"
"""How the names of what is not whole yet, and of what is being deleted, begin."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) beside its place, flush it to disk, rename it. Raises OSError, naming the file."""
    make_folder(path.parent)
    temporary = path.with_name(TEMPORARY + path.name)
    write_file(temporary, content)
    os.replace(temporary, path)
    flush(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file in place and flush it to disk. OSError, naming the file, when it cannot be written whole."""
    try:
        with open(path, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # one raised by a write does not know its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard_folder(folder: Path) -> None:
    """Delete a folder: first its name, so that nobody takes what is left of it for the whole."""
    hidden = folder.with_name(DISCARDED + folder.name)
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
