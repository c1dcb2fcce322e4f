"""What one shard holds, or some lines of a table of loose files: a row for each clip.

A sample is one video or still, with an optional JSON and an optional text file of the same key:

    JSON  caption | captions   a text, or a list of texts
          source               the collection it belongs to; `IndexConfig.source` where absent
          video                the source video, whose clips share a split; else the clip itself
          fps                  overrides a video's own rate, which is often nominal; one that is
                               no sensible rate is reported, and the video keeps its own
          any other number     becomes a score column
    txt   one more caption

The columns of a table stand for the JSON. Of a clip its first bytes are read and, of an MP4 or MOV,
the header at its end; all of it where it is small, where its container counts no frames, or where
`IndexConfig.checksum` asks for that.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from framework.data.config import IndexConfig
from framework.data.manifest.table import (
    LIMITS,
    SCHEMA,
    checksum,
    clip_id,
    is_within,
    limits_of,
)
from framework.data.parquet import from_parquet, to_parquet
from framework.data.shards.fetch import fetch
from framework.data.shards.ranged_file import RangedFile
from framework.data.shards.tar import (
    MAX_CLIP_BYTES,
    TEXT_EXTENSIONS,
    Member,
    ShardProblem,
    group_samples,
    read_members,
    split_name,
)
from framework.storage import Store
from framework.video import VideoError, VideoInfo, probe

# What is read of every clip, and covered by its checksum. A request costs as much for less; and it
# holds the header of an MP4 made for streaming, and the first frame of most clips.
HEAD_BYTES = 512 << 10
BATCH_BYTES = 64 << 20  # fetched at once
PROBES = 8  # at once: most of the time they wait for a header at a clip's end
# Chosen by hand. A clip has some scores of its own; a list of hundreds belongs in a file.
MAX_NUMBERS = 256  # of a clip
MAX_SHARD_NUMBERS = 1024  # different ones of a shard's clips; each is a column
MAX_NAME_CHARS = 1000  # of a source, a source video or a number
FORMAT = 2  # of what is kept of a shard


@dataclass(frozen=True)
class ShardIndex:
    """What one shard holds."""

    table: pa.Table  # SCHEMA but for the split, and this shard's score columns, in its order
    problems: tuple[ShardProblem, ...] = ()
    num_ignored: int = 0  # members of a kind that is of no use here

    def to_parquet(self, made_of: str) -> pa.Buffer:
        """As a file; `made_of` says what it was made of."""
        facts = {
            "made_of": made_of,
            "problems": json.dumps([asdict(problem) for problem in self.problems]),
            "num_ignored": str(self.num_ignored),
        }
        return to_parquet([self.table.replace_schema_metadata(facts)])

    @classmethod
    def from_parquet(cls, data: pa.Buffer) -> "ShardIndex":
        """The reverse of `to_parquet`."""
        table = from_parquet(data)
        facts = table.schema.metadata
        problems = (ShardProblem(**problem) for problem in json.loads(facts[b"problems"]))
        table = table.replace_schema_metadata(None)
        return cls(table, tuple(problems), int(facts[b"num_ignored"]))


def made_of(data: pa.Buffer) -> str:
    """What a file of `ShardIndex.to_parquet` was made of."""
    return pq.read_schema(pa.BufferReader(data)).metadata[b"made_of"].decode()


def index_shard(shards_url: str, shard: str, config: IndexConfig) -> ShardIndex:
    """The rows of one tar. OSError where it cannot be read."""
    store = Store(shards_url)
    members, problems = read_members(store, shard)
    samples, more, num_ignored = group_samples(shard, members)
    wanted = [_Sample(shard, key, parts, {}) for key, parts in samples.items()]
    table, bad = _rows(store, wanted, config)
    return ShardIndex(table, (*problems, *more, *bad), num_ignored)


def index_files(root: str, files: pa.Table, config: IndexConfig) -> ShardIndex:
    """The rows of loose files: `path` says where each lies, from `root` or as a URL."""
    store = Store(root, anywhere=config.anywhere)
    with ThreadPoolExecutor(PROBES) as pool:
        found = list(pool.map(lambda row: _loose_sample(store, row), files.to_pylist()))
    table, bad = _rows(store, [one for one in found if isinstance(one, _Sample)], config)
    return ShardIndex(table, (*(one for one in found if isinstance(one, ShardProblem)), *bad))


class _Sample(NamedTuple):
    shard: str
    key: str
    parts: dict[str, Member]  # by slot: "clip", "json", "txt"
    meta: dict[str, Any]  # in place of a JSON


class _Span(NamedTuple):
    shard: str
    offset: int
    size_bytes: int


def _loose_sample(store: Store, row: dict[str, Any]) -> _Sample | ShardProblem:
    path = row.pop("path")
    key, ext = split_name(path)
    where, name = store.at(path)
    try:
        size = where.size(name)
    except FileNotFoundError:
        return ShardProblem(path, 0, "missing file", path, "there is no such file")
    if not ext or ext in TEXT_EXTENSIONS:
        return ShardProblem(path, 0, "no video", path, f"{name} is neither a video nor a still")
    if not size:
        return ShardProblem(path, 0, "empty file", path, "no bytes")
    if size > MAX_CLIP_BYTES:
        reason = f"{size} bytes, the limit is {MAX_CLIP_BYTES}"
        return ShardProblem(path, 0, "too large", path, reason)
    clip = Member(os.path.basename(path), key, ext, 0, size)
    return _Sample(path, path, {"clip": clip}, row)


def _rows(
    store: Store, samples: list[_Sample], config: IndexConfig
) -> tuple[pa.Table, list[ShardProblem]]:
    rows, problems = [], []
    with ThreadPoolExecutor(PROBES, "probe") as pool:
        for batch in _batches(samples, config):
            spans = [span for sample in batch for span in _spans(sample, config)]
            payloads = fetch(store, spans)
            heads = [[next(payloads) for _ in sample.parts] for sample in batch]
            jobs = zip(batch, heads, strict=True)
            for row in pool.map(lambda job: _row(store, job[0], job[1], config), jobs):
                if isinstance(row, ShardProblem):
                    problems.append(row)
                else:
                    problems += row.pop("problems")
                    rows.append(row)
    counts = Counter(name for row in rows for name in row["scores"])
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    if dropped := ranked[MAX_SHARD_NUMBERS:]:
        named = ", ".join(dropped[:20])
        reason = f"{len(ranked)} different numbers, {MAX_SHARD_NUMBERS} are kept; left out: {named}"
        problems.append(ShardProblem(samples[0].shard, 0, "too many scores", reason=reason[:1000]))
    return _table(rows, sorted(ranked[:MAX_SHARD_NUMBERS])), problems


def _batches(samples: list[_Sample], config: IndexConfig) -> Iterator[list[_Sample]]:
    """Neighbours that are fetched at once."""
    fetched = 0

    def batch_of(sample: _Sample) -> int:
        nonlocal fetched
        fetched += sum(span.size_bytes for span in _spans(sample, config))
        return fetched // BATCH_BYTES

    for _, batch in groupby(samples, batch_of):
        yield list(batch)


def _spans(sample: _Sample, config: IndexConfig) -> list[_Span]:
    """What is read of a sample at first, part by part."""
    return [
        _Span(
            sample.shard,
            part.offset,
            part.size_bytes
            if slot != "clip" or config.checksum
            else min(part.size_bytes, HEAD_BYTES),
        )
        for slot, part in sample.parts.items()
    ]


def _row(
    store: Store,
    sample: _Sample,
    heads: list[bytes | OSError | EOFError],
    config: IndexConfig,
) -> dict[str, Any] | ShardProblem:
    """One row; under "scores" a dict of them, under "problems" what could not be used of it."""
    shard, key, clip = sample.shard, sample.key, sample.parts["clip"]
    data: dict[str, bytes] = {}
    for slot, head in zip(sample.parts, heads, strict=True):
        if not isinstance(head, bytes):  # the shard has been replaced meanwhile
            return ShardProblem(shard, clip.offset, "missing bytes", key, str(head)[:500])
        data[slot] = head
    try:
        meta, captions = _read_text(sample.meta, data)
        fps, no_rate = _rate(meta)
        scores = _scores(meta)
    except (ValueError, RecursionError) as error:  # a JSON nested too deep
        return ShardProblem(shard, clip.offset, "unreadable metadata", key, str(error)[:500])
    try:
        info = _probe(store, shard, clip, data["clip"])
    except VideoError as error:
        return ShardProblem(shard, clip.offset, "unreadable video", key, str(error)[:500])
    video = meta.get("video")
    row: dict[str, Any] = {
        "clip_id": clip_id(shard, key),
        "key": key,
        "shard": shard,
        "member": clip.name,
        "offset": clip.offset,
        "size_bytes": clip.size_bytes,
        "checksum": checksum(data["clip"]),
        "checked_bytes": len(data["clip"]),
        "first_frame": 0,
        "num_frames": info.num_frames,
        "fps": fps if fps and info.num_frames > 1 else info.fps,
        "height": info.height,
        "width": info.width,
        "captions": captions or [""],
        "source": meta.get("source") or config.source,
        "video": str(video) if video not in (None, "") else f"{shard}/{key}",
    }
    for name in LIMITS:
        if not is_within(name, row[name]):
            reason = f"{name}={row[name]} must be {limits_of(name)}"
            return ShardProblem(shard, clip.offset, "unusable number", key, reason)
    row["problems"] = []
    if no_rate and info.num_frames > 1:
        reason = f"{no_rate}; the clip keeps its own rate, {info.fps:g}"
        row["problems"].append(ShardProblem(shard, clip.offset, "unusable fps", key, reason))
    row["scores"] = scores
    return row


def _probe(store: Store, shard: str, clip: Member, head: bytes) -> VideoInfo:
    """By range where `head` is not all; what is wrong is said of the whole."""
    if len(head) < clip.size_bytes:
        where, name = store.at(shard)

        def read_at(offset: int, size_bytes: int) -> bytes:
            return where.read_range(name, clip.offset + offset, size_bytes)

        try:
            return probe(RangedFile(read_at, clip.size_bytes, head))
        except VideoError:
            head = read_at(0, clip.size_bytes)
    return probe(head)


def _read_text(meta: Any, data: dict[str, bytes]) -> tuple[dict[str, Any], list[str]]:
    """The JSON's mapping and all captions, each once; ValueError where either is malformed."""
    if "json" in data:
        meta = json.loads(data["json"].decode("utf-8-sig"))
    if not isinstance(meta, dict):
        raise ValueError(f"the JSON is a {type(meta).__name__}, not a mapping")
    if "json" in data:  # UnicodeEncodeError: half of a surrogate pair
        json.dumps(meta, ensure_ascii=False).encode()
    if not isinstance(source := meta.get("source"), str | None):
        raise ValueError(f"source={source!r} is not a text")
    if not isinstance(video := meta.get("video"), str | int | None):
        raise ValueError(f"video={video!r} is neither a text nor a number")
    for name, value in (("source", source), ("video", video)):
        if isinstance(value, str) and len(value) > MAX_NAME_CHARS:
            raise ValueError(
                f"{name} has {len(value)} characters; give it {MAX_NAME_CHARS} at most"
            )
    captions: list[Any] = []
    for value in (meta.get("caption"), meta.get("captions")):
        captions += value if isinstance(value, list) else [value]
    if "txt" in data:
        captions.append(data["txt"].decode("utf-8-sig"))
    if wrong := [caption for caption in captions if not isinstance(caption, str | None)]:
        raise ValueError(f"caption={wrong[0]!r} is not a text")
    stripped = (caption.strip() for caption in captions if caption)
    return meta, list(dict.fromkeys(caption for caption in stripped if caption))


def _rate(meta: dict[str, Any]) -> tuple[float | None, str]:
    """The JSON's frames a second, or None; and what is wrong with them. Null and 0: not known."""
    if not (given := meta.get("fps")):
        return None, ""
    fps = _number(given)
    if fps is None or not is_within("fps", fps):
        return None, f"fps={given!r}"[:400] + f" is not a number {limits_of('fps')}"
    return fps, ""


def _scores(meta: dict[str, Any]) -> dict[str, float]:
    """All numbers that are no column of a manifest; ValueError where they are too many."""
    used = {*SCHEMA.names, "caption"}
    numbers = {name: _number(value) for name, value in meta.items() if name not in used}
    scores = {name: value for name, value in numbers.items() if value is not None}
    if len(scores) > MAX_NUMBERS:
        raise ValueError(
            f"{len(scores)} numbers, each of which is a score; keep {MAX_NUMBERS} at most, or put "
            "them into a list"
        )
    if (longest := max(map(len, scores), default=0)) > MAX_NAME_CHARS:
        raise ValueError(
            f"a number's name has {longest} characters; give it {MAX_NAME_CHARS} at most"
        )
    return scores


def _number(value: Any) -> float | None:
    """A finite number, or None; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int with hundreds of digits
        return None


def _table(rows: list[dict[str, Any]], scores: list[str]) -> pa.Table:
    schema = pa.schema([field for field in SCHEMA if field.name != "split"])
    columns = {name: [row[name] for row in rows] for name in schema.names}
    columns |= {name: [row["scores"].get(name) for row in rows] for name in scores}
    fields = [*schema, *(pa.field(name, pa.float64()) for name in scores)]
    return pa.table(columns, pa.schema(fields))
