"""Read files with helpful error messages; write files and folders atomically. Does not import torch.

An atomic write leaves no partly written file or folder under the final name, even if the process is killed or the power
fails. The content is written under a temporary name in the same folder, flushed to disk and then renamed. If a process
is killed during a write, the temporary file stays until the next write of the same file.

A sealed folder contains state.json, which stores the size and SHA-256 of every other file. In state.json, the entry
`sha256` is the SHA-256 of all other entries. `open_sealed` raises ValueError if any byte of the folder has changed.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # owner/name
STATE = "state.json"
TEMPORARY, DISCARDED = ".tmp_", ".old_"  # prefixes of names while a file is written or deleted


class InputError(ValueError):
    """Data or an answer from outside the program cannot be used. The message says what the user can do.

    Readers raise this error. It ends a run with one line and the command to resume, not with a traceback.
    """


def read_text(path: Path, what: str, expected: str = "a file", *, errors: str = "strict") -> str:
    """Return the text of a UTF-8 file. Raises ValueError if the file is not UTF-8 or contains a NUL byte.

    errors: as of `bytes.decode`; "surrogateescape" leaves bytes that are not UTF-8 to a check of the text.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {what} {path}{' (it is a folder)' if path.is_dir() else ''}; expected {expected}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{what} {path} is not UTF-8 (line {line}); save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{what} {path} holds a NUL byte (line {line}): not a text file; save it as UTF-8")
    return text


def parse_json(text: str, where: str) -> Any:
    """Parse a JSON text. Raises ValueError, with `where` in the message, for invalid JSON and duplicate keys."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(f"{where}: not valid JSON ({reason})") from error


def read_json(path: Path, expected: str = "a file") -> dict[str, Any]:
    """Return the content of a JSON file as a dict. Raises ValueError if the file does not hold a JSON object."""
    values = parse_json(read_text(path, "file", expected), str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the content of a YAML file as a dict. `what` describes the file in error messages.

    Raises ValueError for invalid YAML, duplicate keys or aliases, and for files that hold no mapping. Aliases are
    refused because a few lines of nested aliases can expand to gigabytes.
    """
    text = read_text(path, what)
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark else problem or str(error).split("\n")[0]
        raise InputError(f"{what} {path}: not YAML that is supported here ({reason})") from error
    if not isinstance(values, dict):
        raise InputError(f"{what} {path}: got {type(values).__name__}, expected a mapping, `name: value` a line")
    return values


def make_folder(path: Path) -> None:
    """Create a folder and its parents, unless the folder exists. Raises OSError, with the path in the message."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{path} cannot be a folder: it or one of its parents is a file") from error
    except OSError as error:
        raise OSError(error.errno, f"cannot create the folder ({error.strerror}); choose another", str(path)) from error


@contextmanager
def reading(what: str, source: str | Path) -> Iterator[None]:
    """Context manager for loading `source`: re-raises OSError as FileNotFoundError and other errors as ValueError."""
    try:
        yield
    except Exception as error:  # libraries raise many exception types for invalid files
        first_line = (str(error).strip().splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line:.300}"
        if isinstance(error, OSError):
            raise FileNotFoundError(
                f"{what} cannot be had from {str(source)!r} ({reason}); give a folder that holds it, or a hub id that "
                "is in the cache or that the hub grants"
            ) from error
        raise InputError(f"{str(source)!r} does not hold a readable {what} ({reason})") from error


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path. The file written there replaces `path` if the block succeeds.

    The file gets the permissions of the process's umask, also if a library wrote it with others.
    """
    make_folder(path.parent)
    temporary = path.with_name(TEMPORARY + path.name)
    temporary.unlink(missing_ok=True)
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
    except Exception:
        temporary.unlink(missing_ok=True)
        raise
    temporary.chmod(mode)
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Context manager that yields an empty temporary folder, which replaces `path` if the block succeeds.

    The files get the permissions of the process's umask, also those that a library wrote with others.
    """
    temporary, old = path.with_name(TEMPORARY + path.name), path.with_name(DISCARDED + path.name)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        make_folder(temporary)
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for written in (*temporary.rglob("*"), temporary):
            if written.is_file() and not written.is_symlink():
                written.chmod(mode)
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
    """Write a file atomically. A str is encoded as UTF-8. An OSError has the path in its message."""
    with atomically(path) as temporary:
        write_file(temporary, content)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, not atomically. A str is encoded as UTF-8. An OSError has the path in its message."""
    try:
        with open(path, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
    except OSError as error:  # errors of file.write have no path
        raise OSError(error.errno, error.strerror, str(path)) from error


def flush(path: Path) -> None:
    """Flush a file, or the directory entries of a folder, to disk with fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard_folder(folder: Path) -> None:
    """Rename a folder and then delete it, so that a partly deleted folder never looks complete."""
    hidden = folder.with_name(DISCARDED + folder.name)
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def begin_or_resume(folder: Path, name: str, settings: Mapping[str, Any]) -> None:
    """Write `settings` to the JSON file folder/name or, if this file exists, verify that it holds the same settings.

    Raises ValueError if the settings differ, and FileExistsError if the folder contains files but no file `name`.
    """
    path, settings = folder / name, json.loads(json.dumps(settings))
    if path.is_file():
        before, now = flat(read_json(path)), flat(settings)
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{key}: got {now.get(key)!r:.80}; expected {before.get(key)!r:.80}, as in {path}: resume with the "
                    "same settings, or choose another folder"
                )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files and no {name}; write to a new folder")
    write_atomically(path, json.dumps(settings, indent=1))


def save_figure(figure: Any, path: Path, *, dpi: int = 110) -> None:
    """Write a matplotlib figure as PNG, atomically."""
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Seal a folder: write state.json with `facts` (JSON values) and the size and SHA-256 of every file."""
    marks = {path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in folder.iterdir()}
    write_file(folder / STATE, _text({**facts, "files": marks}))


def open_sealed(folder: Path) -> dict[str, Any]:
    """Verify a folder sealed with `seal`; return its `facts`. Raises ValueError if a file is missing or damaged."""
    path = folder / STATE
    if not path.is_file():
        raise InputError(f"{path} is missing")
    content = path.read_bytes()
    try:
        state = json.loads(content)
        del state["sha256"]
        intact = content == _text(state).encode()
    except (ValueError, TypeError, KeyError, RecursionError):  # not JSON, not an object, or without a digest
        intact = False
    if not intact:
        raise InputError(f"{path} is damaged or of another version: its {len(content)} bytes do not match their digest")
    for name, mark in state.pop("files").items():
        check_mark(folder / name, mark)
    return state


def check_mark(path: Path, mark: Mapping[str, Any], *, prefix: bool = False) -> None:
    """Raise ValueError unless a file has the size and SHA-256 in `mark`. If `prefix`, more bytes may follow."""
    if not path.is_file():
        raise InputError(f"{path} is missing")
    size, expected = path.stat().st_size, mark["bytes"]
    if size != expected and not prefix:
        raise InputError(f"{path} is damaged: got {size} bytes, expected {expected}")
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(expected)) if prefix else hashlib.file_digest(file, "sha256")
    if digest.hexdigest() != mark["sha256"]:
        raise InputError(f"{path} is damaged: its first {expected} bytes are not those that were written")


class _StrictLoader(yaml.SafeLoader):
    """YAML SafeLoader that raises for aliases, duplicate keys and keys that are not scalars."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"alias *{event.anchor}; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not a plain name", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {key.value!r}", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict into a dict with dotted keys: {"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise InputError(f"duplicate key {twice!r}")
    return values


def _text(state: Mapping[str, Any]) -> str:
    """Return the JSON text of a state.json file, which contains the entries of `state` and their SHA-256."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "sha256": digest}, indent=1, sort_keys=True) + "\n"
