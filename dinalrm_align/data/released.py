"""Latent pairs as DiNa-LRM's released code reads them: parquet parts of .npy bytes, and an index of rows. Torch-free.

    part_rank00.parquet   prompt, latent1 (chosen) and latent2 (bytes of .npy files, float [C, h, w], scaled latents),
                          latent1_shape, latent2_shape, and detailed_results: a Python dict as text, with votes_chosen,
                          votes_rejected, confidence; row groups of about 100 rows
    bucket_index.csv      the rows to train on: parquet_path (its file's name counts), row_group, row_index, and more

Nothing is unpickled or evaluated: arrays of objects are refused, and the text may hold literals alone.
"""

import ast
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dinalrm_align.train.files import read_text, reading

INDEX = "bucket_index.csv"
COLUMNS = ("prompt", "latent1", "latent2", "latent1_shape", "latent2_shape")
MAX_RESULTS = 100_000
"""Characters of detailed_results."""


@dataclass(frozen=True, slots=True)
class ReleasedRow:
    """Where a pair lies, and what is said of it. shape: (C, h, w) of both latents."""

    file: Path
    row_group: int
    row: int
    prompt: str
    shape: tuple[int, int, int]
    votes: tuple[float, float] | None
    confidence: float | None


def is_released(folder: Path) -> bool:
    """Whether a folder is in this layout, by its names."""
    return folder.is_dir() and any(folder.glob("part_rank*.parquet"))


def released_files(folder: Path) -> list[Path]:
    """The parts, in order of name. FileNotFoundError when there are none."""
    files = sorted(folder.glob("part_rank*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no part_rank*.parquet; expected pairs in the released layout")
    return files


def listed_rows(folder: Path) -> set[tuple[str, int, int]] | None:
    """(name of the file, row group, row) of every row of bucket_index.csv; None when there is no such file.

    ValueError for an index that lacks a column, holds no rows, or names something that is no number.
    """
    path = folder / INDEX
    if not path.is_file():
        return None
    reader = csv.DictReader(io.StringIO(read_text(path, "index of rows")))
    missing = sorted({"parquet_path", "row_group", "row_index"} - set(reader.fieldnames or ()))
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}")
    rows = set()
    for record in reader:
        name = PurePosixPath((record["parquet_path"] or "").replace("\\", "/")).name
        try:
            rows.add((name, int(record["row_group"]), int(record["row_index"])))
        except (TypeError, ValueError):
            what = f"row_group {record['row_group']!r:.40}, row_index {record['row_index']!r:.40}"
            raise ValueError(f"{path}, line {reader.line_num}: got {what}; expected two numbers") from None
    if not rows:
        raise ValueError(f"{path} lists no rows")
    return rows


def released_rows(file: Path) -> Iterator[ReleasedRow | str]:
    """Every row of a part, in order; of one that cannot be meant, the sentence that says so.

    ValueError or FileNotFoundError for a file that cannot be read, ImportError without pyarrow.
    """
    from dinalrm_align.data.parquet import parquet_module

    parquet = parquet_module()
    with reading("parquet file", file):
        part = parquet.ParquetFile(file)
        names = set(part.schema_arrow.names)
        missing = sorted(set(COLUMNS) - names)
        if missing:
            raise ValueError(f"it lacks the columns {', '.join(missing)}")
    wanted = [name for name in ("prompt", "latent1_shape", "latent2_shape", "detailed_results") if name in names]
    for group in range(part.num_row_groups):
        with reading("parquet file", file):
            records = part.read_row_group(group, columns=wanted).to_pylist()
        for row, record in enumerate(records):
            try:
                yield _row(file, group, row, record)
            except (TypeError, ValueError) as error:
                yield f"{file}, row group {group}, row {row}: {error}"


def load_latent(data: Any, name: str) -> np.ndarray:
    """The array of the bytes of a .npy file, floating, (C, h, w). ValueError for anything else; never unpickles."""
    if not isinstance(data, bytes):
        raise ValueError(f"{name}: got {type(data).__name__}; expected the bytes of a .npy file")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # of bytes of unknown content
        raise ValueError(f"{name}: not a readable .npy file ({str(error)[:200]})") from error
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.dtype.kind != "f" or array.size == 0:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: got {got}; expected floating numbers in 3 dimensions")
    return array


def parse_results(text: Any) -> dict[str, Any]:
    """The dict in detailed_results: literals alone, nothing is run. ValueError for anything else."""
    if not isinstance(text, str) or len(text) > MAX_RESULTS:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise ValueError(f"detailed_results: got {got}; expected a dict as text")
    try:
        values = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"detailed_results: {text!r:.60} is no dict of literals ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise ValueError(f"detailed_results: got a {type(values).__name__}; expected a dict")
    return values


def _row(file: Path, group: int, row: int, record: dict[str, Any]) -> ReleasedRow:
    shapes = [_shape(record[name]) for name in ("latent1_shape", "latent2_shape")]
    if shapes[0] != shapes[1]:
        raise ValueError(f"latents of two shapes, {shapes[0]} and {shapes[1]}; expected one")
    if not isinstance(record["prompt"], str):
        raise ValueError(f"prompt: got {type(record['prompt']).__name__}; expected text")
    told = record.get("detailed_results")
    results = {} if told in (None, "") else parse_results(told)
    votes = [results.get(name) for name in ("votes_chosen", "votes_rejected")]
    confidence = results.get("confidence")
    return ReleasedRow(
        file, group, row, record["prompt"], shapes[0],
        None if None in votes else (_number(votes[0], "votes_chosen"), _number(votes[1], "votes_rejected")),
        None if confidence is None else _number(confidence, "confidence"),
    )  # fmt: skip


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: got {value!r:.40}; expected a number")
    return float(value)


def _shape(value: Any) -> tuple[int, int, int]:
    """Three positive integers, as a list or as text."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value[:100])
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"shape: got {value!r:.60}; expected three integers") from error
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(type(n) is int and n > 0 for n in value):
        raise ValueError(f"shape: got {value!r:.60}; expected three integers")
    return tuple(value)
