"""Read prompt files and captioned images, and draw the prompts of each micro-step."""

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dinalrm_align.flow.noise import seeded_generator
from dinalrm_align.models.images import open_image
from dinalrm_align.models.prompt import check_prompt
from dinalrm_align.train.files import parse_json, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a UTF-8 file. The ending of its name tells the layout.

        .json          a list of prompts, or of objects with the key prompt; or an object {"prompts": such a list}
        .jsonl         a prompt or an object with the key prompt on each line
        .csv, .tsv     a table with a header and a column prompt; fields with commas or newlines are quoted. Quotes are
                       text in a .tsv where text follows a closing quote, as in PartiPrompts.tsv.
        any other      text, one prompt per line

    Keys and columns may also be named Prompt, prompts or Prompts. Blank lines are skipped, and duplicates are kept.
    Raises FileNotFoundError, or ValueError for a file without prompts or in another layout than its name tells, and for
    a prompt that no tokenizer takes, with its line or entry.
    """
    text = read_text(path, "prompt file", "text with one prompt per line, .jsonl, .json, .csv or .tsv")
    lines = re.split("\r\n|\r|\n", text)
    kind = path.suffix.lower()
    if kind == ".json":
        found = _json_prompts(parse_json(text, f"prompt file {path}"), path)
    elif kind == ".jsonl":
        rows = ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
        found = ((where, _prompt_of(parse_json(line, f"prompt file {path}, {where}"))) for where, line in rows)
    elif kind in (".csv", ".tsv"):
        found = _table_prompts(text, "," if kind == ".csv" else "\t", path)
    else:
        _check_is_text(lines, path)
        found = ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    prompts = []
    for where, prompt in found:
        if not isinstance(prompt, str) or not prompt.strip():
            expected = "a prompt that is not blank" + ", or an object with one key prompt" * kind.startswith(".json")
            raise ValueError(f"prompt file {path}, {where}: got {prompt!r:.80}; expected {expected}")
        check_prompt(f"prompt file {path}, {where}", prompt)
        prompts.append(prompt.strip())
    if not prompts:
        raise ValueError(f"prompt file {path} is empty; expected at least one prompt")
    return prompts


def _is_prompt_name(name: object) -> bool:
    return isinstance(name, str) and name.strip().lower() in ("prompt", "prompts")


def _prompt_of(entry: Any) -> Any:
    """Return an entry that is no object as it is, and otherwise the value of the object's only key for prompts."""
    values = [entry[key] for key in entry if _is_prompt_name(key)] if isinstance(entry, dict) else [entry]
    return values[0] if len(values) == 1 else entry


def _json_prompts(content: Any, path: Path) -> Iterator[tuple[str, Any]]:
    entries = _prompt_of(content)
    if not isinstance(entries, list):
        raise ValueError(f'prompt file {path}: got {content!r:.80}; expected a JSON list, or {{"prompts": a list}}')
    yield from ((f"entry {number}", _prompt_of(entry)) for number, entry in enumerate(entries))


def _table_prompts(text: str, delimiter: str, path: Path) -> Iterator[tuple[str, str]]:
    raw = delimiter == "\t" and re.search(r'(?:^|\t)"(?:[^"\t\r\n]|"")*"[^"\t\r\n]', text, re.MULTILINE)
    quoting = csv.QUOTE_NONE if raw else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        names = next(reader, [])
        columns = [column for column, name in enumerate(names) if _is_prompt_name(name)]
        if len(columns) != 1:
            raise ValueError(f"got columns {names!r:.200}; expected one named prompt, {delimiter!r} between columns")
        for row in filter(None, reader):
            if len(row) != len(names):
                raise ValueError(f"line {reader.line_num}: got {len(row)} fields; expected {len(names)}: quote prompts")
            yield f"line {reader.line_num}", row[columns[0]]
    except (csv.Error, ValueError) as error:
        line = f"line {reader.line_num}: " if isinstance(error, csv.Error) else ""
        raise ValueError(f"prompt file {path}: {line}{error}") from error


def _check_is_text(lines: Sequence[str], path: Path) -> None:
    """Raise ValueError if a text file starts as JSON or a Python literal, or with the header of a table."""
    first = next((line.strip() for line in lines if line.strip()), "")
    table = any(_is_prompt_name(name.strip(" -\"'")) for name in re.split("[,;|\t:=]", first))
    json_like = re.match(r"""[\[{]+\s*(["'\]}]|$)""", first)
    if table or json_like:
        got, name = ("JSON", ".json or .jsonl") if json_like else (f"the header {first!r:.80}", ".csv or .tsv")
        raise ValueError(f"prompt file {path}: got {got}; expected one prompt per line, or a file name with {name}")


def read_captioned_images(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """Read each image NAME.png (or .jpg, .jpeg, .webp) of a folder and its caption NAME.txt, sorted by name.

    Returns (RGB images, captions). Raises FileNotFoundError or ValueError for a missing, empty or unreadable file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; expected one with images NAME.png and captions NAME.txt")
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no images in {folder}; expected NAME.png (or {', '.join(SUFFIXES[1:])}) and NAME.txt")
    captions = [" ".join(read_prompts(path.with_suffix(".txt"))) for path in paths]
    return [open_image(path) for path in paths], captions


def prompt_indices(
    count: int, batch_size: int, micro_step: int, *, seed: int, rank: int = 0, num_processes: int = 1
) -> list[int]:
    """Return the indices in [0, count) of the `batch_size` prompts that process `rank` uses at a micro-step.

    All ranks together use every prompt once per epoch. Each epoch has a new random order, which depends on the seed.
    """
    first = (micro_step * num_processes + rank) * batch_size
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    orders = torch.cat([torch.randperm(count, generator=seeded_generator(seed, epoch)) for epoch in epochs])
    return orders[first % count :][:batch_size].tolist()
