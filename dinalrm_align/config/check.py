"""Is a setting what its annotation says? One check for every dataclass of settings, and for single numbers. Torch-free.

A bool is no number, an integer is a float, NaN and infinity are neither. Names in messages are dotted, `section.field`.
"""

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable
from typing import Any


def check_fields(settings: Any, section: str = "") -> None:
    """TypeError unless every field of the dataclass holds what its annotation says; ValueError for a number that is not
    finite and an unknown choice. Read are bool, int, float, str, Literal, unions, lists, tuples, dicts and dataclasses.
    """
    for name, hint in _hints(type(settings)).items():
        _check(f"{section}.{name}" if section else name, vars(settings)[name], hint)


def check_integer(name: str, value: Any, *, low: int = 0, high: int | None = None) -> None:
    """TypeError unless `value` is an integer (no bool), ValueError unless low <= value <= high."""
    _check(name, value, int)
    _check_range(name, value, low, high)


def check_number(name: str, value: Any, *, low: float | None = None, high: float | None = None) -> None:
    """TypeError unless `value` is a number (no bool), ValueError unless it is finite and low <= value <= high."""
    _check(name, value, float)
    _check_range(name, value, low, high)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'nearest'?`, or nothing when no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_range(name: str, value: float, low: float | None, high: float | None) -> None:
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ValueError(f"{name}: got {value}; expected {' and '.join(bounds)}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(name: str, value: Any, hint: Any) -> None:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        fitting = [option for option in inner if _is_kind(value, option)]
        if not fitting:
            raise TypeError(_got(name, value, hint))
        _check(name, value, fitting[0])
    elif origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in inner):
            hint = did_you_mean(value, map(str, inner)) if isinstance(value, str) else ""
            raise ValueError(f"{name}: got {value!r:.80}{hint or ';'} known: {', '.join(map(str, inner))}")
    elif not _is_kind(value, hint):
        raise TypeError(_got(name, value, hint))
    elif origin in (list, tuple):
        each = inner * len(value) if origin is list else inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(each) != len(value):
            raise ValueError(f"{name}: got {value!r:.80}; expected {len(each)} values")
        for index, (element, kind) in enumerate(zip(value, each, strict=True)):
            _check(f"{name}[{index}]", element, kind)
    elif origin is dict:
        for key, element in value.items():
            _check(f"{name}, key", key, inner[0])
            _check(f"{name}.{key}", element, inner[1])
    elif hint is float and not _is_finite(value):
        raise ValueError(f"{name}: got {value!r:.80}; expected a finite number")
    elif hint is str and "\0" in value:
        raise ValueError(f"{name}: got {value!r:.80}; expected text without NUL characters")


def _is_kind(value: Any, hint: Any) -> bool:
    """Whether `value` is of the hint's kind at the top, whatever it contains."""
    kind = typing.get_origin(hint) or hint
    if kind is typing.Literal:
        return isinstance(value, str)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _got(name: str, value: Any, hint: Any) -> str:
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "nothing"}
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = [option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option)
             for option in options]  # fmt: skip
    expected = " or ".join(words.get(option, option) for option in names)
    return f"{name}: got {type(value).__name__} {value!r:.80}; expected {expected}"
