"""The planner: which views of which clips form which pack of which step, written down ahead.

`make_epoch` takes the clips of an epoch in an order drawn by hash, chooses their views, packs them,
and deals packs of alike cost into steps; `Plan` reads what it wrote. A plan is a pure function of
the manifest's fingerprint, the split, the recipe (seed included), the text encoder's fingerprint
and the epoch:

    plan/<digest>/recipe.json                       what the digest is a hash of
    plan/<digest>/epoch-00000/window-00000.parquet  rows of clips, by step; some steps a row group
    plan/<digest>/epoch-00000/refused-00000.parquet clips of a part that cannot be used, and why
    plan/<digest>/epoch-00000/index.parquet         one row a step; written last: the commit

It holds one part of the manifest and one window of steps at a time, so that its memory does not
grow with the number of clips.

Invariants: every usable clip comes exactly once an epoch (with source weights: a pass of its
source); every step has G packs, the same on any number of ranks; no pack exceeds a limit; only the
last step of an epoch holds planned dummies.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framework.data.manifest.where import parse_where
from framework.data.parquet import to_parquet
from framework.data.plan.clip_order import by_weight, cursors_from, one_pass
from framework.data.plan.packing import Packer
from framework.data.plan.recipe import Recipe, plan_digest, plan_identity
from framework.data.plan.rows import FROM_MANIFEST, UNPLACED, dummy_clip
from framework.data.plan.store import Plan, epoch_folder, read_epoch_facts
from framework.data.plan.views import (
    REFUSALS,
    SEEN,
    choose_views,
    clip_hashes,
    num_kept,
    stored_views,
)
from framework.data.plan.writer import PlanWriter
from framework.printable import printable
from framework.seeding import hash64, hash64_array
from framework.storage import Store


class ClipTable(Protocol):
    """What the planner wants of a manifest."""

    @property
    def fingerprint(self) -> str:
        """A hash of the ordered content."""

    @property
    def num_parts(self) -> int:
        """In how many pieces the clips are read."""

    @property
    def sources(self) -> Sequence[str]:
        """The names of all sources, sorted."""

    @property
    def scores(self) -> Sequence[str]:
        """The names of the score columns."""

    def part(self, index: int) -> pa.Table:
        """Some of the clips, one a row, in any order."""


def make_epoch(
    manifest: ClipTable,
    recipe: Recipe,
    store: Store,
    epoch: int,
    num_text_tokens: Callable[[str], int],
    text_fingerprint: str,
    split: str = "train",
) -> Plan:
    """Make one epoch of the plan of a split, unless it is committed already, and open the plan.

    store: the run's folder, or any other to keep `plan/` in. num_text_tokens: length of a caption
    after the text encoder's own truncation, at least 1. With source weights an epoch goes on where
    the one before it ended, so that must have been made. Clips that cannot be used are refused by
    name; ValueError where none is left.
    """
    identity = plan_identity(recipe, manifest.fingerprint, text_fingerprint, split)
    digest = plan_digest(identity)
    target, folder = store.child("plan", digest), epoch_folder(epoch)
    if target.exists(f"{folder}/index.parquet"):
        return Plan(store, digest)

    null_text_tokens = num_text_tokens("")
    dummy = dummy_clip(recipe, null_text_tokens)
    clips = _Clips(
        manifest,
        recipe,
        num_text_tokens,
        split,
        target.child(folder),
        recipe.keep_rate(epoch),
    )
    if recipe.sources:
        before = read_epoch_facts(target, epoch - 1)["cursors"] if epoch else None
        cursors = cursors_from(before, recipe.sources)
        chunks = by_weight(
            clips.load, recipe.seed, manifest.num_parts, recipe.sources, cursors, clips.count()
        )
    else:
        cursors = {}
        chunks = one_pass(clips.load, recipe.seed, epoch, manifest.num_parts)

    packer = _packer(recipe, epoch)
    writer = PlanWriter(target.child(folder), recipe, epoch, dummy)
    for rows in chunks:
        tokens, text_tokens = rows["tokens"].to_pylist(), rows["text_tokens"].to_pylist()
        for pack in packer.add(writer.add(rows), tokens, text_tokens, _buckets(rows, recipe)):
            writer.pack(pack)
        writer.forget(packer.waiting())
    for pack in packer.finish():
        writer.pack(pack)
    writer.flush()
    try:
        clips.check_any()
    except ValueError:
        target.delete_folder(folder)
        raise

    made_from = {
        "identity": identity,
        "sources": list(manifest.sources),
        "null_text_tokens": null_text_tokens,
    }
    target.write("recipe.json", (json.dumps(made_from, indent=1, sort_keys=True) + "\n").encode())
    facts = {
        "refused": dict(clips.refused),
        "filtered": clips.filtered,
        "cursors": {name: cursor.to_mapping() for name, cursor in cursors.items()},
    }
    index = pa.concat_tables(writer.index).replace_schema_metadata(
        {"facts": json.dumps(facts, sort_keys=True)}
    )
    target.write(f"{folder}/index.parquet", to_parquet([index.combine_chunks()]))
    return Plan(store, digest)


def check_choice(manifest: ClipTable, recipe: Recipe) -> None:
    """ValueError where the recipe names a source or a column that the manifest has not."""
    if unknown := sorted(set(recipe.sources) - set(manifest.sources)):
        have = printable(", ".join(manifest.sources))
        raise ValueError(f"sources names {unknown[0]!r}; the manifest has {have}")
    if recipe.where:
        parse_where(recipe.where, manifest.scores)


class _Clips:
    """The clips of a split that can be used, part by part, with their views and captions."""

    def __init__(
        self,
        manifest: ClipTable,
        recipe: Recipe,
        num_text_tokens: Callable[[str], int],
        split: str,
        folder: Store,
        keep: float,
    ) -> None:
        check_choice(manifest, recipe)
        self.manifest = manifest
        self.recipe = recipe
        self.num_text_tokens = num_text_tokens
        self.split = split
        self.folder = folder
        self.keep = keep
        self.refused: Counter[str] = Counter()
        self.filtered = 0  # clips that `where` left out
        self._offered = self._used = 0
        self._in_split = 0
        self._where = parse_where(recipe.where, manifest.scores) if recipe.where else None
        self._num_files = 0

    def count(self) -> int:
        """Clips of all weighted sources that pass the filter."""
        return sum(
            self._filtered(part, None)[0].num_rows for part in range(self.manifest.num_parts)
        )

    def load(self, part: int, epoch: int, source: str | None) -> pa.Table:
        """The clips of a part in an epoch's order, UNPLACED; the refused are written down."""
        clips, left_out = self._filtered(part, source)
        ids = clips["clip_id"].to_numpy()
        key = hash64(self.recipe.seed, "order", epoch)
        clips = clips.take(np.argsort(hash64_array(key, ids), kind="stable"))
        rows, refused = _views(
            clips, self.recipe, epoch, self.keep, self.manifest.sources, self.num_text_tokens
        )
        self.filtered += left_out
        self._offered += clips.num_rows
        self._used += rows.num_rows
        for cause in refused["cause"].to_pylist():
            self.refused[cause] += 1
        if refused.num_rows:
            name = f"refused-{self._num_files:05d}.parquet"
            self.folder.write(name, to_parquet([refused]))
            self._num_files += 1
        return rows

    def check_any(self) -> None:
        """ValueError where no clip could be used."""
        if not self._in_split:
            raise ValueError(
                f"the manifest has no clip of split {self.split!r}; index again with another "
                "data.index.heldout_fraction"
            )
        if not self._offered:
            raise ValueError(
                f"none of {self.filtered} clips of split {self.split!r} passes "
                f"where={self.recipe.where!r}"
            )
        if not self._used:
            raise ValueError(
                f"none of {self._offered} clips of split {self.split!r} can be used: "
                + "; ".join(f"{n} {REFUSALS[cause]}" for cause, n in sorted(self.refused.items()))
            )

    def _filtered(self, part: int, source: str | None) -> tuple[pa.Table, int]:
        """The clips of a part that the recipe asks for, and how many its filter left out."""
        table = self.manifest.part(part)
        clips = table.filter(pc.equal(table["split"], self.split))
        self._in_split += clips.num_rows
        names = [source] if source is not None else list(self.recipe.sources)
        if names:
            clips = clips.filter(pc.is_in(clips["source"], pa.array(names, pa.string())))
        if self._where is None:
            return clips, 0
        passed = clips.filter(self._where)
        return passed, clips.num_rows - passed.num_rows


def _packer(recipe: Recipe, epoch: int) -> Packer:
    return Packer(recipe.limits, recipe.lookahead, hash64(recipe.seed, "packs", epoch))


def _buckets(rows: pa.Table, recipe: Recipe) -> list[Any] | None:
    """The token grid of each clip, where packs are of one each."""
    if recipe.policy == "mixed":
        return None
    grid_of = functools.cache(recipe.geometry.token_grid)
    shapes = (rows[name].to_pylist() for name in ("num_frames", "height", "width"))
    return [grid_of(*shape) for shape in zip(*shapes, strict=True)]


def _views(
    clips: pa.Table,
    recipe: Recipe,
    epoch: int,
    keep: float,
    sources: Sequence[str],
    num_text_tokens: Callable[[str], int],
) -> tuple[pa.Table, pa.Table]:
    """Of clips in order, those that can be used, UNPLACED, and those refused.

    keep: the share of their tokens that the plan's epoch keeps.
    """
    # 64-bit offsets: the captions of tens of millions of clips exceed 2 GiB.
    captions = clips["captions"].cast(pa.large_list(pa.large_string()))
    clips = clips.select([*FROM_MANIFEST, "first_frame", *SEEN])
    ids = clips["clip_id"].to_numpy()
    assert len(np.unique(ids)) == len(ids), "clip_id repeats in the manifest"

    columns = {name: clips[name].to_numpy() for name in ("clip_id", *SEEN)}
    most = int(recipe.max_tokens / keep)
    if recipe.encoded:
        views = stored_views(columns, recipe.geometry, most)
    else:
        views = choose_views(columns, recipe.views, recipe.geometry, most, recipe.seed, epoch)
    chosen = _choose_captions(captions.combine_chunks(), ids, recipe, epoch)
    texts = chosen.dictionary_encode()  # a caption that many clips share is counted once
    lengths = np.array([num_text_tokens(text) for text in texts.dictionary.to_pylist()], np.int64)
    if len(lengths) and lengths.min() < 1:
        raise ValueError("num_text_tokens gave 0 for a caption; every text needs at least 1 token")
    text_tokens = lengths[texts.indices.to_numpy()]

    cause = np.where(
        (views.refused == "") & (text_tokens > recipe.max_text_tokens),
        "too_much_text",
        views.refused,
    )
    values = {name: clips[name] for name in FROM_MANIFEST} | views.columns()
    values |= {
        "epoch": np.full(len(ids), epoch, np.int32),
        "first_frame": clips["first_frame"].to_numpy() + views.first_frame,
        "caption": chosen,
        "tokens": num_kept(views.tokens, keep),
        "text_tokens": text_tokens,
        "source_id": pc.index_in(clips["source"], pa.array(sources, pa.string())),
        "weight": np.ones(len(ids), np.float32),
        "dummy": np.zeros(len(ids), bool),
    }
    is_used = pa.array(cause == "")
    rows = pa.table(values).filter(is_used).select(UNPLACED.names).cast(UNPLACED)
    refused = pa.table({**{n: clips[n] for n in ("clip_id", "shard", "key")}, "cause": cause})
    return rows.combine_chunks(), refused.filter(pc.invert(is_used)).sort_by("clip_id")


def _choose_captions(lists: pa.Array, ids: np.ndarray, recipe: Recipe, epoch: int) -> pa.Array:
    """The caption of each clip in an epoch, large_string; "" where dropped or where it has none."""
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.uint64)
    choice = clip_hashes(recipe.seed, epoch, ids, "caption") % np.maximum(counts, np.uint64(1))
    uniform = (clip_hashes(recipe.seed, epoch, ids, "drop_caption") >> np.uint64(11)) * 2.0**-53
    is_empty = (counts == 0) | (uniform < recipe.drop_caption)
    at = lists.offsets.to_numpy()[:-1] + choice.astype(np.int64)
    return pc.fill_null(lists.values.take(pa.array(at, mask=is_empty)), "")
