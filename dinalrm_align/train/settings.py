"""Types and checks for the fields of configuration dataclasses. Does not import torch.

The annotation of a field sets its range: `lr: NonNegativeFloat = 1e-4`. jsonargparse checks the range on the command
line, and `check_fields` checks it in Python. A float field accepts an int, but no bool, NaN or infinity.

A field that holds a path has the type `PathText`. A field that holds a path, a hub id or a name has the type `Source`.
Both accept a str, and `check_fields` stores a str, in which a path is absolute.
"""

import dataclasses
import difflib
import functools
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    register_type,
    restricted_number_type,
)

HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])  # [0, 1)
PositiveUnitInterval = restricted_number_type("PositiveUnitInterval", float, [(">", 0), ("<=", 1)])  # (0, 1]
OpenUnitInterval = restricted_number_type("OpenUnitInterval", float, [(">", 0), ("<", 1)])
OpenHalfInterval = restricted_number_type("OpenHalfInterval", float, [(">", 0), ("<", 0.5)])  # (0, 1/2)
ModeScale = restricted_number_type("ModeScale", float, [(">=", -1), ("<=", 1.75)])
IntAboveOne = restricted_number_type("IntAboveOne", int, [(">", 1)])
IntFrom100 = restricted_number_type("IntFrom100", int, [(">=", 100)])
IntFrom1To8 = restricted_number_type("IntFrom1To8", int, [(">=", 1), ("<=", 8)])
IntFrom1To512 = restricted_number_type("IntFrom1To512", int, [(">=", 1), ("<=", 512)])
IntFrom3To512 = restricted_number_type("IntFrom3To512", int, [(">=", 3), ("<=", 512)])
IntFrom64To6144 = restricted_number_type("IntFrom64To6144", int, [(">=", 64), ("<=", 6144)])
RESTRICTED = (
    ClosedUnitInterval, HalfOpenUnitInterval, IntAboveOne, IntFrom1To512, IntFrom1To8, IntFrom100, IntFrom3To512,
    IntFrom64To6144, ModeScale, NonNegativeFloat, NonNegativeInt, OpenHalfInterval, OpenUnitInterval,
    PositiveFloat, PositiveInt, PositiveUnitInterval,
)  # fmt: skip


class PathText(str):
    """Type of a field that holds the path of a file or folder. `~` is expanded, and the path is made absolute."""

    def __new__(cls, text: str) -> "PathText":
        return super().__new__(cls, cls.absolute(text))

    def __init_subclass__(cls) -> None:
        register_type(cls, str, cls)

    @classmethod
    def absolute(cls, text: str) -> str:
        """Return `text` with absolute paths. An empty text, which `check_fields` refuses, is returned unchanged."""
        return os.path.abspath(os.path.expanduser(text)) if text.strip() else text


class Source(PathText):
    """Type of a field that holds a path, a hub id (owner/name) or a word.

    A text is a path if it begins with /, ./, ../ or ~, or if a file or folder of that name exists and the text is not
    in `words`. Any other text, such as a hub id, remains unchanged.
    """

    words: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def absolute(cls, text: str) -> str:
        path = os.path.expanduser(text)
        is_path = path.startswith(("/", "./", "../")) or path in (".", "..")
        if is_path or (text.strip() and text not in cls.words and "\0" not in text and os.path.exists(text)):
            return os.path.abspath(path)
        return text


register_type(PathText, str, PathText)
_COMPARISONS = {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}
_TYPES = {
    int: "an integer", float: "a number", bool: "true or false", str: "text", dict: "a mapping", type(None): "null",
}  # fmt: skip
_UNIONS = (typing.Union, types.UnionType)


def check_fields(settings: Any, section: str = "") -> None:
    """Check the field values of a dataclass instance; convert them to plain int, float and str, with absolute paths.

    `section`: prefix of field names in error messages. Raises TypeError if a value does not have the annotated type,
    and ValueError if a number is out of range or not finite, or if a value is not one of the annotated choices.
    """
    for name, hint in field_types(type(settings)).items():
        value = vars(settings)[name]
        _check(f"{section}.{name}" if section else name, value, hint)
        vars(settings)[name] = _plain(value, hint)


def with_values(settings: Any, values: Mapping[str, Any]) -> Any:
    """Return a dataclass instance with other values, by dotted name. Raises ValueError, and as `check_fields`."""
    types = types_by_name(type(settings))
    if unknown := [name for name in values if name not in types or dataclasses.is_dataclass(types[name])]:
        near = did_you_mean(unknown[0], types) or f"; known: {', '.join(types)}"
        raise ValueError(f"unknown setting {unknown[0]!r}{near}")
    own = {name: value for name, value in values.items() if "." not in name}
    for section in {name.partition(".")[0] for name in values} - own.keys():
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{section}.")}
        own[section] = with_values(vars(settings)[section], inner)
    return dataclasses.replace(settings, **own)


def check_integer(name: str, value: Any, *, low: int = 0, high: int | None = None) -> None:
    """Raise TypeError if `value` is a bool or not an integer; raise ValueError if it is not in [low, high]."""
    _check(name, value, int)
    check_number(name, value, low=low, high=high)


def check_number(name: str, value: Any, *, low: float | None = None, high: float | None = None) -> None:
    """Raise TypeError if `value` is a bool or not a number; raise ValueError if it is not finite or not in range."""
    _check(name, value, float)
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ValueError(f"{name}: got {value}; expected {' and '.join(bounds)}")


def check_image_size(height: int | None, width: int | None) -> None:
    """Raise ValueError unless `height` and `width` are each None (default size) or a positive multiple of 16."""
    for name, size in (("height", height), ("width", width)):
        if size is not None and (size < 16 or size % 16):
            raise ValueError(f"{name}: got {size} pixels; expected a positive multiple of 16")


def check_levels(name: str, sigmas: Sequence[float] | None) -> None:
    """Raise ValueError if the list of noise levels `sigmas` is empty. None (use the default noise levels) is valid."""
    if sigmas is not None and not sigmas:
        raise ValueError(f"{name}: got {sigmas}; expected at least one noise level")


def bounds_in_words(expression: str) -> str:
    """Translate a range expression of jsonargparse to words: "v>=0 and v<1" -> "at least 0 and less than 1"."""
    return re.sub(r"v(>=|<=|>|<)", lambda sign: f"{_COMPARISONS[sign[1]]} ", expression)


def type_in_words(hint: Any) -> str:
    """Describe a type in words, without number ranges: list[float] | None -> "a list (each a number) or null"."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(map(type_in_words, inner))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        number = f" of {len(inner)}" if origin is tuple and inner[-1] is not Ellipsis else ""
        return f"a list{number} (each {type_in_words(inner[0])})"
    if dataclasses.is_dataclass(hint):
        return "a section"
    hint = _base(origin or hint)
    return _TYPES.get(hint, hint.__name__)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", where x is the name in `known` most similar to `name`; "" if none is similar."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the resolved type annotations of a dataclass, keyed by field name."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def types_by_name(kind: type, prefix: str = "") -> dict[str, Any]:
    """Return the type annotations of a dataclass and its nested dataclasses, keyed by dotted name: `section.name`."""
    found = {}
    for name, hint in field_types(kind).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found |= types_by_name(hint, f"{prefix}{name}.")
    return found


def _check(name: str, value: Any, hint: Any) -> None:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        fitting = [option for option in inner if _is_kind(value, option)]
        if not fitting:
            raise _type_error(name, value, hint)
        _check(name, value, fitting[0])
    elif origin is typing.Literal:
        if not any(type(value) is type(choice) and value == choice for choice in inner):
            hint = did_you_mean(value, map(str, inner)) if isinstance(value, str) else ""
            raise ValueError(f"{name}: got {value!r:.80}{hint or ';'} known: {', '.join(map(str, inner))}")
    elif not _is_kind(value, hint):
        raise _type_error(name, value, hint)
    elif hint in RESTRICTED:
        _check(name, value, float)
        try:
            hint(value)
        except ValueError as error:
            raise ValueError(f"{name}: got {value}; expected {bounds_in_words(hint._expression)}") from error
    elif origin in (list, tuple):
        each = _element_types(hint, len(value))
        if len(each) != len(value):
            raise ValueError(f"{name}: got {value!r:.80}; expected {len(each)} values")
        for index, (element, kind) in enumerate(zip(value, each, strict=True)):
            _check(f"{name}[{index}]", element, kind)
    elif origin is dict:
        for key, element in value.items():
            _check(f"{name}, key", key, inner[0])
            _check(f"{name}.{key}", element, inner[1])
    elif hint is float and not abs(value) <= sys.float_info.max:  # NaN, infinity, or an int too large for a float
        raise ValueError(f"{name}: got {value!r:.80}; expected a finite number")
    elif _base(hint) is str and "\0" in value:
        raise ValueError(f"{name}: got {value!r:.80}; expected text without NUL characters")
    elif hint is not str and _base(hint) is str and not value.strip():
        raise ValueError(f"{name}: got {value!r}; expected a path or name; leave the option out for its default")


def _type_error(name: str, value: Any, hint: Any) -> TypeError:
    return TypeError(f"{name}: got {type(value).__name__} {value!r:.80}; expected {type_in_words(hint)}")


def _is_kind(value: Any, hint: Any) -> bool:
    """Return whether `value` has the type `hint`. The elements of lists, tuples and dicts are not checked."""
    kind = _base(typing.get_origin(hint) or hint)
    if kind is typing.Literal:
        return isinstance(value, str)
    if kind in (list, tuple):
        return isinstance(value, list | tuple)
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def _element_types(hint: Any, length: int) -> tuple[Any, ...]:
    """Return the types of the elements of a list or tuple with the type annotation `hint`."""
    inner = typing.get_args(hint)
    variable = typing.get_origin(hint) is list or inner[-1] is Ellipsis
    return inner[:1] * length if variable else inner


def _plain(value: Any, hint: Any) -> Any:
    """Return a checked value as plain int, float or str, as `torch.load` requires. Paths become absolute."""
    origin = typing.get_origin(hint)
    if origin in _UNIONS:
        return _plain(value, next(option for option in typing.get_args(hint) if _is_kind(value, option)))
    if origin in (list, tuple):
        return type(value)(map(_plain, value, _element_types(hint, len(value))))
    if origin is dict:
        return {key: _plain(element, typing.get_args(hint)[1]) for key, element in value.items()}
    if isinstance(value, str) and _base(hint) is str:
        return str(value if hint is str else hint(value))
    return _base(type(value))(value) if type(value) in RESTRICTED else value


def _base(hint: Any) -> Any:
    """Return the base type of a number type with a range, or of a path type; return any other type unchanged."""
    if isinstance(hint, type) and issubclass(hint, PathText):
        return str
    return (int if issubclass(hint, int) else float) if hint in RESTRICTED else hint
