"""Read records from JSON, jsonl and parquet files. Parquet needs pyarrow (extra `data`). Torch-free."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinalrm_align.data.formats.record import INVALID, Bad, Cell, ImageRef, Row, is_path
from dinalrm_align.train.files import InputError, parse_json, read_text, reading


def parquet_module() -> Any:
    """Import and return pyarrow.parquet. Raises ImportError with the command that installs it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet needs the package pyarrow: pip install 'dinalrm-align[data]'") from error
    return parquet


@functools.lru_cache(4)
def _read_column(file: str, row_group: int, column: str) -> list[Any]:
    parquet = parquet_module()
    with reading("parquet file", file):
        return parquet.ParquetFile(file).read_row_group(row_group, columns=[column]).column(0).to_pylist()


@functools.lru_cache(4)
def row_group_starts(file: str) -> list[int]:
    """Return the index of the first row of each row group in a parquet file, followed by the total number of rows."""
    parquet = parquet_module()
    with reading("parquet file", file):
        about = parquet.ParquetFile(file).metadata
        return [0, *itertools.accumulate(about.row_group(group).num_rows for group in range(about.num_row_groups))]


def image_source(image: ImageRef, folder: Path) -> Path | bytes:
    """Return the path of an image file in `folder`, or the bytes of an image file stored in a parquet cell.

    A cell holds bytes, a path, or {"bytes", "path"}, of which the bytes are used if there are any. Raises ValueError if
    the parquet file is damaged or the cell holds none of these.
    """
    if not isinstance(image, Cell):
        return folder / image
    data = _read_column(image.file, image.row_group, image.column)[image.row]
    if isinstance(data, dict):  # written by the hub's `datasets`
        data = data.get("bytes") or data.get("path")
    if is_path(data):
        return folder / data
    if not isinstance(data, bytes) or not data:
        raise InputError(f"{image}: got {type(data).__name__}; expected the bytes or the path of an image")
    return data


def table_rows(
    source: Path | Sequence[Path],
    bad: Bad,
    columns: Sequence[str] = (),
    images: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield the records of a JSON list, a jsonl file, or parquet files.

    source: a file, a folder of parquet files, or a list of parquet files.
    columns: parquet columns to read; each file must have them.
    images: parquet columns that each file must also have; their cells are not read.
    optional: parquet columns to read if they exist.
    """
    files = list(source) if isinstance(source, Sequence) else [source]
    if files[0].is_dir():
        files = sorted(files[0].glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"{source} holds no parquet files; expected some with {', '.join(columns)}")
    if files[0].suffix == ".parquet":
        yield from parquet_rows(files, bad, columns, images, optional)
    elif files[0].suffix == ".jsonl":
        yield from _lines(files[0], bad)
    else:
        for number, record in enumerate(read_records(files[0])):
            if isinstance(record, dict):
                yield Row(f"{files[0]}, entry {number}", number, record)
            else:
                bad(INVALID, f"{files[0]}, entry {number}: got {type(record).__name__}; expected an object")


def parquet_rows(
    files: Sequence[Path], bad: Bad, columns: Sequence[str], images: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Row]:
    """Yield the records of parquet files; call `bad` for each unreadable file. Arguments are those of `table_rows`."""
    parquet = parquet_module()
    number = 0
    for path in files:
        try:
            with reading("parquet file", path):
                file = parquet.ParquetFile(path)
                names = set(file.schema_arrow.names)
                missing = sorted({*columns, *images} - names)
                if missing:
                    raise InputError(f"it lacks the columns {', '.join(missing)}")
            wanted = [*columns, *(name for name in optional if name in names)]
            for group in range(file.num_row_groups):
                with reading("parquet file", path):
                    records = _records(file.read_row_group(group, columns=wanted))
                for row, record in enumerate(records):
                    yield Row(f"{path}, row group {group}, row {row}", number, record, Cell(str(path), group, row, ""))
                    number += 1
        except (OSError, ValueError) as error:
            bad("unreadable file", str(error))


def _records(table: Any) -> list[dict[str, Any]]:
    """Return the rows of a table. In text columns, bytes that are not UTF-8 become surrogates, as by `read_text`."""
    try:
        return table.to_pylist()
    except UnicodeDecodeError:
        columns = []
        for column in table.columns:
            if str(column.type) not in ("string", "large_string"):
                columns.append(column.to_pylist())
            else:
                cells = column.cast("large_binary").to_pylist()
                columns.append([cell if cell is None else cell.decode("utf-8", "surrogateescape") for cell in cells])
        return [dict(zip(table.column_names, values)) for values in zip(*columns, strict=True)]


def read_records(path: Path) -> list[Any]:
    """Return the list in a JSON file. Raises ValueError if the file holds anything else."""
    records = parse_json(read_text(path, "file of preferences", errors="surrogateescape"), str(path))
    if not isinstance(records, list):
        raise InputError(f"{path}: got a JSON {type(records).__name__}; expected a list of objects")
    return records


def _lines(path: Path, bad: Bad) -> Iterator[Row]:
    lines = enumerate(read_text(path, "file of pairs", errors="surrogateescape").split("\n"), start=1)
    for count, (number, line) in enumerate((number, line) for number, line in lines if line.strip()):
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where)
            if not isinstance(record, dict):
                raise InputError(f"{where}: got a {type(record).__name__}; expected an object")
        except ValueError as error:
            bad(INVALID, str(error))
        else:
            yield Row(where, count, record)
