"""Reading text, JSON, YAML and files of libraries, with errors that name the file and what to do. Torch-free."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""owner/name"""


def read_text(path: Path, what: str, expected: str = "a file") -> str:
    """The text of a UTF-8 file without byte order mark; ValueError, with the line, for other bytes and for NUL."""
    if not path.is_file():
        raise FileNotFoundError(f"no {what} {path}{' (it is a folder)' if path.is_dir() else ''}; expected {expected}")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{what} {path} is not UTF-8 (line {line}); save it as UTF-8") from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{what} {path} holds a NUL byte (line {line}): not a text file; save it as UTF-8")
    return text


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text; ValueError for invalid JSON and duplicate keys."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def read_json(path: Path, expected: str = "a file") -> dict[str, Any]:
    """The object in a JSON file; raises as `read_text` and `parse_json`."""
    values = parse_json(read_text(path, "file", expected), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a JSON {type(values).__name__}, expected an object")
    return values


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError, with the line, for invalid YAML, duplicate keys, aliases (a few lines of
    which can expand to gigabytes) and other values.
    """
    text = read_text(path, what)
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except RecursionError as error:
        raise ValueError(f"{what} {path}: nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = f"line {mark.line + 1}: {problem}" if mark else problem or str(error).split("\n")[0]
        raise ValueError(f"{what} {path}: not YAML that is supported here ({reason})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{what} {path}: got {type(values).__name__}, expected a mapping, `name: value` a line")
    return values


def make_folder(path: Path) -> None:
    """Create a folder and its parents; OSError, naming it, if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{path} cannot be a folder: it or one of its parents is a file") from error
    except OSError as error:
        raise OSError(error.errno, f"cannot create the folder ({error.strerror}); choose another", str(path)) from error


@contextmanager
def reading(what: str, source: str | Path) -> Iterator[None]:
    """Turn any error of a library that reads `source` into FileNotFoundError (missing) or ValueError (unreadable)."""
    try:
        yield
    except Exception as error:  # libraries raise many types for files of unknown content
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0][:300]}"
        if isinstance(error, OSError):
            raise FileNotFoundError(
                f"{what} cannot be had from {str(source)!r} ({reason}); give a folder that holds it, or a hub id that "
                "is in the cache or that the hub grants"
            ) from error
        raise ValueError(f"{str(source)!r} does not hold a readable {what} ({reason})") from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}; write the value out", problem_mark=event.start_mark
            )
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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"duplicate key {twice!r}")
    return values
