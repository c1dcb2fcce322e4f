"""Tables as Parquet: in memory, and in a store."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
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


def check_unpacked(data: pa.Buffer, max_rows: int, max_bytes: int) -> None:
    """ValueError where a file of strangers would make a table of more; some kB may hold gigabytes.

    Texts are looked at as Parquet may store them, each once.
    """
    facts = pq.ParquetFile(pa.BufferReader(data)).metadata
    if facts.num_rows > max_rows:
        raise ValueError(f"{facts.num_rows:,} rows, the limit is {max_rows:,}; split it")
    packed, texts = 0, []
    for i in range(facts.num_columns):
        column = facts.schema.column(i)
        width = {"BYTE_ARRAY": 4, "FIXED_LEN_BYTE_ARRAY": column.length}.get(
            column.physical_type, 8
        )
        if column.physical_type == "BYTE_ARRAY":
            texts.append(column.path)
        for group in range(facts.num_row_groups):
            chunk = facts.row_group(group).column(i)
            packed += max(chunk.total_uncompressed_size, chunk.num_values * width)
    if packed > max_bytes:
        raise ValueError(f"{packed:,} bytes unpacked, the limit is {max_bytes:,}; split it")
    table = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts).read()
    unpacked = sum(_unpacked(chunk) for column in table.columns for chunk in column.chunks)
    if unpacked > max_bytes:
        raise ValueError(f"{unpacked:,} bytes unpacked, the limit is {max_bytes:,}; split it")


def _unpacked(array: pa.Array) -> int:
    """Bytes of an array, were each text stored as often as it occurs."""
    if pa.types.is_dictionary(array.type):
        lengths = pc.binary_length(array.dictionary)
        return array.indices.nbytes + (pc.sum(pc.take(lengths, array.indices)).as_py() or 0)
    if pa.types.is_struct(array.type):
        return sum(map(_unpacked, array.flatten()))
    if pa.types.is_nested(array.type):
        return array.nbytes - array.values.nbytes + _unpacked(array.values)
    return array.nbytes


def read_table(store: Store, name: str) -> pa.Table:
    """The rows of a file in a store."""
    return from_parquet(store.read_buffer(name))
