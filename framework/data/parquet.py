"""Tables as Parquet: in memory, and in a store."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from framework.storage import Store


def to_parquet(tables: Sequence[pa.Table]) -> pa.Buffer:
    """A file with one row group a table; the same tables always give the same bytes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, tables[0].schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    return sink.getvalue()


def from_parquet(data: pa.Buffer) -> pa.Table:
    """The rows of a file that lies in Arrow's own memory, not in Python's: `Store.read_buffer`."""
    return pq.read_table(pa.BufferReader(data))


def read_table(store: Store, name: str) -> pa.Table:
    """The rows of a file in a store."""
    return from_parquet(store.read_buffer(name))
