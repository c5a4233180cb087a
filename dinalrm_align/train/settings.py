"""Types of settings and their check: one place for every configuration dataclass, and for single numbers. No torch.

A range is part of the annotation, `lr: NonNegativeFloat = 1e-4`; jsonargparse reads it from the command line, and
`check_fields` enforces it when the dataclass is built in Python. A bool is not a number, an integer is accepted as a
float, NaN and infinity are refused. Names in messages are dotted, `section.field`.
"""

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
)

__all__ = [
    "ClosedUnitInterval", "HalfOpenUnitInterval", "IntAboveOne", "NonNegativeFloat", "NonNegativeInt", "PositiveFloat",
    "PositiveInt", "PositiveUnitInterval", "check_fields", "check_image_size", "check_integer", "check_levels",
    "check_number", "did_you_mean",
]  # fmt: skip

HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])
"""[0, 1), as of a decay or a dropout."""
PositiveUnitInterval = restricted_number_type("PositiveUnitInterval", float, [(">", 0), ("<=", 1)])
"""(0, 1], as of a share."""
IntAboveOne = restricted_number_type("IntAboveOne", int, [(">", 1)])
"""2, 3, ..., as of a group size."""
RESTRICTED = (
    ClosedUnitInterval, HalfOpenUnitInterval, IntAboveOne, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt,
    PositiveUnitInterval,
)  # fmt: skip
_WORDS = {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}


def check_fields(settings: Any, section: str = "") -> None:
    """TypeError unless every field of the dataclass holds a value of its annotated type; ValueError for a number that
    is out of range or not finite, and for an unknown choice.

    Annotations: bool, int, float, str, the restricted numbers above, Literal, unions, list, tuple, dict, dataclasses.
    """
    for name, hint in _hints(type(settings)).items():
        value = vars(settings)[name]
        _check(f"{section}.{name}" if section else name, value, hint)
        vars(settings)[name] = _plain(value)


def check_integer(name: str, value: Any, *, low: int = 0, high: int | None = None) -> None:
    """TypeError unless `value` is an integer (no bool), ValueError unless low <= value <= high."""
    _check(name, value, int)
    _check_range(name, value, low, high)


def check_number(name: str, value: Any, *, low: float | None = None, high: float | None = None) -> None:
    """TypeError unless `value` is a number (no bool), ValueError unless it is finite and low <= value <= high."""
    _check(name, value, float)
    _check_range(name, value, low, high)


def check_image_size(height: int | None, width: int | None) -> None:
    """ValueError unless each is None (the default) or a positive multiple of 16 pixels, the transformer's patches."""
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < 16 or size % 16):
            raise ValueError(f"{name}: got {size} pixels; expected a positive multiple of 16")


def check_levels(name: str, sigmas: Sequence[float] | None) -> None:
    """ValueError for an empty list of noise levels; None stands for a default."""
    if sigmas is not None and not sigmas:
        raise ValueError(f"{name}: got {sigmas}; expected at least one noise level")


def in_words(expression: str) -> str:
    """A restriction of `jsonargparse.typing` as text: "v>=0 and v<1" -> "at least 0 and less than 1"."""
    parts = re.findall(r"v(>=|<=|>|<)([-.\w]+)", expression)
    return " and ".join(f"{_WORDS[sign]} {bound}" for sign, bound in parts)


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
    elif hint in RESTRICTED:
        _check(name, value, float)
        try:
            hint(value)
        except ValueError as error:
            raise ValueError(f"{name}: got {value}; expected {in_words(hint._expression)}") from error
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
    if kind in RESTRICTED:
        kind = int if issubclass(kind, int) else float
    if kind is typing.Literal:
        return isinstance(value, str)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _plain(value: Any) -> Any:
    """Numbers of jsonargparse's restricted types as int and float, which torch.load and JSON accept."""
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if type(value) in RESTRICTED:
        return int(value) if isinstance(value, int) else float(value)
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _got(name: str, value: Any, hint: Any) -> str:
    if hint in RESTRICTED:
        hint = int if issubclass(hint, int) else float
    words = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "nothing"}
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    names = [option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option)
             for option in options]  # fmt: skip
    expected = " or ".join(words.get(option, option) for option in names)
    return f"{name}: got {type(value).__name__} {value!r:.80}; expected {expected}"
