"""Pictures inside parquet files, as the hub's `datasets` writes them: {"bytes": ..., "path": ...}, or bytes alone."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dinalrm_align.train.files import reading

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


class ParquetPictures:
    """One parquet file: its plain columns at once, its pictures when they are asked for, a row group at a time.

    ImportError when pyarrow is not installed, ValueError when the file is damaged or lacks a column.
    """

    def __init__(self, path: Path, columns: Sequence[str], pictures: Sequence[str]) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise ImportError(
                f"{path} is parquet, which needs the package pyarrow: pip install 'dinalrm-align[data]'", name="pyarrow"
            )
        self.path, self.columns, self.pictures = path, list(columns), list(pictures)
        with reading("parquet file", path):
            file = self._file
        lacking = [name for name in (*columns, *pictures) if name not in file.schema_arrow.names]
        if lacking:
            raise ValueError(f"{path}: got the columns {', '.join(file.schema_arrow.names)}; expected {lacking[0]}")
        sizes = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._kept: tuple[int, Any] | None = None

    @functools.cached_property
    def _file(self) -> ParquetFile:
        from pyarrow.parquet import ParquetFile

        return ParquetFile(self.path)

    def rows(self) -> Iterator[dict[str, Any]]:
        """The plain columns of every row, with row and row_group."""
        with reading("parquet file", self.path):
            records = self._file.read(columns=self.columns).to_pylist()
        groups = np.searchsorted(self._starts, np.arange(len(records)), side="right") - 1
        for row, (record, group) in enumerate(zip(records, groups, strict=True)):
            yield {**record, "row": row, "row_group": int(group)}

    def reader(self, row: int, column: str) -> functools.partial[bytes]:
        """What reads the bytes of a picture."""
        return functools.partial(self.read, row, column)

    def read(self, row: int, column: str) -> bytes:
        """The bytes of a picture; ValueError where the cell is empty or the file damaged."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        cell = self._pictures_of(group)[column][row - int(self._starts[group])].as_py()
        data = cell.get("bytes") if isinstance(cell, dict) else cell
        if not isinstance(data, bytes) or not data:
            raise ValueError(f"{self.path}, row {row}: {column} holds no picture")
        return data

    def _pictures_of(self, group: int) -> Any:
        """The picture columns of a row group; the last one is kept, since pictures are asked for in order."""
        if self._kept is None or self._kept[0] != group:
            with reading("parquet file", self.path):
                self._kept = (group, self._file.read_row_group(group, columns=self.pictures))
        return self._kept[1]
