"""Tables to Parquet and back."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framework.data.parquet import check_unpacked, from_parquet, read_table, to_parquet
from framework.storage import Store

READ_AND_END = """
import sys
from framework.data.parquet import read_table
from framework.storage import Store
tables = [read_table(Store(sys.argv[1]), "table.parquet") for _ in range(3)]
"""


def table() -> pa.Table:
    columns = {f"column {i}": pa.array(range(i, i + 80)) for i in range(20)}
    return pa.table({**columns, "text": [f"clip {i}" for i in range(80)]})


def test_a_table_comes_back_with_its_metadata_and_a_row_group_a_piece(tmp_path: Path) -> None:
    rows = table().replace_schema_metadata({"facts": "kept"})
    data = to_parquet([rows.slice(0, 30), rows.slice(30)])
    assert from_parquet(data).equals(rows, check_metadata=True)
    file = pq.ParquetFile(pa.BufferReader(data))
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [30, 50]
    assert data.equals(to_parquet([rows.slice(0, 30), rows.slice(30)]))
    store = Store(tmp_path)
    store.write("empty.parquet", to_parquet([rows.slice(0, 0)]))
    assert read_table(store, "empty.parquet").schema.equals(rows.schema)


def test_a_process_that_ends_as_soon_as_it_has_read_ends_well(tmp_path: Path) -> None:
    """Of Python's bytes, more than half of such processes aborted: see `Store.read_buffer`."""
    Store(tmp_path).write("table.parquet", to_parquet([table()]))
    command = [sys.executable, "-c", READ_AND_END, str(tmp_path)]
    for _ in range(4):
        four = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
        ends = [(process.communicate(timeout=300)[1], process.returncode) for process in four]
        assert [code for _, code in ends] == [0] * 4, ends


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x" * 1000] * 1000),
        pa.array([b"x" * 1000] * 1000, pa.binary(1000)),
        pa.array([["x" * 1000] * 10] * 100),
        pa.array([{"a": [{"b": "x" * 1000}]}] * 1000),
        pa.array([[1] * 125_000] * 1),
        pa.array([None, {"a": "x" * 1000}] * 1000),
    ],
    ids=["text", "bytes", "list", "struct", "numbers", "nulls"],
)
def test_what_a_file_unpacks_to_is_known_before(column: pa.Array) -> None:
    """A megabyte of few bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"column": column}), sink, compression="zstd")
    data = sink.getvalue()
    assert data.size < 30_000
    check_unpacked(data, max_rows=2000, max_bytes=1_200_000)
    with pytest.raises(ValueError, match="bytes unpacked, the limit is 900,000; split it"):
        check_unpacked(data, max_rows=2000, max_bytes=900_000)
    with pytest.raises(ValueError, match="rows, the limit is 0; split it"):
        check_unpacked(data, max_rows=0, max_bytes=900_000)
