"""Raw records of JSON, jsonl and parquet files. Torch-free."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dinalrm_align.data.formats.parquet import parquet_module
from dinalrm_align.data.formats.record import Bad, Cell, Row
from dinalrm_align.train.files import parse_json, read_text, reading


def table_rows(
    source: Path | Sequence[Path],
    bad: Bad,
    columns: Sequence[str] = (),
    images: Sequence[str] = (),
    optional: Sequence[str] = (),
) -> Iterator[Row]:
    """The records of a JSON list, a jsonl, or parquet files.

    Args:
        source: a file; a folder of parquet files; or several files.
        bad: see `read_preferences`.
        columns, images: columns that a parquet file must have; those of images are not read here.
        optional: columns that are read where they exist.
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
                bad("invalid record", f"{files[0]}, entry {number}: got {type(record).__name__}; expected an object")


def parquet_rows(
    files: Sequence[Path], bad: Bad, columns: Sequence[str], images: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Row]:
    """The records of parquet files, a row group at a time. Files that cannot be read are passed to `bad`."""
    parquet = parquet_module()
    number = 0
    for path in files:
        try:
            with reading("parquet file", path):
                file = parquet.ParquetFile(path)
                names = set(file.schema_arrow.names)
                missing = sorted({*columns, *images} - names)
                if missing:
                    raise ValueError(f"it lacks the columns {', '.join(missing)}")
            wanted = [*columns, *(name for name in optional if name in names)]
            for group in range(file.num_row_groups):
                with reading("parquet file", path):
                    records = file.read_row_group(group, columns=wanted).to_pylist()
                for row, record in enumerate(records):
                    yield Row(f"{path}, row group {group}, row {row}", number, record, Cell(str(path), group, row, ""))
                    number += 1
        except (OSError, ValueError) as error:
            bad("unreadable file", str(error))


def read_records(path: Path) -> list[Any]:
    """The JSON list in a file."""
    records = parse_json(read_text(path, "file of preferences"), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: got a JSON {type(records).__name__}; expected a list of objects")
    return records


def _lines(path: Path, bad: Bad) -> Iterator[Row]:
    count = 0
    for number, line in enumerate(read_text(path, "file of pairs").split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = parse_json(line, where)
            if not isinstance(record, dict):
                raise ValueError(f"{where}: got a {type(record).__name__}; expected an object")
        except ValueError as error:
            bad("invalid record", str(error))
        else:
            yield Row(where, count, record)
        count += 1
