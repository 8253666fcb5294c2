"""Parquet files as rows, by pyarrow (the extra ``data``), some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from multihead.data.files import Source
from multihead.data.formats import Record
from multihead.errors import UserError, tr

_ROWS = 512


def read_parquet(source: Source) -> Iterator[Record]:
    """The rows, counted from 1. Raises UserError: pyarrow missing, or a file that is not whole."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(tr("this is a Parquet file; reading it needs pyarrow: pip install 'multihead[data]'",
                           "这是 Parquet 文件，读取它需要 pyarrow：pip install 'multihead[data]'"),
                        where=source.name) from None
    number = 0
    try:
        where = source.path if source.content is None else pa.BufferReader(source.content)
        with pq.ParquetFile(where, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(batch_size=_ROWS):
                for values in batch.to_pylist():
                    number += 1
                    yield Record(number, values)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(tr(f"this Parquet file cannot be read after row {number}: {error}",
                           f"这个 Parquet 文件在第 {number} 行之后无法读取：{error}"),
                        where=f"{source.name}:{number + 1}") from None
