"""Shards to a manifest: a Ray job with one task for each shard.

A sample is one video or still, with an optional JSON and an optional text file of the same key:

    JSON  caption | captions   a text, or a list of texts
          source               the collection it belongs to; `IndexConfig.source` where absent
          video                the source video, whose clips share a split; else the clip itself
          fps                  overrides a video's own rate, which is often nominal
          any other number     becomes a score column
    txt   one more caption

What cannot be used is left out by name, with the cause, in `quarantine.json` beside the manifest.
Invariant: the manifest is a function of the shards and of IndexConfig; neither the order in which
tasks end nor the number of machines shows in it.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import NativeFile

from framework.data.manifest import (
    SCHEMA,
    Manifest,
    assign_split,
    checksum,
    clip_id,
    make_manifest,
    write_manifest,
)
from framework.data.shards import (
    EXTENSIONS,
    Member,
    ShardProblem,
    group_samples,
    read_members,
)
from framework.storage import Store, join_url, normalize_url, with_retries
from framework.video import VideoError, probe

# Tasks handed to Ray at once: enough for any cluster that reads, few enough for a quick `ray.wait`.
MAX_IN_FLIGHT = 512
# Two members this near are read in one request. Chosen by hand: some headers and a caption.
MAX_GAP_BYTES = 64 << 10
# More score columns than this are a mistake, such as a table of contents for each clip.
MAX_SCORES = 64
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAX_FPS = 1000  # high-speed footage is slowed down before it is published


@dataclass(frozen=True)
class IndexConfig:
    """What the index decides by itself."""

    heldout_fraction: float = 0.05  # of the source videos
    source: str = "default"  # for clips whose JSON names none

    def __post_init__(self) -> None:
        assign_split([], self.heldout_fraction)
        if not self.source:
            raise ValueError('source="" must be a name; try "default"')


@dataclass(frozen=True)
class ShardIndex:
    """What one shard holds."""

    table: pa.Table  # SCHEMA and this shard's score columns, in the shard's order
    problems: tuple[ShardProblem, ...]
    num_ignored: int  # members of a kind that is of no use here


@dataclass(frozen=True)
class IndexReport:
    """What an index run found; `str()` is one screen."""

    manifest_url: str
    fingerprint: str
    num_shards: int
    num_clips: int
    num_train: int
    num_heldout: int
    num_stills: int
    num_uncaptioned: int
    num_ignored: int
    duration_s: float  # of all videos together
    resolutions: dict[str, int]  # "640x360" (width x height) -> clips, most frequent first
    sources: dict[str, int]
    problems: tuple[ShardProblem, ...]

    @property
    def failures(self) -> dict[str, int]:
        """How many things were left out, by cause, most frequent first."""
        return _ranked(problem.cause for problem in self.problems)

    def __str__(self) -> str:
        lines = [
            f"{self.num_clips} clips of {self.num_shards} shards, {_duration(self.duration_s)}: "
            f"{self.num_train} train, {self.num_heldout} held out",
            f"  stills           {self.num_stills}",
            f"  without caption  {self.num_uncaptioned}",
            f"  resolutions      {_first(self.resolutions)}",
            f"  sources          {_first(self.sources)}",
        ]
        if self.num_ignored:
            lines.append(f"  ignored files    {self.num_ignored} (not {', '.join(EXTENSIONS)})")
        for cause, count in self.failures.items():
            lines.append(f"  left out         {count} x {cause}")
            some = [problem for problem in self.problems if problem.cause == cause][:3]
            for problem in some:
                lines.append(f"    {problem.shard} {problem.name!r} {problem.reason}"[:120])
        if self.problems:
            lines.append(f"  all of them in   {join_url(self.manifest_url, 'quarantine.json')}")
        if not self.num_heldout:
            lines.append("  note: nothing is held out; raise heldout_fraction to evaluate")
        lines.append(f"  manifest         {self.manifest_url} {self.fingerprint}")
        return "\n".join(lines)


def index(
    shards_url: str,
    manifest_url: str,
    config: IndexConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IndexReport:
    """Index all `*.tar` below `shards_url` and write the manifest to folder `manifest_url`.

    Runs on the Ray that is initialised, or starts one. `on_progress(done, total)` is called after
    each shard. ValueError where there is no shard or no clip. A shard that the store does not give
    ends the job with a RuntimeError: a manifest without it would be worse than none.
    """
    config, shards = config or IndexConfig(), find_shards(shards_url)
    url = normalize_url(shards_url)
    return write_index(url, manifest_url, _index_on_ray(url, shards, config, on_progress))


def find_shards(shards_url: str) -> list[str]:
    """The names of all `*.tar` below a URL; ValueError where there is none."""
    store = Store(shards_url)
    names = store.list()
    if packed := [name for name in names if name.endswith(COMPRESSED)]:
        raise ValueError(
            f"shards_url={store.url!r} has compressed shards ({packed[0]}, …), which have no byte "
            "offsets; unpack them to .tar"
        )
    shards = [name for name in names if name.endswith(".tar")]
    if not shards:
        raise ValueError(f"shards_url={store.url!r} has no file that ends in .tar; check the URL")
    return shards


def write_index(shards_url: str, manifest_url: str, found: dict[str, ShardIndex]) -> IndexReport:
    """Join what the shards hold, write manifest and quarantine, and report."""
    parts = [found[name] for name in sorted(found)]
    problems = [problem for part in parts for problem in part.problems]
    table, dropped = _join([part.table for part in parts])
    if dropped:
        reason = f"only {MAX_SCORES} numbers are kept; left out: {', '.join(dropped)}"
        problems.append(ShardProblem("", 0, "too many scores", reason=reason[:1000]))
    problems.sort()
    if not table.num_rows:
        first = f", first: {problems[0]}" if problems else ""
        raise ValueError(f"shards_url={shards_url!r}: {len(parts)} shards hold no clip{first}")
    manifest = make_manifest(table, shards_url)
    store = Store(manifest_url)
    rows = [asdict(problem) for problem in problems]
    store.write("quarantine.json", json.dumps(rows, indent=1, ensure_ascii=False).encode())
    ignored = sum(part.num_ignored for part in parts)
    report = _report(manifest, store.url, len(parts), tuple(problems), ignored)
    write_manifest(store, manifest, report.failures)
    return report


def index_shard(shards_url: str, shard: str, config: IndexConfig) -> ShardIndex:
    """The rows of one shard. Reads every payload once, for its checksum and its frames."""
    store = Store(shards_url)
    members, problems = read_members(store, shard)
    samples, more, num_ignored = group_samples(shard, members)
    problems += more
    rows = []
    with store.open_input(shard) as file:
        for key, parts in samples.items():
            row = _index_sample(shard, key, _read(file, parts), parts, config)
            if isinstance(row, ShardProblem):
                problems.append(row)
            else:
                rows.append(row)
    return ShardIndex(_table(rows, config), tuple(problems), num_ignored)


def _index_on_ray(
    shards_url: str,
    shards: list[str],
    config: IndexConfig,
    on_progress: Callable[[int, int], None],
) -> dict[str, ShardIndex]:
    if not ray.is_initialized():
        ray.init()
    # A video that kills the decoder takes its worker along; Ray then tries the shard again.
    task = ray.remote(num_cpus=1)(index_shard)
    waiting = list(reversed(shards))
    running: dict[ray.ObjectRef, str] = {}
    found: dict[str, ShardIndex] = {}
    while waiting or running:
        while waiting and len(running) < MAX_IN_FLIGHT:
            shard = waiting.pop()
            running[task.options(name=f"index {shard}").remote(shards_url, shard, config)] = shard
        for ref in ray.wait(list(running))[0]:
            shard = running.pop(ref)
            try:
                found[shard] = ray.get(ref)
            except ray.exceptions.RayError as error:
                for other in running:
                    ray.cancel(other)
                raise RuntimeError(f"{join_url(shards_url, shard)}: {error}") from error
            on_progress(len(found), len(shards))
    return found


def _read(file: NativeFile, parts: dict[str, Member]) -> dict[str, bytes]:
    """The payloads of one sample; in one request where they lie side by side."""
    runs: list[list[Member]] = []
    for member in sorted(parts.values(), key=lambda member: member.offset):
        if runs and member.offset - _end(runs[-1]) <= MAX_GAP_BYTES:
            runs[-1].append(member)
        else:
            runs.append([member])
    payloads: dict[Member, bytes] = {}
    for run in runs:
        start, size_bytes = run[0].offset, _end(run) - run[0].offset
        block = with_retries(partial(file.read_at, size_bytes, start))
        for member in run:
            payloads[member] = block[member.offset - start :][: member.size_bytes]
    return {slot: payloads[member] for slot, member in parts.items()}


def _end(run: list[Member]) -> int:
    return max(member.offset + member.size_bytes for member in run)


def _index_sample(
    shard: str, key: str, data: dict[str, bytes], parts: dict[str, Member], config: IndexConfig
) -> dict[str, Any] | ShardProblem:
    """One row, with the scores in a dict of their own under "scores"."""
    clip = parts["clip"]
    try:
        meta, captions = _read_text(data)
    except (ValueError, RecursionError) as error:  # a JSON nested too deep
        return ShardProblem(shard, clip.offset, "unreadable metadata", key, str(error)[:500])
    try:
        info = probe(data["clip"])
    except VideoError as error:
        return ShardProblem(shard, clip.offset, "unreadable video", key, str(error)[:500])
    video = meta.get("video")
    row = {
        "clip_id": clip_id(shard, key),
        "key": key,
        "shard": shard,
        "member": clip.name,
        "offset": clip.offset,
        "size_bytes": clip.size_bytes,
        "checksum": checksum(data["clip"]),
        "num_frames": info.num_frames,
        "fps": (meta.get("fps") if info.num_frames > 1 else None) or info.fps,
        "height": info.height,
        "width": info.width,
        "captions": captions or [""],
        "source": meta.get("source") or config.source,
        "video": str(video) if video not in (None, "") else f"{shard}/{key}",
    }
    used = {*SCHEMA.names, "caption"}
    scores = {name: _number(value) for name, value in meta.items() if name not in used}
    row["scores"] = {name: value for name, value in scores.items() if value is not None}
    return row


def _read_text(data: dict[str, bytes]) -> tuple[dict[str, Any], list[str]]:
    """The JSON's mapping and all captions, each once; ValueError where either is malformed."""
    meta = json.loads(data["json"].decode("utf-8-sig")) if "json" in data else {}
    if not isinstance(meta, dict):
        raise ValueError(f"the JSON is a {type(meta).__name__}, not a mapping")
    json.dumps(meta, ensure_ascii=False).encode()  # UnicodeEncodeError: half of a surrogate pair
    if not isinstance(source := meta.get("source"), str | None):
        raise ValueError(f"source={source!r} is not a text")
    if not isinstance(video := meta.get("video"), str | int | None):
        raise ValueError(f"video={video!r} is neither a text nor a number")
    if (fps := meta.get("fps")) and not 0 < (_number(fps) or 0) <= MAX_FPS:
        raise ValueError(f"fps={fps!r} is not a number up to {MAX_FPS}")
    captions: list[Any] = []
    for value in (meta.get("caption"), meta.get("captions")):
        captions += value if isinstance(value, list) else [value]
    if "txt" in data:
        captions.append(data["txt"].decode("utf-8-sig"))
    if wrong := [caption for caption in captions if not isinstance(caption, str | None)]:
        raise ValueError(f"caption={wrong[0]!r} is not a text")
    stripped = (caption.strip() for caption in captions if caption)
    return meta, list(dict.fromkeys(caption for caption in stripped if caption))


def _number(value: Any) -> float | None:
    """A finite number, or None; a bool is not a number here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an int with hundreds of digits
        return None


def _table(rows: list[dict[str, Any]], config: IndexConfig) -> pa.Table:
    columns: dict[str, Any] = {
        name: [row[name] for row in rows] for name in SCHEMA.names if name != "split"
    }
    columns["split"] = assign_split(columns["video"], config.heldout_fraction)
    table = pa.table(columns, SCHEMA)
    for name in sorted({name for row in rows for name in row["scores"]}):
        scores = pa.array([row["scores"].get(name) for row in rows], pa.float64())
        table = table.append_column(name, scores)
    return table


def _join(tables: list[pa.Table]) -> tuple[pa.Table, list[str]]:
    """All rows, with the scores that most clips have; and the names of the other scores."""
    counts: Counter[str] = Counter()
    for table in tables:
        for name in table.column_names[len(SCHEMA) :]:
            counts[name] += table.num_rows - table[name].null_count
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    keep = {*SCHEMA.names, *ranked[:MAX_SCORES]}
    tables = [table.select([n for n in table.column_names if n in keep]) for table in tables]
    return pa.concat_tables(tables, promote_options="default"), ranked[MAX_SCORES:]


def _report(
    manifest: Manifest,
    manifest_url: str,
    num_shards: int,
    problems: tuple[ShardProblem, ...],
    num_ignored: int,
) -> IndexReport:
    table = manifest.table
    num_frames = table["num_frames"].to_numpy()
    is_video = num_frames > 1
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    first = pc.list_element(table["captions"], 0)
    num_train = pc.sum(pc.equal(table["split"], "train")).as_py()
    return IndexReport(
        manifest_url=normalize_url(manifest_url),
        fingerprint=manifest.fingerprint,
        num_shards=num_shards,
        num_clips=len(manifest),
        num_train=num_train,
        num_heldout=len(manifest) - num_train,
        num_stills=int((~is_video).sum()),
        num_uncaptioned=pc.sum(pc.equal(first, "")).as_py(),
        num_ignored=num_ignored,
        duration_s=float((num_frames / table["fps"].to_numpy())[is_video].sum()),
        resolutions=_ranked(f"{width}x{height}" for width, height in sizes),
        sources=_ranked(table["source"].to_pylist()),
        problems=problems,
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _ranked(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def _first(counts: dict[str, int], limit: int = 6) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:limit]]
    return ", ".join(shown) + (f", … {len(counts) - limit} more" if len(counts) > limit else "")


if __name__ == "__main__":
    from framework.cluster import connect
    from framework.config import RunConfig, entry

    def main(config: RunConfig) -> None:
        """Index `data.shards` into `data.manifest`."""
        # This module runs under the name __main__; Ray's workers want it under its own.
        from framework.data.index import IndexConfig, find_shards, index

        find_shards(config.data.shards)  # a mistake is answered before Ray starts
        connect(config.cluster)
        chosen = IndexConfig(heldout_fraction=config.data.heldout_fraction)
        print(index(config.data.shards, config.data.manifest, chosen))

    entry(main)
