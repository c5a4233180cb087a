"""A command line from a dataclass: `--name value`, `--section.name value`, `--config FILE`, help from the docstrings.

Precedence, lowest first: the dataclass's defaults, the files in `beneath`, then `--config` and the options in the order
in which they are typed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from jsonargparse import ArgumentParser

Settings = TypeVar("Settings")


def parse(
    kind: type[Settings], description: str, argv: Sequence[str] | None = None, beneath: Sequence[Path] = ()
) -> tuple[Settings, str]:
    """An instance of the dataclass `kind`, and the same as YAML text that `--config` reads back.

    argv: by default the program's own. An unknown option, a value of the wrong type or out of range ends the program
    with status 2 and a sentence.
    """
    parser = ArgumentParser(
        description=description, default_config_files=[str(path) for path in beneath], allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="YAML file of settings; options typed after it override it")
    parser.add_class_arguments(kind)
    namespace = parser.parse_args(None if argv is None else list(argv))
    text = parser.dump(namespace)
    try:
        values = vars(parser.instantiate_classes(namespace))
        return kind(**{name: value for name, value in values.items() if name != "config"}), text
    except ValueError as error:
        refuse(str(error))


def refuse(sentence: str) -> NoReturn:
    """End the program as for a bad argument: the sentence on the error stream, status 2."""
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)
