"""Prompts of a run: from a file, or from a data set on the Hugging Face hub."""

from pathlib import Path

from dinalrm_align.data.prompts import read_prompts
from dinalrm_align.models.prompt import check_prompt
from dinalrm_align.train.files import HUB_ID

COLUMNS = ("prompt", "prompts", "caption", "captions")
"""Columns that hold the prompts, in any case, by precedence: PartiPrompts has Prompt, Pick-a-Pic has caption."""
FILES = (".txt", ".json", ".jsonl", ".csv", ".tsv")


def load_prompts(source: str | Path) -> list[str]:
    """Return the prompts of a file (`read_prompts`) or of a hub data set, "owner/name" or "owner/name:split".

    A name that is the path of a file, or ends like a file of prompts, is a file. Raises the errors of both readers.
    """
    name, _, split = str(source).partition(":")
    if Path(source).exists() or not HUB_ID.fullmatch(name) or name.endswith(FILES):
        return read_prompts(Path(source))
    return read_hub_prompts(name, split or "train")


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
        rows = datasets.load_dataset(name, split=split, streaming=True)
        first = next(iter(rows), {})
        known = {column.lower(): column for column in first}
        column = next((known[each] for each in COLUMNS if each in known), None)
        if column is None:
            raise ValueError(f"got the columns {sorted(first)}; expected one of {', '.join(COLUMNS)}")
        found = [row[column] for row in rows.select_columns([column])]
        for row, prompt in enumerate(found):
            if prompt is not None:
                check_prompt(f"row {row}", prompt)
        prompts = list(dict.fromkeys(prompt.strip() for prompt in found if prompt and prompt.strip()))
        if not prompts:
            raise ValueError(f"column {column} holds no prompts")
        return prompts
    except Exception as error:  # the client raises many types
        raise ValueError(
            f"prompts: no file {name}, and {name}:{split} on the hub: {error}; expected the path of a file, or "
            "OWNER/NAME or OWNER/NAME:SPLIT on the hub"
        ) from error
