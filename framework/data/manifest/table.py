"""The clip table: one row for every clip there is, and what else a plan needs to know of it.

A manifest is written once by `framework.data.index` and never edited; a run pins one snapshot by
its fingerprint. A table of a hundred million clips does not fit into memory, so it is kept in
parts, each a range of clip_ids; since ids are hashes, a part is a random sample of the clips:

    parts/<digest>.parquet         rows sorted by clip_id
    snapshots/<fingerprint>.json   digests of the parts; written after them
    manifest.json                  names the snapshot that counts now; written last

Older snapshots stay readable by their fingerprint.

Invariant: rows are sorted by clip_id, which is unique; parts and fingerprint depend on the rows
alone, neither on where the shards lie nor on how Parquet or Arrow happen to store them.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framework.data.parquet import read_table
from framework.printable import printable
from framework.seeding import hash64
from framework.storage import COMMAND, RetryPolicy, Store, join_url, normalize_url

SCHEMA = pa.schema(
    [
        ("clip_id", pa.int64()),  # `clip_id(shard, key)`: stable, >= 0
        ("key", pa.string()),
        ("shard", pa.string()),  # relative to the manifest's shards_url, or an absolute URL
        ("member", pa.string()),  # file name in the tar
        ("offset", pa.int64()),  # bytes from the start of the shard to the payload
        ("size_bytes", pa.int64()),
        ("checksum", pa.int64()),  # `checksum` of the payload's first bytes,
        ("checked_bytes", pa.int64()),  # of so many
        ("first_frame", pa.int32()),  # of the video; above 0 where a long one is cut into clips
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
# What a number may be once it has its column's type, both ends included. The ends are chosen by
# hand: a frame in a quarter of an hour; high-speed footage, which is slowed down before it is
# published; a week of film; the longest side of a JPEG.
_INT64 = 2**63 - 1
LIMITS: Mapping[str, tuple[float, float]] = {
    "clip_id": (0, _INT64),
    "offset": (0, _INT64),
    "size_bytes": (1, _INT64),
    "checked_bytes": (0, _INT64),
    "first_frame": (0, 1 << 24),
    "num_frames": (1, 1 << 24),
    "fps": (0.001, 1000),
    "height": (1, 65535),
    "width": (1, 65535),
}
SPLITS = ("train", "heldout")
VERSION = 3  # of the format on disk and of the fingerprint


def clip_id(shard: str, key: str, number: int | None = None) -> int:
    """The id of a clip: 63 bits of hash64 of its shard's name and its key in the shard.

    `number` counts the clips that one video is cut into.
    """
    return hash64("clip", shard, key, *([] if number is None else [number])) >> 1


def read_clip_ids(url: str, retry: RetryPolicy = COMMAND) -> frozenset[int]:
    """Clips listed in a text file, one a line: a clip_id, or the shard's name and the key.

    Empty lines and those that start with # do not count. ValueError names a line that is neither.
    """
    folder, _, name = normalize_url(url).rpartition("/")
    try:
        text = Store(folder, retry).read(name).decode()
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
                    f"{url}, line {number}: '{printable(line)}' is neither a clip_id nor a "
                    "shard and a key"
                )
    return frozenset(ids)


def checksum(payload: bytes | memoryview) -> int:
    """CRC-32 of bytes: noise inside an MP4 decodes without an error, so we must look."""
    return zlib.crc32(payload)


def is_within(column: str, value: Any) -> bool:
    """Whether a value, cast to the type of a column of LIMITS, is within these."""
    low, high = LIMITS[column]
    try:
        return bool(low <= pa.scalar(value, SCHEMA.field(column).type).as_py() <= high)
    except (pa.ArrowException, OverflowError):  # the type does not hold it
        return False


def limits_of(column: str) -> str:
    """The limits of a column, for people."""
    low, high = LIMITS[column]
    return f"at least {low}" if high == _INT64 else f"from {low} to {high}"


def assign_split(video_ids: Iterable[str], heldout_fraction: float) -> list[str]:
    """The split of each clip, from a hash of its source video: it stays when data grows."""
    limit = int(heldout_fraction * 2**64)
    return [SPLITS[hash64("heldout", video) < limit] for video in video_ids]


@dataclass(frozen=True)
class Manifest:
    """A snapshot of the clip table; see `read_manifest`, and `writer` for making one."""

    shards_url: str  # may be replaced where the shards have moved
    fingerprint: str  # of the rows: 32 hexadecimal digits
    first_shard: str  # the shard that comes first by name; "" where there is no clip
    scores: tuple[str, ...]  # names of the score columns
    sources: tuple[str, ...]  # names of all sources, sorted
    part_digests: tuple[str, ...]
    load: Callable[[int], pa.Table]  # the rows of a part; picklable
    # What the latents in the shards were made with; empty where the shards hold videos.
    encoding: Mapping[str, Any] = field(default_factory=dict)

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
class InStore:
    """Loads the parts of a snapshot from its store.

    ValueError where one is not what it was, or names a shard that `shards` does not reach.
    """

    store: Store
    digests: tuple[str, ...]
    shards: Store | None = None  # None where we have written the names ourselves

    def __call__(self, index: int) -> pa.Table:
        """The rows of a part."""
        name = part_name(self.digests[index])
        where = join_url(self.store.url, name)
        try:
            table = read_table(self.store, name)
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            why = printable(error, 500)
            raise ValueError(f"{where} is not readable: {why}; index the shards anew") from error
        if table_digest(table) != self.digests[index]:
            raise ValueError(f"{where} holds other rows than were committed; index the shards anew")
        if self.shards is not None:
            _check_names(table["shard"], self.shards, where)
        return table


def read_manifest(
    url: str | Store,
    fingerprint: str | None = None,
    *,
    shards: str | None = None,
    anywhere: bool = False,
) -> Manifest:
    """Open the committed snapshot at `url`, or the older one that `fingerprint` pins.

    Rows are read part by part when they are asked for. ValueError where there is no such snapshot,
    where it names files that it may not, and later where a part does or is not what the
    fingerprint says.

    shards: the folder of shards that the user named. The manifest's must then be that one, or lie
    below it or below the manifest itself. anywhere: whether shards may lie elsewhere, and rows name
    files outside them; of a manifest in object storage never on this machine.
    """
    store = url if isinstance(url, Store) else Store(url)
    if fingerprint is None:
        fingerprint = _committed_fingerprint(store)
    where = join_url(store.url, snapshot_name(fingerprint))
    try:
        snapshot = json.loads(store.read(snapshot_name(fingerprint)))
        first_shard, encoding = snapshot["first_shard"], snapshot["encoding"]
        digests, scores, sources = (tuple(snapshot[key]) for key in ("parts", "scores", "sources"))
        if not all(isinstance(text, str) for text in (*digests, *scores, *sources, first_shard)):
            raise TypeError("a name is no text")
        if not digests or not isinstance(encoding, dict):
            raise TypeError("it has no parts, or no mapping for its encoding")
    except FileNotFoundError:
        raise ValueError(f"{store.url} has no manifest {fingerprint}; index the shards") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{where} is not readable: {_words(error)}; index the shards anew"
        ) from error
    if fingerprint_of(digests) != fingerprint:
        raise ValueError(f"{where} is of another manifest; index the shards anew")
    if not isinstance(snapshot.get("shards_url"), str):
        raise ValueError(f"{where} does not say where its shards are; index the shards anew")
    there = Store(snapshot["shards_url"], store.retry, anywhere)
    _check_place(there, store, shards)
    if there.is_local and not store.is_local:
        there = Store(there.url, store.retry)
    _check_names(pa.chunked_array([[first_shard]]), there, where)
    return Manifest(
        shards_url=there.url,
        fingerprint=fingerprint,
        first_shard=first_shard,
        scores=scores,
        sources=sources,
        part_digests=digests,
        load=InStore(store, digests, there),
        encoding=encoding,
    )


def table_digest(table: pa.Table) -> str:
    """Hash of names and values in order; the same for any chunking of the same rows."""
    total = hashlib.blake2b(f"manifest {VERSION}".encode(), digest_size=16)
    for name, column in zip(table.column_names, table.columns, strict=True):
        total.update(f"{len(name)} {name} {len(column)}".encode())
        total.update(_column_digest(column))
    return total.hexdigest()


def fingerprint_of(part_digests: Sequence[str]) -> str:
    """Of the rows of all parts."""
    return hashlib.blake2b(" ".join(part_digests).encode(), digest_size=16).hexdigest()


def snapshot_name(fingerprint: str) -> str:
    """Where a snapshot lies in a manifest's store."""
    return f"snapshots/{fingerprint}.json"


def part_name(digest: str) -> str:
    """Where a part lies in a manifest's store."""
    return f"parts/{digest}.parquet"


def _check_place(there: Store, manifest: Store, named: str | None) -> None:
    """ValueError where a manifest may not have its shards in the folder `there`."""
    if (named is not None and _is_below(there, Store(named))) or _is_below(there, manifest):
        return
    words = f"the manifest {manifest.url} has its shards in {there.url}"
    if there.is_local and not manifest.is_local:
        raise ValueError(f"{words}, on this machine; name that folder by data.shards to allow it")
    if named is not None and not there.anywhere:
        raise ValueError(
            f"{words}, neither below data.shards ({named}) nor below itself; name that folder by "
            "data.shards, or allow any by data.index.anywhere=true"
        )


def _is_below(here: Store, folder: Store) -> bool:
    """Whether it is `folder` or lies in it; on this machine as symbolic links lead."""
    if here.is_local and folder.is_local:
        return here.local_path().resolve().is_relative_to(folder.local_path().resolve())
    return f"{here.url}/".startswith(f"{folder.url}/") and ".." not in here.url.split("/")


def _check_names(column: pa.ChunkedArray, shards: Store, where: str) -> None:
    """ValueError where one of these names of shards leads where `shards` does not follow."""
    is_odd = pc.or_(pc.match_substring(column, "://"), pc.match_substring(column, ".."))
    try:
        for name in column.filter(is_odd).unique().to_pylist():
            shards.at(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _committed_fingerprint(store: Store) -> str:
    where = join_url(store.url, "manifest.json")
    try:
        commit = json.loads(store.read("manifest.json"))
    except FileNotFoundError:
        raise ValueError(
            f"{where} does not exist: no manifest; index the shards, or name the manifest of "
            "another run by data.manifest=URL"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}; index the shards anew") from error
    if not isinstance(commit, dict) or commit.get("version") != VERSION:
        raise ValueError(f"{where} is not of version {VERSION}; index the shards anew")
    if not isinstance(fingerprint := commit.get("fingerprint"), str):
        raise ValueError(f"{where} has no fingerprint; index the shards anew")
    return fingerprint


def _words(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


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
