"""Shards, or a table of loose files, to a manifest: a Ray job with one task for each shard.

What a shard holds is kept beside the manifest, by the shard's name and version:

    shards/<hash>.parquet   rows and problems of one shard, or of some lines of a table
    quarantine.json         what cannot be used, by name, with the cause
    report.json             counts
    manifest.json, …        see framework/data/manifest/table.py

So an index that was interrupted goes on where it was, and one of shards that grew reads the new
ones; the ids of the old clips stay.

Invariant: the manifest is a function of the shards and of IndexConfig; neither the order in which
tasks end nor the number of machines shows in it.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from framework.data.config import IndexConfig
from framework.data.index.listing import Unit, list_units
from framework.data.index.report import IndexReport, Tally, ranked
from framework.data.index.shard import ShardIndex, index_shard, made_of
from framework.data.manifest.table import SCHEMA, assign_split, clip_id
from framework.data.manifest.writer import cut_into_parts, save_manifest
from framework.data.shards.tar import ShardProblem
from framework.printable import printable, printable_page
from framework.storage import Store, join_url

__all__ = ["IndexConfig", "IndexReport", "ShardIndex", "index", "index_shard", "write_index"]

# Tasks handed to Ray at once: enough for any cluster that reads, few enough for a quick `ray.wait`.
MAX_IN_FLIGHT = 512
# More score columns than this are a mistake, such as a table of contents for each clip.
MAX_SCORES = 64
# More sources than this are a mistake, such as a source for each film: each is a metric of a run.
# Chosen by hand.
MAX_SOURCES = 1000


def index(
    shards_url: str,
    manifest_url: str,
    config: IndexConfig | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> IndexReport:
    """Index all `*.tar` below `shards_url`, or the files that this table lists.

    The manifest goes to folder `manifest_url`. Runs on the Ray that is initialised, or starts one.
    `on_progress(done, total)` is called after each shard. ValueError where there is no shard or no
    clip, or where a table names a file that it may not. A shard that the store does not give ends
    the job with a RuntimeError: a manifest without it would be worse than none.
    """
    config = config or IndexConfig()
    root, units = list_units(shards_url, config.anywhere)
    kept = Store(manifest_url)
    _index_on_ray(root, units, config, kept, on_progress)
    return write_index(root, manifest_url, _Kept(kept, units), config)


class _Kept(Mapping[str, ShardIndex]):
    """What was found in each unit, read when it is asked for."""

    def __init__(self, store: Store, units: list[Unit]) -> None:
        self._store = store
        self._names = {unit.name: unit.kept_as for unit in units}

    def __getitem__(self, name: str) -> ShardIndex:
        return ShardIndex.from_parquet(self._store.read_buffer(self._names[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_index(
    root: str, manifest_url: str, found: Mapping[str, ShardIndex], config: IndexConfig
) -> IndexReport:
    """Join what the shards of folder `root` hold, write manifest and quarantine, and report.

    `found` is read twice, one shard at a time.
    """
    names = sorted(found)
    survey = _survey(found, names, config)
    problems = survey.problems
    if not survey.num_clips:
        first = f", first: {problems[0]}" if problems else ""
        raise ValueError(f"shards_url={root!r}: {len(names)} shards hold no clip{first}")
    store, tally = Store(manifest_url), Tally()
    rows = [asdict(problem) for problem in problems]
    store.write("quarantine.json", json.dumps(rows, indent=1, ensure_ascii=False).encode())

    def tables() -> Iterator[pa.Table]:
        for name in names:
            table = _finish(found[name].table, survey.scores, config)
            tally.add(table)
            yield table

    failures = ranked(Counter(problem.cause for problem in problems))
    parts = cut_into_parts(tables(), survey.num_clips)
    manifest = save_manifest(store, parts, root, failures)
    report = IndexReport(
        manifest_url=store.url,
        fingerprint=manifest.fingerprint,
        num_shards=len(names),
        num_clips=tally.num_clips,
        num_train=tally.num_train,
        num_heldout=tally.num_clips - tally.num_train,
        num_stills=tally.num_stills,
        num_uncaptioned=tally.num_uncaptioned,
        num_ignored=survey.num_ignored,
        duration_s=tally.duration_s,
        durations=tally.quantiles(),
        resolutions=ranked(tally.resolutions),
        sources=ranked(tally.sources),
        problems=tuple(problems),
    )
    store.write("report.json", report.to_json())
    return report


def _index_on_ray(
    root: str,
    units: list[Unit],
    config: IndexConfig,
    kept: Store,
    on_progress: Callable[[int, int], None],
) -> None:
    if not ray.is_initialized():
        ray.init()
    # A video that kills the decoder takes its worker along; Ray then tries the shard again.
    task = ray.remote(num_cpus=1)(_index_unit)
    waiting = list(reversed(units))
    running: dict[ray.ObjectRef, Unit] = {}
    done = 0
    while waiting or running:
        while waiting and len(running) < MAX_IN_FLIGHT:
            unit = waiting.pop()
            options = task.options(name=f"index {printable(unit.name)}")
            running[options.remote(root, unit, config, kept)] = unit
        for ref in ray.wait(list(running))[0]:
            unit = running.pop(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                for other in running:
                    ray.cancel(other)
                where = printable(join_url(root, unit.name))
                raise RuntimeError(f"{where}: {printable_page(error)}") from error
            done += 1
            on_progress(done, len(units))


def _index_unit(root: str, unit: Unit, config: IndexConfig, kept: Store) -> None:
    """Index a unit, unless that has been done."""
    wanted = unit.made_of(root, config)
    if not kept.exists(unit.kept_as) or made_of(kept.read_buffer(unit.kept_as)) != wanted:
        kept.write(unit.kept_as, unit.index(root, config).to_parquet(wanted))


class _Survey(NamedTuple):
    """What must be known of all shards before the rows of one are written."""

    num_clips: int
    scores: list[str]  # columns, those that most clips have
    problems: list[ShardProblem]
    num_ignored: int


def _survey(found: Mapping[str, ShardIndex], names: list[str], config: IndexConfig) -> _Survey:
    counts: Counter[str] = Counter()
    problems: list[ShardProblem] = []
    num_clips = num_ignored = 0
    sources: set[str] = set()
    for name in names:
        here = found[name]
        sources.update(here.table["source"].unique().to_pylist())
        if len(sources) > MAX_SOURCES:
            raise ValueError(
                f"the clips are of more than {MAX_SOURCES} sources, such as "
                f"{printable(min(sources), 60)!r}; in their JSON, `source` names a collection and "
                "`video` a film"
            )
        problems += here.problems
        num_ignored += here.num_ignored
        num_clips += int(_num_pieces(here.table, config.max_seconds).sum())
        for column in here.table.column_names[len(SCHEMA) - 1 :]:
            counts[column] += here.table.num_rows - here.table[column].null_count
    scores = sorted(counts, key=lambda name: (-counts[name], name))
    if dropped := scores[MAX_SCORES:]:
        reason = f"only {MAX_SCORES} numbers are kept; left out: {', '.join(dropped)}"
        problems.append(ShardProblem("", 0, "too many scores", reason=reason[:1000]))
    return _Survey(num_clips, sorted(scores[:MAX_SCORES]), sorted(problems), num_ignored)


def _finish(table: pa.Table, scores: list[str], config: IndexConfig) -> pa.Table:
    """The rows of a shard as they stand in the manifest."""
    table = _cut_long(table, config.max_seconds)
    split = assign_split(table["video"].to_pylist(), config.heldout_fraction)
    columns = {
        name: table[name] if name != "split" else pa.array(split, pa.string())
        for name in SCHEMA.names
    }
    for name in scores:
        has = name in table.column_names
        columns[name] = table[name] if has else pa.nulls(table.num_rows, pa.float64())
    return pa.table(columns)


def _num_pieces(table: pa.Table, max_seconds: float | None) -> np.ndarray:
    """(n,) int64: the clips that each row is cut into."""
    frames = table["num_frames"].to_numpy().astype(np.int64)
    if max_seconds is None:
        return np.ones_like(frames)
    # As many frames as fit, one to all; a nanosecond off does not make another piece.
    fitting = np.floor(table["fps"].to_numpy() * max_seconds + 1e-6).clip(1, frames)
    fitting = fitting.astype(np.int64)
    return -(-frames // fitting)


def _cut_long(table: pa.Table, max_seconds: float | None) -> pa.Table:
    """Rows of videos that are too long as several, of alike length."""
    pieces = _num_pieces(table, max_seconds)
    if (pieces == 1).all():
        return table
    rows = np.repeat(np.arange(len(pieces)), pieces)
    number = np.arange(len(rows)) - (np.cumsum(pieces) - pieces)[rows]
    frames = table["num_frames"].to_numpy().astype(np.int64)[rows]
    starts = number * frames // pieces[rows]
    stops = (number + 1) * frames // pieces[rows]
    table = table.take(rows)
    names = zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True)
    ids = [
        clip_id(*name, None if count == 1 else int(i))
        for name, i, count in zip(names, number, pieces[rows], strict=True)
    ]
    for name, values in {
        "clip_id": ids,
        "first_frame": starts,
        "num_frames": stops - starts,
    }.items():
        at = table.column_names.index(name)
        table = table.set_column(at, name, pc.cast(pa.array(values), SCHEMA.field(name).type))
    return table
