"""The clip table: one row for every clip there is, and what else a plan needs to know of it.

A manifest is written once by `framework.data.index` and never edited; a run pins one snapshot by
its fingerprint. A table of a hundred million clips does not fit into memory, so it is kept in
parts, each a range of clip_ids; since ids are hashes, a part is a random sample of the clips:

    clips-<fingerprint>/part-00000.parquet   rows sorted by clip_id
    clips-<fingerprint>/snapshot.json        digests of the parts; written after them
    manifest.json                            names the snapshot that counts now; written last

Older snapshots stay readable by their fingerprint.

Invariant: rows are sorted by clip_id, which is unique; parts and fingerprint depend on the rows
alone, neither on where the shards lie nor on how Parquet or Arrow happen to store them.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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
# Clips in a part, at most, on the average: some 100 MB in memory, captions and all.
PART_ROWS = 1 << 18
_VERSION = 2  # of the format on disk and of the fingerprint


def clip_id(shard: str, key: str) -> int:
    """The id of a clip: 63 bits of hash64 of its shard's name and its key in the shard."""
    return hash64("clip", shard, key) >> 1


def read_clip_ids(url: str) -> frozenset[int]:
    """Clips listed in a text file, one a line: a clip_id, or the shard's name and the key.

    Empty lines and those that start with # do not count. ValueError names a line that is neither.
    """
    folder, _, name = normalize_url(url).rpartition("/")
    try:
        text = Store(folder).read(name).decode()
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"{url} is not a text file of clips: {error}") from error
    ids = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            continue
        match line.split(maxsplit=1):
            case []:
                continue
            case [only] if only.isdecimal():
                ids.add(int(only))
            case [shard, key]:
                ids.add(clip_id(shard, key.strip()))
            case _:
                raise ValueError(
                    f"{url}, line {number}: {line!r} is neither a clip_id nor a shard and a key"
                )
    return frozenset(ids)


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

    shards_url: str  # may be replaced where the shards have moved
    fingerprint: str  # of the rows: 32 hexadecimal digits
    first_shard: str  # the shard that comes first by name; "" where there is no clip
    scores: tuple[str, ...]  # names of the score columns
    sources: tuple[str, ...]  # names of all sources, sorted
    part_digests: tuple[str, ...]
    load: Callable[[int], pa.Table]  # the rows of a part; picklable

    @property
    def num_parts(self) -> int:
        """Parts, at least 1."""
        return len(self.part_digests)

    def part(self, index: int) -> pa.Table:
        """One part: SCHEMA, then score columns (float64) by name; sorted by clip_id."""
        return self.load(index)

    @cached_property
    def table(self) -> pa.Table:
        """All rows at once, sorted by clip_id."""
        return pa.concat_tables(self.part(i) for i in range(self.num_parts))

    def __len__(self) -> int:
        return self.table.num_rows


@dataclass(frozen=True)
class _InMemory:
    parts: tuple[pa.Table, ...]

    def __call__(self, index: int) -> pa.Table:
        return self.parts[index]


@dataclass(frozen=True)
class _InStore:
    store: Store
    fingerprint: str
    digests: tuple[str, ...]

    def __call__(self, index: int) -> pa.Table:
        name = _part_name(self.fingerprint, index)
        where = join_url(self.store.url, name)
        try:
            table = pq.read_table(pa.BufferReader(self.store.read(name)))
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise ValueError(f"{where} is not readable: {error}; index the shards anew") from error
        if table_digest(table) != self.digests[index]:
            raise ValueError(f"{where} holds other rows than were committed; index the shards anew")
        return table


def make_manifest(table: pa.Table, shards_url: str, part_rows: int = PART_ROWS) -> Manifest:
    """Check the rows, sort them, cut them into parts of about `part_rows`, take the fingerprint.

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
    table = table.replace_schema_metadata(None)
    bits = max(0, (len(ids) - 1) // part_rows).bit_length()  # 2^bits parts
    borders = np.searchsorted(ids >> (63 - bits), np.arange((1 << bits) + 1))
    parts = tuple(
        table.slice(start, stop - start)
        for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)
    )
    digests = tuple(table_digest(part) for part in parts)
    return Manifest(
        shards_url=normalize_url(shards_url),
        fingerprint=_fingerprint(digests),
        first_shard=pc.min(table["shard"]).as_py() or "",
        scores=tuple(table.column_names[len(SCHEMA) :]),
        sources=tuple(sorted(table["source"].unique().to_pylist())),
        part_digests=digests,
        load=_InMemory(parts),
    )


def write_manifest(
    store: Store, manifest: Manifest, failures: Mapping[str, int] | None = None
) -> None:
    """Write a snapshot, then commit it through `manifest.json`.

    failures: clips that were left out, by cause; kept for the reader's information.
    """
    counts = dict.fromkeys(("clips", *SPLITS), 0)
    for index in range(manifest.num_parts):
        table, sink = manifest.part(index), pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        store.write(_part_name(manifest.fingerprint, index), sink.getvalue())
        counts["clips"] += table.num_rows
        for split in SPLITS:
            counts[split] += pc.sum(pc.equal(table["split"], split)).as_py() or 0
    snapshot = {
        "shards_url": manifest.shards_url,
        "first_shard": manifest.first_shard,
        "scores": manifest.scores,
        "sources": manifest.sources,
        "parts": manifest.part_digests,
    }
    store.write(_snapshot_name(manifest.fingerprint), _to_json(snapshot))
    commit = {
        "version": _VERSION,
        "fingerprint": manifest.fingerprint,
        "shards_url": manifest.shards_url,
        "counts": counts,
        "failures": dict(sorted((failures or {}).items())),
    }
    store.write("manifest.json", _to_json(commit))


def read_manifest(url: str | Store, fingerprint: str | None = None) -> Manifest:
    """Open the committed snapshot at `url`, or the older one that `fingerprint` pins.

    Rows are read part by part when they are asked for. ValueError where there is no such snapshot,
    and later where a part is not what the fingerprint says.
    """
    store = url if isinstance(url, Store) else Store(url)
    if fingerprint is None:
        fingerprint = _committed_fingerprint(store)
    where = join_url(store.url, _snapshot_name(fingerprint))
    try:
        snapshot = json.loads(store.read(_snapshot_name(fingerprint)))
        digests = tuple(snapshot["parts"])
    except FileNotFoundError:
        raise ValueError(f"{store.url} has no manifest {fingerprint}; index the shards") from None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{where} is not readable: {error}; index the shards anew") from error
    if _fingerprint(digests) != fingerprint:
        raise ValueError(f"{where} is of another manifest; index the shards anew")
    if not isinstance(snapshot.get("shards_url"), str):
        raise ValueError(f"{where} does not say where its shards are; index the shards anew")
    return Manifest(
        shards_url=snapshot["shards_url"],
        fingerprint=fingerprint,
        first_shard=snapshot["first_shard"],
        scores=tuple(snapshot["scores"]),
        sources=tuple(snapshot["sources"]),
        part_digests=digests,
        load=_InStore(store, fingerprint, digests),
    )


def table_digest(table: pa.Table) -> str:
    """Hash of names and values in order; the same for any chunking of the same rows."""
    total = hashlib.blake2b(f"manifest {_VERSION}".encode(), digest_size=16)
    for name, column in zip(table.column_names, table.columns, strict=True):
        total.update(f"{len(name)} {name} {len(column)}".encode())
        total.update(_column_digest(column))
    return total.hexdigest()


def _fingerprint(part_digests: Sequence[str]) -> str:
    return hashlib.blake2b(" ".join(part_digests).encode(), digest_size=16).hexdigest()


def _snapshot_name(fingerprint: str) -> str:
    return f"clips-{fingerprint}/snapshot.json"


def _part_name(fingerprint: str, index: int) -> str:
    return f"clips-{fingerprint}/part-{index:05d}.parquet"


def _to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


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
