"""Kill a forked run at a file operation and record what it was doing, for `kill_harness`."""

import builtins
import io
import mmap
import os
import re
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch

from dinalrm_align.train import loop, state

PHASES = ("starting", "in an update", "in a hook", "saving", "finishing")
SAVING = PHASES.index("saving")
CALLS = ("replace", "rename", "mkdir", "unlink", "remove", "rmdir", "fsync")


class Board:
    """A page of memory shared with a fork: its phase, number of file operations, and where it died."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 4096)
        self.clear()

    def clear(self) -> None:
        self._page[:] = bytes(4096)

    @property
    def phase(self) -> int:
        return self._page[0]

    @phase.setter
    def phase(self, value: int) -> None:
        self._page[0] = value

    @property
    def operations(self) -> tuple[int, int]:
        """Operations on files of the run so far: all, and those while a checkpoint is saved."""
        return int.from_bytes(self._page[1:5], "big"), int.from_bytes(self._page[5:9], "big")

    def count(self) -> None:
        everywhere, saving = self.operations
        self._page[1:5] = (everywhere + 1).to_bytes(4, "big")
        self._page[5:9] = (saving + (self.phase == SAVING)).to_bytes(4, "big")

    @property
    def killed_at(self) -> str:
        """The operation at which the process killed itself, or an empty text."""
        return self._page[9:].split(b"\0")[0].decode()

    def die(self, operation: str) -> None:
        self._page[9 : 9 + len(operation.encode())] = operation.encode()
        os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file that writes half of its first write and then kills the process."""

    def __init__(self, file: Any, die: Callable[[], None]) -> None:
        self._file, self._die = file, die

    def __enter__(self) -> "Torn":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def write(self, data: Any) -> None:
        self._file.write(data[: len(data) // 2])
        self.close()

    def close(self) -> None:
        self._file.flush()
        self._die()


def watch_phases(board: Board) -> None:
    """Record the phases of `loop.fit` of this process on the board."""
    save, log, in_place, fit = loop.save_checkpoint, loop.MetricsLog, state.Ema.in_place, loop.fit

    def within(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before, board.phase = board.phase, PHASES.index(phase)
            try:
                return call(*args, **kwargs)
            finally:
                board.phase = before

        return wrapped

    def started(*args: Any, **kwargs: Any) -> Any:
        result = log(*args, **kwargs)
        board.phase = PHASES.index("in an update")
        return result

    def finished(*args: Any, **kwargs: Any) -> int:
        done = fit(*args, **kwargs)
        board.phase = PHASES.index("finishing")
        return done

    @contextmanager
    def hooked(ema: state.Ema) -> Any:
        before, board.phase = board.phase, PHASES.index("in a hook")
        with in_place(ema):
            yield
        board.phase = before

    loop.save_checkpoint, loop.MetricsLog, loop.fit = within("saving", save), started, finished
    state.Ema.in_place = hooked


def watch_files(board: Board, run: Path, *, at: int | None = None, saving: bool = False, torn: bool = False) -> None:
    """Count this process's operations on files in `run`, and die at number `at` of them, from 0.

    saving: count only those while a checkpoint is saved. torn: die in the middle of the operation if it is a write.
    """
    root = str(run)

    def due(path: Any) -> bool:
        """Count it if the file belongs to the run; whether to die at it."""
        if not str(path).startswith(root):
            return False
        number = board.operations[saving]
        board.count()
        return number == at and (board.phase == SAVING or not saving)

    def die(kind: str, path: Any) -> None:
        name = re.sub(r"\d+", "#", os.path.relpath(str(path), root))
        board.die(f"{PHASES[board.phase]}: {kind} {name}")

    def path_of(given: Any, kwargs: dict[str, Any]) -> str:
        if isinstance(given, int):
            return os.readlink(f"/proc/self/fd/{given}")
        base = "" if kwargs.get("dir_fd") is None else os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}")
        return os.path.join(base, os.fspath(given))

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(given: Any, *args: Any, **kwargs: Any) -> Any:
            path = path_of(given, kwargs)
            if due(path):
                die(name, path)
            return call(given, *args, **kwargs)

        return wrapped

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))
    opened = io.open

    def watched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wax+") and due(os.fspath(file)):
            if not torn:
                die("open", file)
            return Torn(opened(file, mode, *args, **kwargs), lambda: die("torn write", file))
        return opened(file, mode, *args, **kwargs)

    builtins.open = io.open = watched_open
    save_file = safetensors.torch.save_file

    def watched_save_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        at_this = due(path)
        if at_this and not torn:
            die("save_file", path)
        save_file(tensors, path, *args, **kwargs)
        if at_this:
            os.truncate(path, os.path.getsize(path) // 2)
            die("torn save_file", path)

    safetensors.torch.save_file = watched_save_file
