"""Clips to latents and text embeddings, once and ahead: videos of a manifest -> shards of latents.

What is kept of a clip is its view in epoch 0: training sees the same crop of it in every epoch, and
decodes no video. A pool of Ray actors takes some clips at a time, in a folder that grows:

    encoding.json                  what the latents are made with; another encoding is refused
    null_text.safetensors          text tokens of the empty caption
    shards/<name>.tar              a webdataset of safetensors, see framework/data/encode/latents.py
    rows/<name>.parquet            what that shard holds, and which clips were tried; its commit
    quarantine.json                clips that could not be encoded, and why
    manifest.json, parts/, …       a manifest of the latents (framework/data/manifest/table.py)

Clips that were tried are not tried again, so that an encoding goes on where it was interrupted, and
one of a manifest that grew encodes the clips that are new. A clip keeps its id, its split, its
captions and its scores.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from framework.data.config import EncodeConfig
from framework.data.encode.latents import Encoders, dump_clip, dump_text
from framework.data.manifest.table import SCHEMA, Manifest, checksum
from framework.data.manifest.writer import cut_into_parts, save_manifest
from framework.data.parquet import read_table, to_parquet
from framework.data.plan.recipe import Recipe
from framework.data.plan.views import View, choose_views
from framework.data.shards.fetch import fetch
from framework.data.shards.tar import LATENTS_EXTENSION, ShardProblem, read_members, tar_bytes
from framework.data.stream.collate import decode_view
from framework.mapping import differences
from framework.seeding import hash64
from framework.storage import Store
from framework.video import VideoError

# Of a latent clip, what differs from its video's row.
_DIFFERS = (
    "shard", "member", "offset", "size_bytes", "checksum", "checked_bytes", "first_frame",
    "num_frames", "fps", "height", "width",
)  # fmt: skip
_STORED = pa.schema(
    [("key_hash", pa.uint64()), *(field for field in SCHEMA if field.name in _DIFFERS)]
)
# What a clip's latents and texts are made of; all else may change without encoding it again.
_MADE_OF = (
    "clip_id", "checksum", "checked_bytes", "size_bytes", "first_frame", "num_frames", "fps",
    "height", "width", "captions",
)  # fmt: skip
_VIEW = ("view_first_frame", "view_stride", "view_num_frames", "view_height", "view_width")


@dataclass(frozen=True)
class EncodeReport:
    """What an encoding found; `print` it."""

    url: str
    num_clips: int  # with latents
    num_encoded: int  # just now
    refused: Mapping[str, int]  # clips that the recipe cannot use, by cause
    problems: tuple[ShardProblem, ...]  # clips that could not be encoded
    fingerprint: str
    size_bytes: int

    def __str__(self) -> str:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in sorted(self.refused.items()))
        lines = [
            f"{self.num_clips:,} clips encoded, {self.num_encoded:,} of them now; "
            f"{self.size_bytes / 1e6:,.1f} MB",
            f"  refused by the recipe  {causes or 'none'}",
            f"  could not be encoded   {len(self.problems):,}",
        ]
        lines += [f"    {one.shown(120)}" for one in self.problems[:3]]
        lines.append(f"  manifest               {self.url} {self.fingerprint}")
        return "\n".join(lines)


def encode(
    manifest: Manifest,
    url: str,
    recipe: Recipe,
    encoders: Encoders,
    encoding: Mapping[str, Any],
    config: EncodeConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> EncodeReport:
    """Encode the clips of a manifest of videos into folder `url`, both splits of it.

    recipe: for its views, budget and seed. encoding: what the latents are made with, plain JSON.
    Runs on the Ray that is initialised. ValueError where the folder holds another encoding.
    `on_progress(done, total)` counts clips.
    """
    store = Store(url)
    _claim(store, encoding, encoders)
    tried = _tried(store)
    refused: Counter[str] = Counter()
    fresh = []  # by part, of the clips that the recipe can use: whether it is to be encoded
    for index in range(manifest.num_parts):
        part = _with_views(manifest.part(index), recipe, refused)
        fresh.append(np.array([key not in tried for key in _row_keys(part)], bool))

    def units() -> Iterator[pa.Table]:
        for index, is_fresh in enumerate(fresh):
            rows = _with_views(manifest.part(index), recipe, Counter()).filter(pa.array(is_fresh))
            rows = rows.sort_by([("shard", "ascending"), ("offset", "ascending")])
            for start in range(0, rows.num_rows, config.clips_per_shard):
                yield rows.slice(start, config.clips_per_shard)

    num_fresh = sum(int(is_fresh.sum()) for is_fresh in fresh)
    videos = Store(manifest.shards_url, anywhere=True)  # what it may name, `read_manifest` has said
    work = _Work(videos, store, encoders, config.dtype)
    if num_fresh:
        _run(work, units(), config, lambda done: on_progress(done, num_fresh))
    return _join(manifest, store, encoding, refused, num_fresh)


def _claim(store: Store, encoding: Mapping[str, Any], encoders: Encoders) -> None:
    if not store.exists("encoding.json"):
        store.write("null_text.safetensors", dump_text(encoders.embed("")))
        store.write("encoding.json", json.dumps(encoding, indent=1, sort_keys=True).encode())
        return
    here = json.loads(store.read("encoding.json"))
    if differing := differences(here, encoding):
        raise ValueError(
            f"{store.url} was encoded otherwise:\n  " + "\n  ".join(differing) + "\n"
            "choose another data.latents, or the config of then"
        )


def _tried(store: Store) -> set[int]:
    """Keys of rows that were encoded, or could not be."""
    keys: set[int] = set()
    for name in _row_files(store):
        keys.update(_facts(read_table(store, name))["tried"])
    return keys


def _row_files(store: Store) -> list[str]:
    return [name for name in store.list() if name.startswith("rows/")]


def _facts(table: pa.Table) -> dict[str, Any]:
    return json.loads(table.schema.metadata[b"facts"])


def _with_views(part: pa.Table, recipe: Recipe, refused: Counter[str]) -> pa.Table:
    """The rows that the recipe can use, with the columns _VIEW; counts the others."""
    names = ("clip_id", "num_frames", "fps", "height", "width")
    columns = {name: part[name].to_numpy() for name in names}
    views = choose_views(
        columns, recipe.views, recipe.geometry, recipe.max_tokens, recipe.seed, epoch=0
    )
    first = part["first_frame"].to_numpy() + views.first_frame
    values = (first, views.stride, views.num_frames, views.height, views.width)
    for name, column in zip(_VIEW, values, strict=True):
        part = part.append_column(name, pa.array(column, pa.int64()))
    part = part.append_column("view_fps", pa.array(views.fps))
    part = part.append_column("view_flip", pa.array(views.flip))
    refused.update(views.refused[views.refused != ""].tolist())
    return part.filter(pa.array(views.refused == ""))


def _row_keys(rows: pa.Table) -> list[int]:
    """A hash of all that the latents and the texts of each clip are made of."""
    columns = (rows[name].to_pylist() for name in _MADE_OF)
    return [hash64("row", repr(values)) for values in zip(*columns, strict=True)]


@dataclass(frozen=True)
class _Work:
    """What an actor does; called with the rows of some clips, it writes a shard and its rows."""

    videos: Store
    out: Store
    encoders: Encoders
    dtype: str

    def __call__(self, unit: pa.Table) -> int:
        keys = _row_keys(unit)
        name = f"{hash64('unit', *keys):016x}"
        rows = unit.to_pylist()
        spans = [_Span(row["shard"], row["offset"], row["size_bytes"]) for row in rows]
        files: list[dict[str, Any]] = []
        kept: list[dict[str, Any]] = []
        problems: list[ShardProblem] = []
        payloads = fetch(self.videos, spans)
        for key, row, payload in zip(keys, rows, payloads, strict=True):
            try:
                if not isinstance(payload, bytes):
                    raise payload
                data = self._encoded(row, payload)
            except (VideoError, EOFError, FileNotFoundError) as error:
                where = (row["shard"], row["offset"])
                problems.append(ShardProblem(*where, "not encoded", row["key"], str(error)[:500]))
                continue
            files.append({"__key__": str(row["clip_id"]), LATENTS_EXTENSION: data})
            kept.append(row | {"key_hash": key, "checksum": checksum(data)})
        stored = self._write(f"shards/{name}.tar", files, kept)
        facts = {"tried": keys, "problems": [asdict(problem) for problem in problems]}
        rows = stored.replace_schema_metadata({"facts": json.dumps(facts)})
        self.out.write(f"rows/{name}.parquet", to_parquet([rows]))
        return unit.num_rows

    def _encoded(self, row: dict[str, Any], payload: bytes) -> bytes:
        view = View(*(row[name] for name in (*_VIEW, "view_flip")))
        frames = decode_view(payload, row["checksum"], row["checked_bytes"], view)
        captions = dict.fromkeys(["", *row["captions"]])
        texts = {caption: self.encoders.embed(caption) for caption in captions}
        return dump_clip(self.encoders.frames_to_latents(frames), texts, getattr(torch, self.dtype))

    def _write(
        self, shard: str, files: list[dict[str, Any]], kept: list[dict[str, Any]]
    ) -> pa.Table:
        """Write the shard, and give its rows, _STORED."""
        if not files:
            return _STORED.empty_table()
        self.out.write(shard, tar_bytes(files).getbuffer())
        members, problems = read_members(self.out, shard)
        assert len(members) == len(kept), (shard, problems)
        return pa.Table.from_pylist(
            [
                {
                    "key_hash": row["key_hash"],
                    "shard": shard,
                    "member": member.name,
                    "offset": member.offset,
                    "size_bytes": member.size_bytes,
                    "checksum": row["checksum"],
                    "checked_bytes": member.size_bytes,
                    "first_frame": 0,
                    "num_frames": row["view_num_frames"],
                    "fps": row["view_fps"],
                    "height": row["view_height"],
                    "width": row["view_width"],
                }
                for row, member in zip(kept, members, strict=True)
            ],
            _STORED,
        )


@dataclass(frozen=True)
class _Span:
    shard: str
    offset: int
    size_bytes: int


class _Actor:
    def __init__(self, work: _Work) -> None:
        self._work = work

    def run(self, unit: pa.Table) -> int:
        return self._work(unit)


def _run(
    work: _Work,
    units: Iterable[pa.Table],
    config: EncodeConfig,
    on_progress: Callable[[int], None],
) -> None:
    """Hand the units to a pool of actors; RuntimeError where one of them fails."""
    # A video that kills the decoder takes its actor along; the unit is tried again, elsewhere.
    options: dict[str, Any] = {
        "num_cpus": config.cpus_per_actor,
        "num_gpus": config.gpus_per_actor,
        "max_restarts": 8,
        "max_task_retries": 2,
    }
    actor = ray.remote(**options)(_Actor)
    pool = ray.util.ActorPool([actor.remote(work) for _ in range(config.actors)])
    done = 0
    try:
        for unit in units:
            pool.submit(lambda actor, unit: actor.run.remote(unit), unit)
            if not pool.has_free():
                done += pool.get_next_unordered()
                on_progress(done)
        while pool.has_next():
            done += pool.get_next_unordered()
            on_progress(done)
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"encoding failed: {error}") from error


def _join(
    manifest: Manifest,
    store: Store,
    encoding: Mapping[str, Any],
    refused: Mapping[str, int],
    num_encoded: int,
) -> EncodeReport:
    """The manifest of all latents of clips that `manifest` has, and as it has them now."""
    tables = [read_table(store, name) for name in _row_files(store)]
    problems = sorted(
        {ShardProblem(**one) for table in tables for one in _facts(table)["problems"]}
    )
    stored = pa.concat_tables([table.replace_schema_metadata(None) for table in tables])
    stored = stored.sort_by("key_hash").combine_chunks()
    hashes = stored["key_hash"].to_numpy()
    found = [_places(hashes, manifest.part(i)) for i in range(manifest.num_parts)]
    num_clips = sum(int((places >= 0).sum()) for places in found)
    if not num_clips:
        first = f", first: {problems[0]}" if problems else ""
        raise ValueError(
            f"{store.url}: no clip could be encoded; refused: {dict(refused)}, could not be "
            f"read: {len(problems)}{first}"
        )

    def latents() -> Iterator[pa.Table]:
        for i, places in enumerate(found):
            rows = manifest.part(i).filter(pa.array(places >= 0))
            here = stored.take(pa.array(places[places >= 0]))
            yield pa.table(
                {
                    name: here[name] if name in _STORED.names else rows[name]
                    for name in rows.column_names
                }
            )

    quarantine = [asdict(problem) for problem in problems]
    store.write("quarantine.json", json.dumps(quarantine, indent=1, ensure_ascii=False).encode())
    failures = dict(refused) | ({"not encoded": len(problems)} if problems else {})
    parts = cut_into_parts(latents(), num_clips)
    made = save_manifest(store, parts, store.url, failures, encoding)
    size_bytes = pc.sum(stored["size_bytes"]).as_py()
    return EncodeReport(
        store.url, num_clips, num_encoded, refused, tuple(problems), made.fingerprint, size_bytes
    )


def _places(hashes: np.ndarray, part: pa.Table) -> np.ndarray:
    """(n,) where each row of a manifest's part stands among the sorted `hashes`; -1 for nowhere."""
    wanted = np.array(_row_keys(part), np.uint64)
    places = np.searchsorted(hashes, wanted)
    inside = np.minimum(places, max(len(hashes) - 1, 0))
    is_there = (places < len(hashes)) & (hashes[inside] == wanted) if len(hashes) else False
    return np.where(is_there, places, -1)
