"""Parse command lines into configuration dataclasses: `--name value`, `--section.name value`, `--config FILE`.

A section is a nested dataclass. A boolean option without a value is true: `--watch.stop_on_hacking`. Values come
from the defaults of the dataclass, then from default YAML files of the program, then from options and `--config` files
in the order of the command line; later values override earlier ones. `--help` shows the docstrings of the dataclasses.
"""

import dataclasses
import dis
import functools
import re
import signal
import subprocess
import sys
from argparse import Action
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import docstring_parser
import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from dinalrm_align.train.files import InputError, flat, read_yaml
from dinalrm_align.train.settings import bounds_in_words, did_you_mean, type_in_words, types_by_name

Settings = TypeVar("Settings")
PACKAGE = Path(__file__).parents[1]
# the formats in which error messages of jsonargparse quote an invalid value
GIVEN = re.compile(r"Given value: (.*)|Got value: (.*)|Unable to load config '(.*)'|: '(.*)'$", re.MULTILINE)


def parse(
    kind: type[Settings],
    description: str,
    argv: Sequence[str] | None = None,
    defaults: Sequence[Path] = (),
    positional: str | None = None,
) -> tuple[Settings, str]:
    """Parse a command line into an instance of the dataclass `kind`.

    Args:
        description: text at the top of `--help`.
        argv: command-line arguments; None uses sys.argv[1:].
        defaults: YAML files whose values override the defaults of the dataclass.
        positional: name of the field that receives all positional arguments. The field must be a list of strings.

    Returns the instance and its field values as YAML text, which `--config` can read. If a value is invalid, prints an
    error message and exits with status 2.
    """
    parser, namespace = _parse_options(kind, description, argv, defaults, positional)
    with refusing():
        try:
            values = vars(parser.instantiate_classes(namespace))
            settings = kind(**{name: value for name, value in values.items() if name != "config"})
        except (ValueError, TypeError) as error:
            if not is_about_input(error) or not (origin := _origin(str(error), argv, defaults)):
                raise
            raise type(error)(f"{error}; {origin}") from error
        return settings, as_yaml(settings)


def given_options(
    kind: type, description: str, argv: Sequence[str] | None = None, defaults: Sequence[Path] = ()
) -> Namespace:
    """Parse a command line as `parse` does, without checks of combinations of values. Return the values by name."""
    return _parse_options(kind, description, argv, defaults, None)[1]


def as_yaml(settings: Any) -> str:
    """Return the values of a dataclass as YAML text, which `--config` can read."""
    return yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False)


def _parse_options(
    kind: type, description: str, argv: Sequence[str] | None, defaults: Sequence[Path], positional: str | None
) -> tuple["_Parser", Namespace]:
    types = types_by_name(kind)
    words = list(sys.argv[1:] if argv is None else argv)
    for index, (word, after) in enumerate(zip(words, [*words[1:], ""])):
        switch = bool in (kind_of := types.get(word.removeprefix("--")), *get_args(kind_of))
        if switch and after.lower() not in ("true", "false", "auto"):
            words[index] = f"{word}=true"
    parser = _parser(kind, positional)
    parser.description, parser.prog = description, Path(sys.argv[0]).name
    parser.default_config_files = [str(path) for path in defaults]
    with refusing():
        for path in (*defaults, *_config_files(words)):
            _check_names(read_yaml(path, "settings file"), types, f"settings file {path}")
        namespace = parser.parse_args(words)
        for name, value in vars(namespace).items():
            if dataclasses.is_dataclass(types.get(name)) and not isinstance(value, Namespace):
                raise ValueError(f"{name}: got {value!r}; expected a section, --{name}.NAME VALUE")
        return parser, namespace


@functools.cache
def _parser(kind: type, positional: str | None) -> "_Parser":
    """Return the parser of a dataclass. It is made once: most of the time of a short command goes into it."""
    parser = _Parser(
        allow_abbrev=False, formatter_class=_HelpFormatter,
        usage=f"%(prog)s {f'{positional.upper()} ... ' if positional else ''}[--config FILE] [--NAME VALUE ...]",
    )  # fmt: skip
    parser.types = types_by_name(kind)
    parser.add_argument("--config", action="config", help="YAML file of settings; options given after it override it")
    if positional is not None:
        meaning = {part.arg_name: part.description for part in docstring_parser.parse(kind.__doc__).params}
        parser.add_argument(positional, nargs="*", type=str, help=meaning[positional])
    parser.add_class_arguments(kind, skip={positional} - {None})
    return parser


def refuse(message: str, status: int = 2) -> NoReturn:
    """Print an error message to stderr and exit with status 2, or with `status`."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(status)


def run_process(command: Sequence[str]) -> int:
    """Run a program that saves its state on Ctrl-C and SIGTERM, and return its status; after a stop, exit with 130."""
    stopped, status = [], None
    process = subprocess.Popen(command)
    handler = signal.signal(signal.SIGTERM, lambda *_: (stopped.append(True), process.terminate()))
    while status is None:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the program receives it, too
            stopped.append(True)
    signal.signal(signal.SIGTERM, handler)
    if stopped:
        refuse("stopped; run the same command to continue", status=130)
    return status


@contextmanager
def refusing(stopped: str = "") -> Iterator[None]:
    """Context manager that turns errors about user input into a one-line error message and exit status 2.

    It catches every OSError or ImportError in code of this package, and every ValueError or TypeError that a `raise`
    statement of this package raises. Other errors are faults of the program and keep their traceback. `train.loop.fit`
    marks errors of a run that has started by a note: of these, only OSError, `InputError` and FloatingPointError become
    one line, with exit status 1; the traceback of any other error ends with the command to resume.

    On Ctrl-C, prints the message `stopped` and exits with status 130; if `stopped` is empty, KeyboardInterrupt
    propagates. A traceback ends with `stopped` too.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not stopped:
            raise
        print(f"\nstopped: {stopped}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        started = bool(getattr(error, "__notes__", ()))
        if started and isinstance(error, OSError | InputError | FloatingPointError):
            refuse(str(error), status=1)
        if not started and is_about_input(error):
            refuse(str(error))
        if stopped and not started:
            error.add_note(f"stopped: {stopped}")
        raise


def is_about_input(error: Exception) -> bool:
    """Return whether this package reports `error` about the user's input: the rule that `refusing` documents."""
    if not isinstance(error, ValueError | TypeError | OSError | ImportError):
        return False
    innermost = error.__traceback__
    while innermost.tb_next is not None:
        innermost = innermost.tb_next
    code = innermost.tb_frame.f_code
    raised = dis.opname[code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"
    in_package = Path(code.co_filename).is_relative_to(PACKAGE)
    return in_package and (raised or isinstance(error, OSError | ImportError))


class _HelpFormatter(DefaultHelpFormatter):
    """Help formatter that wraps paragraphs separately and prints paragraphs with indented lines unchanged."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if re.search(r"^ ", part, re.M) else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in text.strip("\n").split("\n\n")
        )

    def _get_type_str(self, action: Action) -> str | None:
        """Return the type of an option: "bool or 'auto'" in place of "Union[bool, Literal['auto']]"."""
        text = super()._get_type_str(action)
        if text is None or not text.startswith("Union["):
            return text
        text = re.sub(r"Literal\[(.*?)\]", r"\1", text[len("Union[") : -1])
        return re.sub(r", (?![^\[]*\])", " or ", text)


class _Parser(ArgumentParser):
    """Argument parser whose error messages are one line and name the expected type or the most similar option."""

    types: dict[str, Any] = {}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        key = re.search(r'Parser key "([^"]+)"', message)
        limit = re.search(r": (?:(\S+) )?does not conform to restriction (v.*)", message)
        given = GIVEN.search(message)
        if limit:
            message = f"{key[1]}: got {limit[1] or given[given.lastindex]}; expected {bounds_in_words(limit[2])}"
        elif given and key[1] in self.types:
            message = f"{key[1]}: got {given[given.lastindex]!r:.80}; expected {type_in_words(self.types[key[1]])}"
        prefix, _, rest = message.partition("unrecognized arguments: ")
        if not prefix and rest:
            word = rest.split()[0]
            known = [f"--{name}" for name in self.types]
            message = f"unknown option {word}{did_you_mean(word.split('=')[0], known) or ';'} --help lists all"
        refuse(message)


def _origin(message: str, argv: Sequence[str] | None, files: Sequence[Path]) -> str:
    """Return where the settings in an error message come from, if they are in `files` and not in `argv`; else ""."""
    words = sys.argv[1:] if argv is None else argv
    given = {word.split("=")[0] for word in words}
    section = message.partition(":")[0].rpartition(".")[0]
    for path in files:
        for name, value in flat(read_yaml(path, "settings file")).items():
            parent, _, last = name.rpartition(".")
            said = re.findall(r"[\w.]+\w", message)
            if (name in said or (parent == section and last in said)) and f"--{name}" not in given:
                return f"{name} {value!r:.80} comes from {path}"
    return ""


def _check_names(values: dict[Any, Any], types: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raise ValueError if a key of the settings file `where` is unknown or the value of a section is not a mapping."""
    names = [name.removeprefix(prefix) for name in types if name.startswith(prefix)]
    known = [name for name in names if "." not in name]
    for key, value in values.items():
        if key not in known:
            raise ValueError(
                f"{where}: unknown key {prefix}{key}{did_you_mean(key, known) or ';'} known here: {', '.join(known)}"
            )
        if dataclasses.is_dataclass(types[f"{prefix}{key}"]):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: {prefix}{key}: got {value!r:.80}; expected a section")
            _check_names(value, types, where, f"{prefix}{key}.")


def _config_files(words: Sequence[str]) -> list[Path]:
    """Return the paths that a command line gives as `--config FILE` or `--config=FILE`."""
    after = [value for word, value in zip(words, words[1:]) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(path).expanduser() for path in (*after, *joined)]
