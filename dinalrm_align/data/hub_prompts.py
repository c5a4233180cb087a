"""Prompts of a run: from a file, from a data set on the Hugging Face hub, or from a data set in memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.prompt import check_prompt
from dinalrm_align.train.files import HUB_ID

COLUMNS = ("prompt", "prompts", "caption", "captions")
"""Columns that hold the prompts, in any case, by precedence: PartiPrompts has Prompt, Pick-a-Pic has caption."""
FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv")


Prompts = str | Path | Iterable[str | Mapping[str, Any]]
"""A file, a hub id, prompts, or rows with a column of prompts, such as those of a `datasets.Dataset`."""


def load_prompts(source: Prompts) -> list[str]:
    """Return the prompts of a file (`read_prompts`), of a hub data set "owner/name" or "owner/name:split", or of rows.

    A name that is the path of a file, or ends like a file of prompts, is a file. In memory: a `datasets.Dataset` or
    `IterableDataset`, or mappings with a column of prompts, of which the distinct prompts are returned without blank
    ones, as of a data set on the hub; or a list of strings, which is returned unchanged.
    Raises the errors of the readers, and TypeError or ValueError for anything else.
    """
    if not isinstance(source, str | Path):
        return _given_prompts(source)
    name, _, split = str(source).partition(":")
    if Path(source).exists() or not HUB_ID.fullmatch(name) or name.endswith(FILES):
        return read_prompts(Path(source))
    return read_hub_prompts(name, split or "train")


def _given_prompts(source: Any) -> list[str]:
    try:
        if isinstance(source, Mapping):
            raise ValueError(f"got the splits or columns {sorted(map(str, source))[:8]}; expected one split, as rows")
        rows = source if hasattr(source, "select_columns") else list(source)
        if isinstance(rows, list) and not all(isinstance(row, Mapping) for row in rows):
            for number, prompt in enumerate(rows):
                check_prompt(f"[{number}]", prompt)
            return rows
        return _column_prompts(rows)
    except (ValueError, TypeError) as error:
        raise type(error)(f"prompts: {error}") from error


def read_hub_prompts(name: str, split: str) -> list[str]:
    """Return the distinct prompts of a hub data set, in order, without blank ones. Needs the package `datasets`.

    Raises ImportError without that package, and ValueError if the data set or a prompt column cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"prompts: no file {name}; to read a data set of this name from the hub: pip install 'dinalrm-align[data]'"
        ) from error
    try:
        return _column_prompts(datasets.load_dataset(name, split=split, streaming=True))
    except Exception as error:  # the client raises many types
        raise ValueError(
            f"prompts: no file {name}, and {name}:{split} on the hub: {error}; expected the path of a file, or "
            "OWNER/NAME or OWNER/NAME:SPLIT on the hub"
        ) from error


def _column_prompts(rows: Any) -> list[str]:
    """Return the distinct prompts of rows, in order, without blank ones. Only their column of prompts is read.

    Raises ValueError without one of `COLUMNS`, and for a value that is no prompt.
    """
    first = next(iter(rows), {})
    known = {column.lower(): column for column in first}
    column = next((known[each] for each in COLUMNS if each in known), None)
    if column is None:
        raise ValueError(f"got the columns {sorted(first)}; expected one of {', '.join(COLUMNS)}")
    found = [row[column] for row in (rows.select_columns([column]) if hasattr(rows, "select_columns") else rows)]
    for row, prompt in enumerate(found):
        if prompt is not None:
            check_prompt(f"row {row}", prompt)
    prompts = list(dict.fromkeys(prompt.strip() for prompt in found if prompt and prompt.strip()))
    if not prompts:
        raise ValueError(f"column {column} holds no prompts")
    return prompts
