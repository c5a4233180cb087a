"""Access to parquet files through pyarrow, which is an extra. Torch-free."""

import functools
import itertools
from typing import Any

from dinalrm_align.train.files import reading

CACHED = 4
"""Columns of row groups kept in memory."""


def parquet_module() -> Any:
    """pyarrow.parquet; ImportError, naming the extra to install, without it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet needs the package pyarrow: pip install 'dinalrm-align[data]'") from error
    return parquet


@functools.lru_cache(CACHED)
def read_column(file: str, row_group: int, column: str) -> list[Any]:
    """The values of a column in a row group."""
    parquet = parquet_module()
    with reading("parquet file", file):
        return parquet.ParquetFile(file).read_row_group(row_group, columns=[column]).column(0).to_pylist()


@functools.lru_cache(CACHED)
def row_group_starts(file: str) -> list[int]:
    """The first row of each row group."""
    parquet = parquet_module()
    with reading("parquet file", file):
        about = parquet.ParquetFile(file).metadata
        return [0, *itertools.accumulate(about.row_group(group).num_rows for group in range(about.num_row_groups))]
