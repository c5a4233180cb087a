"""A command line from a dataclass: `--name value`, `--section.name value`, `--config FILE`, help from the docstrings.

Precedence, lowest first: the dataclass's defaults, the files in `beneath`, then `--config` and the options in the order
in which they are typed. An option may be typed by its end alone where no other has that end: `--keep_last 3` for
`--loop.keep_last 3`; one that is true or false without its value where true is meant: `--stop_on_hacking`.
"""

import dataclasses
import re
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from dinalrm_align.train.files import read_yaml
from dinalrm_align.train.settings import did_you_mean, in_words

Settings = TypeVar("Settings")
PACKAGE = Path(__file__).parents[1]


def parse(
    kind: type[Settings],
    description: str,
    argv: Sequence[str] | None = None,
    beneath: Sequence[Path] = (),
    positional: str | None = None,
) -> tuple[Settings, str]:
    """An instance of the dataclass `kind`, and the same as YAML text that `--config` reads back.

    argv: by default the program's own. positional: the setting, a list of text, that words without an option go to. An
    unknown option, a value of the wrong type or out of range, and a file that cannot be meant end the program with
    status 2 and a sentence.
    """
    names = _names(kind)
    words = [_in_full(word, _dotted(names)) for word in (sys.argv[1:] if argv is None else argv)]
    flags = {f"--{name}" for name in _flags(kind)}
    words = [
        f"{word}=true" if word in flags and after.lower() not in ("true", "false") else word
        for word, after in zip(words, [*words[1:], ""])
    ]
    parser = _Parser(
        names, description=description, default_config_files=[str(path) for path in beneath], allow_abbrev=False,
        usage=f"%(prog)s {f'{positional.upper()} ... ' if positional else ''}[--config FILE] [--NAME VALUE ...]",
        formatter_class=_HelpFormatter,
        epilog="An option may be typed by its end alone where no other has that end: --keep_last 3.",
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="YAML file of settings; options typed after it override it")
    skip = set()
    if positional is not None:
        parser.add_argument(positional, nargs="*", type=str, help=_meaning(kind, positional))
        skip.add(positional)
    parser.add_class_arguments(kind, skip=skip)
    with refusing():
        for path in (*beneath, *_config_files(words)):
            _check_names(read_yaml(path, "settings file"), names, str(path))
        namespace = parser.parse_args(words)
        for name, value in vars(namespace).items():
            if names.get(name) is not None and not isinstance(value, Namespace):
                raise ValueError(f"{name}: got {value!r}; expected a section, --{name}.NAME VALUE")
        text = parser.dump(namespace)
        values = vars(parser.instantiate_classes(namespace))
        return kind(**{name: value for name, value in values.items() if name != "config"}), text


def refuse(sentence: str) -> NoReturn:
    """End the program as for a bad argument: the sentence on the error stream, status 2."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def refusing() -> Iterator[None]:
    """Within the block, what this package raises about something that it was given ends the program as `refuse` does.

    An error that comes from deeper down is a fault, not a mistake of the user's, and keeps its traceback.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        *_, innermost = traceback.walk_tb(error.__traceback__)
        if not Path(innermost[0].f_code.co_filename).is_relative_to(PACKAGE):
            raise
        refuse(str(error))


class _HelpFormatter(DefaultHelpFormatter):
    """Wraps the paragraphs of a description separately, and leaves those with indented lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if re.search(r"^ ", part, re.M) else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in text.strip("\n").split("\n\n")
        )


class _Parser(ArgumentParser):
    """Errors in one line, without the hundred options before them, and with the nearest name for an unknown one."""

    def __init__(self, names: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self._names = names

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = _value_error(message)
        prefix, _, rest = message.partition("unrecognized arguments: ")
        if not prefix and rest:
            word = rest.split()[0]
            known = [f"--{name}" for name in _dotted(self._names)]
            message = f"unknown option {word}{did_you_mean(word.split('=')[0], known) or ';'} --help lists all"
        refuse(message)


def _value_error(message: str) -> str:
    """jsonargparse's message about a value as `name: got VALUE; expected TYPE`; any other message unchanged."""
    name = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Given|Got) value: ([^\n]+)", message)
    limit = re.search(r"Not of type \w+: (?:(\S+) )?does not conform to restriction (v[^\n]*)", message)
    kinds = re.search(r"Subtypes: [(\[](.*)[)\]]\n|Expected a (.*)\. Got value", message)
    if name and limit and (limit[1] or value):
        return f"{name[1]}: got {limit[1] or value[1]}; expected {in_words(limit[2])}"
    if name and value and kinds:
        expected = re.sub(r"<class '|'>|(jsonargparse\.)?typing\.", "", kinds[1] or kinds[2])
        return f"{name[1]}: got {value[1]}; expected {expected.replace('NoneType', 'null')}"
    return message


def _names(kind: type) -> dict[str, Any]:
    """The settings of a dataclass by name: None, or the same for a section."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: _names(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else None
        for field in dataclasses.fields(kind)
    }


def _meaning(kind: type, name: str) -> str:
    """What the docstring of a dataclass says of a setting."""
    return next(part.description for part in docstring_parser.parse(kind.__doc__).params if part.arg_name == name)


def _flags(kind: type, prefix: str = "") -> set[str]:
    """The settings of a dataclass that are true or false, as `section.name`."""
    found = set()
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= _flags(hint, f"{prefix}{name}.")
        elif hint is bool:
            found.add(prefix + name)
    return found


def _dotted(names: dict[str, Any], prefix: str = "") -> list[str]:
    """Every setting as `section.name`; sections as well."""
    found = []
    for name, inner in names.items():
        found += [prefix + name, *_dotted(inner or {}, f"{prefix}{name}.")]
    return found


def _in_full(word: str, known: Sequence[str]) -> str:
    """`--keep_last=3` -> `--loop.keep_last=3`, if that is the only option with this end; any other word as it is."""
    name, equals, value = word.removeprefix("--").partition("=")
    whole = [option for option in known if option.endswith(f".{name}")]
    if not word.startswith("--") or name in known or len(whole) != 1:
        return word
    return f"--{whole[0]}{equals}{value}"


def _check_names(values: dict[Any, Any], names: dict[str, Any], where: str, prefix: str = "") -> None:
    """ValueError unless every key of a settings file names a setting, and every section is one."""
    for key, value in values.items():
        if key not in names:
            raise ValueError(
                f"settings file {where}: unknown key {prefix}{key}{did_you_mean(key, names) or ';'} known here: "
                f"{', '.join(names)}"
            )
        if names[key] is not None:
            if not isinstance(value, dict):
                raise ValueError(f"settings file {where}: {prefix}{key}: got {value!r:.80}; expected a section")
            _check_names(value, names[key], where, f"{prefix}{key}.")


def _config_files(words: Sequence[str]) -> list[Path]:
    """The files that --config names, in order."""
    after = [value for word, value in zip(words, words[1:]) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(path).expanduser() for path in (*after, *joined)]
