"""Make a manifest: check the rows, cut them into parts, write them down."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framework.data.manifest.table import (
    LIMITS,
    SCHEMA,
    SPLITS,
    VERSION,
    InStore,
    Manifest,
    fingerprint_of,
    limits_of,
    part_name,
    snapshot_name,
    table_digest,
)
from framework.data.parquet import to_parquet
from framework.printable import printable
from framework.storage import Store, normalize_url

# Clips in a part, at most, on the average: some 100 MB in memory, captions and all.
PART_ROWS = 1 << 18


def make_manifest(table: pa.Table, shards_url: str, part_rows: int = PART_ROWS) -> Manifest:
    """A manifest in memory, see `cut_into_parts`."""
    summary = _Summary()
    parts = tuple(cut_into_parts([table], table.num_rows, part_rows))
    for part in parts:
        summary.add(part)
    return summary.manifest(shards_url, _InMemory(parts))


def write_manifest(
    store: Store, manifest: Manifest, failures: Mapping[str, int] | None = None
) -> None:
    """Write a manifest, see `save_manifest`."""
    parts = map(manifest.part, range(manifest.num_parts))
    save_manifest(store, parts, manifest.shards_url, failures, manifest.encoding)


def cut_into_parts(
    tables: Iterable[pa.Table], num_rows: int, part_rows: int = PART_ROWS
) -> Iterator[pa.Table]:
    """Check rows, and give them in parts of about `part_rows`, each sorted by clip_id.

    Columns beyond SCHEMA are scores: numbers, null where a clip has none; all tables have the same.
    No more than a part is held: the others wait in a temporary folder. ValueError names the column
    or the clips at fault; two clips of one id are refused: all randomness hangs on the id.
    """
    bits = max(0, (num_rows - 1) // part_rows).bit_length()  # 2^bits parts
    with ExitStack() as open_files:
        folder = Path(open_files.enter_context(TemporaryDirectory(prefix="longtake-")))
        writers: dict[int, pa.ipc.RecordBatchFileWriter] = {}
        schema = _conform(SCHEMA.empty_table()).schema
        for table in _gathered(tables, part_rows):
            table = _conform(table).combine_chunks().replace_schema_metadata(None)
            schema = table.schema
            ids = table["clip_id"].to_numpy()
            order = np.argsort(ids)
            table, borders = table.take(order), np.arange((1 << bits) + 1)
            places = np.searchsorted(ids[order] >> (63 - bits), borders).tolist()
            for part, (start, stop) in enumerate(pairwise(places)):
                if part not in writers:
                    sink = open_files.enter_context(pa.OSFile(str(folder / f"{part}"), "wb"))
                    writers[part] = pa.ipc.new_file(sink, schema)
                writers[part].write_table(table.slice(start, stop - start))
        for writer in writers.values():
            writer.close()
        for part in range(1 << bits):
            table = schema.empty_table()
            if part in writers:
                with pa.OSFile(str(folder / f"{part}")) as source:
                    table = pa.ipc.open_file(source).read_all()
            yield _in_order(table)


def _gathered(tables: Iterable[pa.Table], num_rows: int) -> Iterator[pa.Table]:
    """Tables of some `num_rows`: a shard's rows alone would make crumbs of each part."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(table.num_rows for table in waiting) >= num_rows:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _in_order(table: pa.Table) -> pa.Table:
    table = table.take(pc.sort_indices(table["clip_id"])).combine_chunks()
    ids = table["clip_id"].to_numpy()
    if (twins := np.flatnonzero(ids[1:] == ids[:-1])).size:
        rows = table.slice(twins[0], 2).select(["shard", "key"]).to_pylist()
        first, second = (printable(row) for row in rows)
        raise ValueError(
            f"clip_id {ids[twins[0]]} belongs to both {first} and {second}; rename one key"
        )
    return table


class _Summary:
    """What is said of all parts together."""

    def __init__(self) -> None:
        self.digests: list[str] = []
        self.counts = dict.fromkeys(("clips", *SPLITS), 0)
        self.first_shard = ""
        self.scores: tuple[str, ...] = ()
        self.sources: set[str] = set()

    def add(self, part: pa.Table) -> str:
        """Take a part in; its digest."""
        self.digests.append(table_digest(part))
        self.scores = tuple(part.column_names[len(SCHEMA) :])
        if part.num_rows:
            first = pc.min(part["shard"]).as_py()
            self.first_shard = min(self.first_shard or first, first)
            self.sources.update(part["source"].unique().to_pylist())
            self.counts["clips"] += part.num_rows
            for split in SPLITS:
                self.counts[split] += pc.sum(pc.equal(part["split"], split)).as_py()
        return self.digests[-1]

    def manifest(
        self,
        shards_url: str,
        load: Callable[[int], pa.Table],
        encoding: Mapping[str, Any] | None = None,
    ) -> Manifest:
        return Manifest(
            shards_url=normalize_url(shards_url),
            fingerprint=fingerprint_of(self.digests),
            first_shard=self.first_shard,
            scores=self.scores,
            sources=tuple(sorted(self.sources)),
            part_digests=tuple(self.digests),
            load=load,
            encoding=encoding or {},
        )


def save_manifest(
    store: Store,
    parts: Iterable[pa.Table],
    shards_url: str,
    failures: Mapping[str, int] | None = None,
    encoding: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write parts of `cut_into_parts` as a snapshot, and commit it through `manifest.json`.

    failures: clips that were left out, by cause; kept for the reader's information.
    """
    summary = _Summary()
    for table in parts:
        store.write(part_name(summary.add(table)), to_parquet([table]))
    manifest = summary.manifest(shards_url, InStore(store, tuple(summary.digests)), encoding)
    snapshot = {
        "shards_url": manifest.shards_url,
        "first_shard": manifest.first_shard,
        "scores": manifest.scores,
        "sources": manifest.sources,
        "parts": manifest.part_digests,
        "encoding": dict(manifest.encoding),
    }
    store.write(snapshot_name(manifest.fingerprint), _to_json(snapshot))
    commit = {
        "version": VERSION,
        "fingerprint": manifest.fingerprint,
        "shards_url": manifest.shards_url,
        "counts": summary.counts,
        "failures": dict(sorted((failures or {}).items())),
    }
    store.write("manifest.json", _to_json(commit))
    return manifest


@dataclass(frozen=True)
class _InMemory:
    parts: tuple[pa.Table, ...]

    def __call__(self, index: int) -> pa.Table:
        return self.parts[index]


def _conform(table: pa.Table) -> pa.Table:
    """SCHEMA's columns in order and type, then the scores by name as float64."""
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise ValueError(f"the clip table lacks the column(s) {', '.join(missing)}")
    columns = {}
    for field in SCHEMA:
        columns[field.name] = _cast(table[field.name], field.type, field.name)
        if columns[field.name].null_count:
            raise ValueError(f"column {field.name} has empty cells; only scores may")
    if pc.list_flatten(columns["captions"]).null_count:
        raise ValueError('column captions has empty cells; write "" for no caption')
    for name in sorted(set(table.column_names) - set(SCHEMA.names)):
        score = _cast(table[name], pa.float64(), name)
        # One way to say "no score": not-a-number and infinities are made null.
        columns[name] = pc.if_else(pc.is_finite(score), score, None)
    table = pa.table(columns)
    for column, (low, high) in LIMITS.items():
        cells = table[column]
        holds = pc.and_(pc.greater_equal(cells, low), pc.less_equal(cells, high))
        _demand(table, holds, f"{column} must be {limits_of(column)}")
    _demand(table, pc.greater(pc.list_value_length(table["captions"]), 0), "captions may not be []")
    _demand(
        table,
        pc.is_in(table["split"], value_set=pa.array(SPLITS)),
        f"split must be one of {', '.join(SPLITS)}",
    )
    return table


def _cast(column: pa.ChunkedArray, kind: pa.DataType, name: str) -> pa.ChunkedArray:
    try:
        return column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(
            f"column {printable(name)}: {column.type} is not {kind}: {error}"
        ) from error


def _demand(table: pa.Table, holds: pa.ChunkedArray, rule: str) -> None:
    if not pc.all(holds, min_count=0).as_py():
        row = table.filter(pc.invert(holds)).slice(0, 1).select(["shard", "key"]).to_pylist()[0]
        key, shard = printable(row["key"]), printable(row["shard"])
        raise ValueError(f"clip '{key}' of shard '{shard}': {rule}")


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
