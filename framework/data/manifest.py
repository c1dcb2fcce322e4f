"""The clip table: one row for every clip there is, and what else a plan needs to know of it.

A manifest is written once by `framework.data.index` and never edited; a run pins one snapshot by
its fingerprint. On disk a snapshot is `clips-<fingerprint>.parquet`, and `manifest.json`, written
last, names the snapshot that counts now. Older snapshots stay readable by their fingerprint.

Invariant: rows are sorted by clip_id, which is unique; the fingerprint depends on the rows alone,
neither on where the shards lie nor on how Parquet or Arrow happen to store them.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framework.seeding import hash64
from framework.storage import Store, join_url, normalize_url

SCHEMA = pa.schema(
    [
        ("clip_id", pa.int64()),  # `clip_id(shard, key)`: stable, >= 0
        ("key", pa.string()),
        ("shard", pa.string()),  # relative to the manifest's shards_url, or an absolute URL
        ("member", pa.string()),  # file name in the tar
        ("offset", pa.int64()),  # bytes from the start of the shard to the payload
        ("size_bytes", pa.int64()),
        ("checksum", pa.int64()),  # `checksum(payload)`
        ("num_frames", pa.int32()),  # a still has one
        ("fps", pa.float32()),  # frames a second
        ("height", pa.int32()),
        ("width", pa.int32()),
        # At least one, "" where the clip has none. Large: 64-bit offsets, since the captions of
        # tens of millions of clips exceed 2 GiB.
        ("captions", pa.list_(pa.large_string())),
        ("source", pa.string()),  # the collection that it belongs to, for weights
        ("video", pa.string()),  # the source video: its clips share a split
        ("split", pa.string()),  # "train" or "heldout"
    ]
)
SPLITS = ("train", "heldout")
_SHARDS_URL = b"longtake.shards_url"
_VERSION = 1  # of the format on disk and of the fingerprint


def clip_id(shard: str, key: str) -> int:
    """The id of a clip: 63 bits of hash64 of its shard's name and its key in the shard."""
    return hash64("clip", shard, key) >> 1


def checksum(payload: bytes | memoryview) -> int:
    """CRC-32 of a clip's bytes: noise inside an MP4 decodes without an error, so we must look."""
    return zlib.crc32(payload)


def assign_split(video_ids: Iterable[str], heldout_fraction: float) -> list[str]:
    """The split of each clip, from a hash of its source video: it stays when data grows."""
    if not 0 <= heldout_fraction < 1:
        raise ValueError(
            f"heldout_fraction={heldout_fraction} must be at least 0 and less than 1; try 0.05"
        )
    limit = int(heldout_fraction * 2**64)
    return [SPLITS[hash64("heldout", video) < limit] for video in video_ids]


@dataclass(frozen=True)
class Manifest:
    """A snapshot of the clip table. Make it with `make_manifest`, or `read_manifest`."""

    table: pa.Table  # SCHEMA, then score columns (float64) by name; sorted by clip_id
    shards_url: str  # may be replaced where the shards have moved
    fingerprint: str  # of the table's rows: 32 hexadecimal digits

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the score columns."""
        return tuple(self.table.column_names[len(SCHEMA) :])

    @cached_property
    def clip_ids(self) -> np.ndarray:
        """(n,) int64, ascending."""
        return self.table["clip_id"].to_numpy()

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The names of all sources, sorted."""
        return tuple(sorted(self.table["source"].unique().to_pylist()))

    @property
    def first_shard(self) -> str:
        """The shard that comes first by name; there is one, since a manifest has clips."""
        return pc.min(self.table["shard"]).as_py()

    def split(self, name: str) -> "Manifest":
        """The rows of one split as a manifest of its own, with its own fingerprint."""
        if name not in SPLITS:
            raise ValueError(f"split={name!r} must be one of {', '.join(SPLITS)}")
        part = self.table.filter(pc.equal(self.table["split"], name)).combine_chunks()
        return Manifest(part, self.shards_url, table_fingerprint(part))

    def take(self, clip_ids: Iterable[int]) -> pa.Table:
        """The rows of these clips, in the order asked for; KeyError where there is no such clip."""
        wanted = np.fromiter(clip_ids, np.int64)
        rows = np.searchsorted(self.clip_ids, wanted)
        known = rows < len(self)
        known[known] = self.clip_ids[rows[known]] == wanted[known]
        if not known.all():
            raise KeyError(f"no clip {wanted[~known][0]} in manifest {self.fingerprint}")
        return self.table.take(rows)

    def shard_url(self, shard: str) -> str:
        """Where a shard lies."""
        return join_url(self.shards_url, shard)


def make_manifest(table: pa.Table, shards_url: str) -> Manifest:
    """Check the rows, sort them and take their fingerprint.

    Columns beyond SCHEMA are scores: numbers, null where a clip has none. ValueError names the
    column or the clips at fault; two clips of one id are refused: all randomness hangs on the id.
    """
    table = _conform(table)
    table = table.take(pc.sort_indices(table["clip_id"])).combine_chunks()
    ids = table["clip_id"].to_numpy()
    if (twins := np.flatnonzero(ids[1:] == ids[:-1])).size:
        first, second = table.slice(twins[0], 2).select(["shard", "key"]).to_pylist()
        raise ValueError(
            f"clip_id {ids[twins[0]]} belongs to both {first} and {second}; rename one key"
        )
    url = normalize_url(shards_url)
    return Manifest(table.replace_schema_metadata(None), url, table_fingerprint(table))


def write_manifest(
    store: Store, manifest: Manifest, failures: Mapping[str, int] | None = None
) -> None:
    """Write a snapshot, then commit it through `manifest.json`.

    failures: clips that were left out, by cause; kept for the reader's information.
    """
    name = _snapshot_name(manifest.fingerprint)
    sink = pa.BufferOutputStream()
    table = manifest.table.replace_schema_metadata({_SHARDS_URL: manifest.shards_url})
    pq.write_table(table, sink, compression="zstd")
    store.write(name, sink.getvalue())
    counts = {"clips": len(manifest)}
    for split in SPLITS:
        counts[split] = pc.sum(pc.equal(manifest.table["split"], split)).as_py() or 0
    commit = {
        "version": _VERSION,
        "fingerprint": manifest.fingerprint,
        "clips": name,
        "shards_url": manifest.shards_url,
        "counts": counts,
        "failures": dict(sorted((failures or {}).items())),
    }
    store.write("manifest.json", (json.dumps(commit, indent=2) + "\n").encode())


def read_manifest(url: str | Store, fingerprint: str | None = None) -> Manifest:
    """Read the committed snapshot at `url`, or the older one that `fingerprint` pins.

    ValueError where there is none, or where it is not what its fingerprint says.
    """
    store = url if isinstance(url, Store) else Store(url)
    if fingerprint is None:
        fingerprint = _committed_fingerprint(store)
    name = _snapshot_name(fingerprint)
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise ValueError(f"{store.url} has no manifest {fingerprint}; index the shards") from None
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{join_url(store.url, name)} is not readable: {error}") from error
    shards_url = (table.schema.metadata or {}).get(_SHARDS_URL)
    if shards_url is None:
        raise ValueError(f"{join_url(store.url, name)} does not say where its shards are")
    manifest = make_manifest(table, shards_url.decode())
    if manifest.fingerprint != fingerprint:
        raise ValueError(
            f"{join_url(store.url, name)} holds other rows (fingerprint {manifest.fingerprint}) "
            "than were committed; index the shards anew"
        )
    return manifest


def table_fingerprint(table: pa.Table) -> str:
    """Hash of names and values in order; the same for any chunking of the same rows."""
    total = hashlib.blake2b(f"manifest {_VERSION}".encode(), digest_size=16)
    for name, column in zip(table.column_names, table.columns, strict=True):
        total.update(f"{len(name)} {name} {len(column)}".encode())
        total.update(_column_digest(column))
    return total.hexdigest()


def _snapshot_name(fingerprint: str) -> str:
    return f"clips-{fingerprint}.parquet"


def _committed_fingerprint(store: Store) -> str:
    where = join_url(store.url, "manifest.json")
    try:
        commit = json.loads(store.read("manifest.json"))
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist: no manifest; index the shards") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}; index the shards anew") from error
    if not isinstance(commit, dict) or commit.get("version") != _VERSION:
        raise ValueError(f"{where} is not of version {_VERSION}; index the shards anew")
    return str(commit["fingerprint"])


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
        # One way to say "no score": not-a-number is made null.
        columns[name] = pc.if_else(pc.is_nan(score), None, score)
    table = pa.table(columns)
    lows = {"clip_id": 0, "offset": 0, "size_bytes": 1, "num_frames": 1, "height": 1, "width": 1}
    for column, low in lows.items():
        _demand(table, pc.greater_equal(table[column], low), f"{column} must be at least {low}")
    _demand(
        table,
        pc.and_(pc.greater(table["fps"], 0), pc.is_finite(table["fps"])),
        "fps must be above 0 and finite",
    )
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
        raise ValueError(f"column {name}: {column.type} is not {kind}: {error}") from error


def _demand(table: pa.Table, holds: pa.ChunkedArray, rule: str) -> None:
    if not pc.all(holds, min_count=0).as_py():
        row = table.filter(pc.invert(holds)).slice(0, 1).select(["shard", "key"]).to_pylist()[0]
        raise ValueError(f"clip {row['key']!r} of shard {row['shard']!r}: {rule}")


def _column_digest(column: pa.ChunkedArray) -> bytes:
    """Digest of the values; chunk by chunk, since one array holds at most 2 GiB of text."""
    valid, lengths, values = (hashlib.blake2b(digest_size=16) for _ in range(3))
    inner = []
    for chunk in column.chunks:
        valid.update(chunk.is_valid().to_numpy(zero_copy_only=False).tobytes())
        if pa.types.is_list(chunk.type):
            lengths.update(_little(pc.list_value_length(chunk), "i8"))
            inner.append(chunk.flatten())
        elif pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
            lengths.update(_little(pc.binary_length(chunk), "i8"))
            large = chunk.cast(pa.large_string())  # the same text, with 64-bit offsets
            offsets = np.frombuffer(large.buffers()[1], np.int64)[large.offset :][: len(large) + 1]
            if len(large):  # an empty array may lack the buffer of its text
                values.update(memoryview(large.buffers()[2])[offsets[0] : offsets[-1]])
        else:
            kind = "f8" if pa.types.is_floating(chunk.type) else "i8"
            values.update(_little(chunk.fill_null(0), kind))
    digest = valid.digest() + lengths.digest() + values.digest()
    if pa.types.is_list(column.type):
        digest += _column_digest(pa.chunked_array(inner, column.type.value_type))
    return digest


def _little(array: pa.Array, kind: str) -> bytes:
    return array.to_numpy(zero_copy_only=False).astype(f"<{kind}").tobytes()
