"""pyarrow, which is an extra, and cells of parquet files read a column of a row group at a time. Torch-free."""

import functools
from typing import Any

from dinalrm_align.train.files import reading

KEPT = 8
"""Columns of row groups that are kept."""


def parquet_module() -> Any:
    """pyarrow.parquet; ImportError, with the extra to install, without it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError("parquet needs the package pyarrow: pip install 'dinalrm-align[data]'") from error
    return parquet


@functools.lru_cache(KEPT)
def read_column(file: str, row_group: int, column: str) -> list[Any]:
    """A column of a row group; the newest KEPT stay in memory."""
    parquet = parquet_module()
    with reading("parquet file", file):
        return parquet.ParquetFile(file).read_row_group(row_group, columns=[column]).column(0).to_pylist()
