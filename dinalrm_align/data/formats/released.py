"""Read pairs of latents in the layout of DiNa-LRM's released code. Torch-free.

    part_rank00.parquet   columns prompt, latent1 (chosen), latent2 (rejected), latent1_shape, latent2_shape and
                          detailed_results, in row groups of about 100 rows. Latents are bytes of .npy files with
                          scaled floating-point arrays (C, h, w). detailed_results is the text of a Python dict
                          with votes_chosen, votes_rejected and confidence.
    bucket_index.csv      optional; one line for each row to train on, with the columns parquet_path (only the file
                          name in it is used), row_group and row_index.

Reading a file never runs code from it. Arrays of Python objects are rejected, and detailed_results may hold only
literals.
"""

import ast
import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dinalrm_align.data.formats.record import Bad, Preference, Row, optional_number, two_numbers
from dinalrm_align.data.formats.rows import parquet_rows
from dinalrm_align.train.files import InputError, read_text

INDEX = "bucket_index.csv"
LATENTS = ("latent1", "latent2")
COLUMNS = ("prompt", "latent1_shape", "latent2_shape")


def rows(folder: Path, bad: Bad) -> Iterator[Row]:
    """Yield the records listed in bucket_index.csv, or all records if the folder has no bucket_index.csv."""
    files = sorted(folder.glob("part_rank*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no part_rank*.parquet; expected pairs in the released layout")
    listed = _listed_rows(folder)
    for name in sorted({name for name, _, _ in listed or ()} - {file.name for file in files}):
        bad("unreadable file", f"{INDEX} names {name}, which is not in {folder}")
    for row in parquet_rows(files, bad, COLUMNS, LATENTS, optional=("detailed_results",)):
        if listed is None or (Path(row.cell.file).name, row.cell.row_group, row.cell.row) in listed:
            yield row


def convert(row: Row) -> Iterator[Preference]:
    shapes = [_shape(row.fields[f"{name}_shape"]) for name in LATENTS]
    if shapes[0] != shapes[1]:
        raise InputError(f"latents of two shapes, {shapes[0]} and {shapes[1]}; expected one")
    text = row.fields.get("detailed_results")
    results = {} if text in (None, "") else parse_results(text)
    votes = [results.get(name) for name in ("votes_chosen", "votes_rejected")]
    yield Preference(
        row.fields["prompt"], row.image("latent1"), row.image("latent2"),
        votes=None if votes == [None, None] else two_numbers(votes, "votes_chosen, votes_rejected"),
        confidence=optional_number(results.get("confidence"), "confidence"), shape=shapes[0], group=row.number,
    )  # fmt: skip


def load_latent(data: Any, name: str) -> np.ndarray:
    """Load an array (C, h, w), float16 or float32, from the bytes of a .npy file with floating numbers.

    Raises ValueError for any other data.
    """
    if not isinstance(data, bytes):
        raise InputError(f"{name}: got {type(data).__name__}; expected the bytes of a .npy file")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy fails in many ways on unknown bytes
        raise InputError(f"{name}: not a readable .npy file ({str(error)[:200]})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f" or array.size == 0:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputError(f"{name}: got {got}; expected floating numbers in 3 dimensions")
    with np.errstate(over="ignore"):
        return array if array.dtype == np.float16 else array.astype(np.float32, copy=False)  # in this machine's order


def parse_results(text: Any) -> dict[str, Any]:
    """Parse a cell of the column detailed_results. Raises ValueError unless the text is a dict of Python literals."""
    if not isinstance(text, str) or len(text) > 100_000:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise InputError(f"detailed_results: got {got}; expected a dict as text")
    try:
        values = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise InputError(f"detailed_results: {text!r:.60} is no dict of literals ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise InputError(f"detailed_results: got a {type(values).__name__}; expected a dict")
    return values


def _listed_rows(folder: Path) -> set[tuple[str, int, int]] | None:
    """Return (file name, row group, row) of every row in bucket_index.csv; None if `folder` has no such file."""
    path = folder / INDEX
    if not path.is_file():
        return None
    reader = csv.DictReader(io.StringIO(read_text(path, "index of rows")))
    missing = sorted({"parquet_path", "row_group", "row_index"} - set(reader.fieldnames or ()))
    if missing:
        raise InputError(f"{path} lacks the columns {', '.join(missing)}")
    listed = set()
    for record in reader:
        name = PurePosixPath((record["parquet_path"] or "").replace("\\", "/")).name
        try:
            listed.add((name, int(record["row_group"]), int(record["row_index"])))
        except (TypeError, ValueError):
            got = f"row_group {record['row_group']!r:.40}, row_index {record['row_index']!r:.40}"
            raise InputError(f"{path}, line {reader.line_num}: got {got}; expected two numbers") from None
    if not listed:
        raise InputError(f"{path} lists no rows")
    return listed


def _shape(value: Any) -> tuple[int, int, int]:
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value[:100])
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise InputError(f"shape: got {value!r:.60}; expected three integers")
    return tuple(value)
