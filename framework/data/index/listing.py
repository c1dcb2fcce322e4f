"""What to index: all tars of a folder, or the loose files that a table lists.

A table is CSV, Parquet or JSONL with a column `path` (from the table's folder and below it; with
`IndexConfig.anywhere` also elsewhere, or a URL) and, as it likes, caption, captions, source, video,
fps and numbers, which mean what they mean in a sample's JSON (framework/data/index/shard.py).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from framework.data.config import TABLES, IndexConfig, split_shards_url
from framework.data.index.shard import FORMAT, ShardIndex, index_files, index_shard
from framework.data.parquet import check_unpacked, from_parquet
from framework.printable import printable
from framework.seeding import hash64
from framework.storage import Store, join_url, normalize_url

COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
FILES_PER_UNIT = 512
VERSIONS_AT_ONCE = 16
# Chosen by hand: a table of some million files, as it lies in memory. JSON is nested by few levels;
# Arrow reads it by recursion, which ends the process where it is nested by thousands.
MAX_TABLE_BYTES = 2 << 30
MAX_TABLE_ROWS = 20_000_000
MAX_TABLE_COLUMNS = 1000
MAX_TABLE_DEPTH = 64
_TEXTS = ("path", "caption", "captions", "source", "video")
# A text of JSON, and the colon that makes a name of it.
_STRING = re.compile(rb'"(?:[^"\\\n]++|\\.)*+"(\s*:)?')


@dataclass(frozen=True)
class Unit:
    """What one task indexes: a tar, or some lines of a table."""

    name: str
    files: pa.Table | None = None  # those lines

    @property
    def kept_as(self) -> str:
        """The name of the file that keeps what was found."""
        return f"shards/{hash64(self.name):016x}.parquet"

    def made_of(self, root: str, config: IndexConfig) -> str:
        """Another text wherever `index` may give something else. FileNotFoundError for no tar."""
        store = Store(root, anywhere=config.anywhere)
        if self.files is None:
            version = store.version(self.name)
        else:
            with ThreadPoolExecutor(VERSIONS_AT_ONCE) as pool:
                found = pool.map(lambda path: _version(store, path), self.files["path"].to_pylist())
                version = hashlib.blake2b(repr([*found]).encode(), digest_size=16).hexdigest()
        return f"{FORMAT} {version} checksum={config.checksum} source={config.source}"

    def index(self, root: str, config: IndexConfig) -> ShardIndex:
        """What it holds."""
        if self.files is None:
            return index_shard(root, self.name, config)
        return index_files(root, self.files, config)


def list_units(shards_url: str, anywhere: bool = False) -> tuple[str, list[Unit]]:
    """The folder that names count from, and what there is to index.

    anywhere: whether a table may name files outside its folder. ValueError where there is nothing,
    where a table cannot be read, or where it names a file that it may not.
    """
    root, table = split_shards_url(shards_url)
    store = Store(root, anywhere=anywhere)
    if table:
        return root, _table_units(store, table)
    names = store.list()
    if packed := [name for name in names if name.endswith(COMPRESSED)]:
        raise ValueError(
            f"shards_url={store.url!r} has compressed shards ({printable(packed[0])}, …), which "
            "have no byte offsets; unpack them to .tar"
        )
    units = [Unit(name) for name in names if name.endswith(".tar")]
    if not units:
        raise ValueError(
            f"shards_url={store.url!r} has no file that ends in .tar; check the URL, or name a "
            f"table of files ({', '.join(TABLES)})"
        )
    return store.url, units


def _table_units(store: Store, name: str) -> list[Unit]:
    where = join_url(store.url, name)
    try:
        table = _read_table(store, name)
        if table.num_rows > MAX_TABLE_ROWS:
            raise ValueError(f"{table.num_rows:,} rows, the limit is {MAX_TABLE_ROWS:,}; split it")
        _check_columns(table.column_names)
        if "path" in table.column_names:
            paths = table["path"].cast(pa.string()).to_pylist()
    except (FileNotFoundError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{where} is not a table of files: {printable(error, 500)}") from error
    if "path" not in table.column_names:
        have = printable(", ".join(table.column_names))
        raise ValueError(f"{where} lacks the column path; it has {have}")
    if not paths:
        raise ValueError(f"{where} lists no file")
    if "" in paths or None in paths:
        raise ValueError(f"{where} has an empty path")
    relative = [_relative(store.url, path) for path in paths]
    try:
        for path in relative:
            store.at(path)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    column = pa.array(relative, pa.string())
    counts = pc.value_counts(column)
    if twins := counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist():
        raise ValueError(f"{where} lists {printable(twins[0])} twice")
    table = table.set_column(table.column_names.index("path"), "path", column)
    stretches = [
        table.slice(start, FILES_PER_UNIT) for start in range(0, len(paths), FILES_PER_UNIT)
    ]
    return [Unit(_name_of(name, stretch), stretch) for stretch in stretches]


def _read_table(store: Store, name: str) -> pa.Table:
    if (size := store.size(name)) > MAX_TABLE_BYTES:
        raise ValueError(f"{size:,} bytes, the limit is {MAX_TABLE_BYTES:,}; split it")
    data = store.read_buffer(name)
    if name.endswith(".parquet"):
        check_unpacked(data, MAX_TABLE_ROWS, MAX_TABLE_BYTES)
        return from_parquet(data)
    source = pa.BufferReader(data)
    if name.endswith(".jsonl"):
        _check_json(data)
        return pyarrow.json.read_json(source)
    head = bytes(memoryview(data)[: MAX_TABLE_COLUMNS * 1000])
    _check_columns(range(re.split(rb"[\r\n]", head, maxsplit=1)[0].count(b",") + 1))
    options = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(_TEXTS, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    parsing = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(source, parse_options=parsing, convert_options=options)


def _check_columns(names: Collection[Any]) -> None:
    if len(names) > MAX_TABLE_COLUMNS:
        raise ValueError(
            f"{len(names):,} columns, the limit is {MAX_TABLE_COLUMNS}; leave some out"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"the column {twice[0]} comes twice; rename one")


def _check_json(data: pa.Buffer) -> None:
    """ValueError where JSON is nested too deep, or has too many names for Arrow's reader."""
    names: set[bytes] = set()

    def take_out(string: re.Match[bytes]) -> bytes:
        if string[1] and len(names) <= MAX_TABLE_COLUMNS:
            names.add(string[0])
        return b""

    bare = np.frombuffer(_STRING.sub(take_out, memoryview(data)), np.uint8)
    if len(names) > MAX_TABLE_COLUMNS:
        raise ValueError(f"more than {MAX_TABLE_COLUMNS} names; leave some out")
    opened = np.isin(bare, np.frombuffer(b"[{", np.uint8))
    steps = opened.astype(np.int8) - np.isin(bare, np.frombuffer(b"]}", np.uint8))
    level = np.cumsum(steps[steps != 0], dtype=np.int64)
    # From the lowest level before: a part that Arrow reads by itself may begin anywhere.
    lowest = np.minimum.accumulate(np.minimum(level, 0))
    if (depth := int((level - lowest).max(initial=0))) > MAX_TABLE_DEPTH:
        raise ValueError(f"JSON nested {depth:,} deep, the limit is {MAX_TABLE_DEPTH}; flatten it")


def _relative(root: str, path: str) -> str:
    """From `root` where the file lies below it, so that both can move together."""
    return normalize_url(join_url(root, path)).removeprefix(f"{root}/")


def _name_of(table: str, files: pa.Table) -> str:
    """By content, so that lines added to a table leave those before them as they are."""
    digest = hashlib.blake2b(repr(files.to_pylist()).encode(), digest_size=8).hexdigest()
    return f"{table}/{digest}"


def _version(store: Store, path: str) -> str:
    where, name = store.at(path)
    try:
        return where.version(name)
    except FileNotFoundError:
        return "gone"
