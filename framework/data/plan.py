"""The planner: which views of which clips form which pack of which step, written down ahead.

`make_epoch` orders the clips of an epoch by hash, chooses their views, packs them, and deals packs
of alike cost into steps; `Plan` reads what it wrote. A plan is a pure function of the manifest's
fingerprint, the split, the recipe (seed included), the text encoder's fingerprint and the epoch:

    plan/<digest>/recipe.json                       what the digest is a hash of
    plan/<digest>/epoch-00000/window-00000.parquet  rows of clips, one row group a step
    plan/<digest>/epoch-00000/refused.parquet       clips that cannot be used, and why
    plan/<digest>/epoch-00000/index.parquet         one row a step; written last: the commit

Invariants: every usable clip comes exactly once an epoch; every step has G packs, the same on any
number of ranks; no pack exceeds a limit; only the last step of an epoch holds planned dummies.
"""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framework.data.packing import pack_bucketed, pack_mixed
from framework.data.plan_store import (
    INDEX,
    ROWS,
    ClipPlan,
    PackPlan,
    Plan,
    PlanSummary,
    StepTotals,
    dummy_row,
    epoch_folder,
)
from framework.data.recipe import Recipe, plan_digest, plan_identity
from framework.data.views import choose_views, clip_hashes
from framework.seeding import hash64, hash64_array
from framework.storage import Store

__all__ = [
    "ClipPlan",
    "ClipTable",
    "PackPlan",
    "Plan",
    "PlanSummary",
    "Recipe",
    "StepTotals",
    "deal_steps",
    "make_epoch",
]

_FROM_MANIFEST = ("clip_id", "shard", "key", "offset", "size_bytes", "checksum", "source")
_SEEN = ("num_frames", "fps", "height", "width")


class ClipTable(Protocol):
    """What the planner wants of a manifest."""

    @property
    def table(self) -> pa.Table:
        """One row a clip, in any order."""

    @property
    def fingerprint(self) -> str:
        """A hash of the ordered content."""


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
    after the text encoder's own truncation, at least 1. Clips that cannot be used are refused by
    name; ValueError where none is left.
    """
    identity = plan_identity(recipe, manifest.fingerprint, text_fingerprint, split)
    digest = plan_digest(identity)
    target, folder = store.child("plan", digest), epoch_folder(epoch)
    if target.exists(f"{folder}/index.parquet"):
        return Plan(store, digest)

    sources = sorted(manifest.table["source"].unique().to_pylist())
    null_text_tokens = num_text_tokens("")
    filler = pa.Table.from_pylist([dummy_row(recipe, null_text_tokens)], ROWS)
    clips = manifest.table.filter(pc.equal(manifest.table["split"], split))
    rows, refused = _epoch_rows(clips, recipe, epoch, sources, num_text_tokens)
    causes = {c["values"]: c["counts"] for c in pc.value_counts(refused["cause"]).to_pylist()}
    if not clips.num_rows:
        raise ValueError(
            f"the manifest has no clip of split {split!r}; index again with another "
            "data.heldout_fraction"
        )
    if not rows.num_rows:
        raise ValueError(
            f"none of {clips.num_rows} clips of split {split!r} can be used; refused: {causes}; "
            "look at the recipe's sizes, frames and budgets"
        )
    made_from = {"identity": identity, "sources": sources, "null_text_tokens": null_text_tokens}
    target.write("recipe.json", (json.dumps(made_from, indent=1, sort_keys=True) + "\n").encode())

    index: list[dict[str, Any]] = []
    tokens = rows["tokens"].to_numpy()
    packs = _packs(rows, recipe)
    window_packs = recipe.window_steps * recipe.global_batch_packs
    for window in count():
        chunk = list(islice(packs, window_packs))
        if not chunk:
            break
        steps = deal_steps(chunk, tokens, recipe, epoch, window)
        tables = [
            _step_rows(rows, filler, step, recipe, len(index) + i) for i, step in enumerate(steps)
        ]
        target.write(f"{folder}/window-{window:05d}.parquet", _to_parquet(tables))
        index += [_totals(table, recipe, window, i) for i, table in enumerate(tables)]
    target.write(f"{folder}/refused.parquet", _to_parquet([refused]))
    schema = INDEX.with_metadata({"refused": json.dumps(causes, sort_keys=True)})
    target.write(f"{folder}/index.parquet", _to_parquet([pa.Table.from_pylist(index, schema)]))
    return Plan(store, digest)


def deal_steps(
    packs: Sequence[list[int]], clip_tokens: np.ndarray, recipe: Recipe, epoch: int, window: int
) -> list[list[list[int]]]:
    """Sort the packs of a window by cost, cut them into steps of G, shuffle the steps.

    Within a step costs fall, so that any dp_size neighbours, which ranks work on at one time, are
    alike too. A step of fewer than G packs, the cheapest, stays last: the epoch ends with it.
    """
    costs = [recipe.cost.pack_cost(clip_tokens[pack].tolist()) for pack in packs]
    order = sorted(range(len(packs)), key=lambda i: -costs[i])  # stable: ties in packing order
    size = recipe.global_batch_packs
    steps = [[packs[i] for i in order[at : at + size]] for at in range(0, len(order), size)]
    num_full = len(packs) // size
    shuffle = hash64_array(hash64(recipe.seed, "steps", epoch, window), np.arange(num_full))
    return [steps[i] for i in np.argsort(shuffle, kind="stable")] + steps[num_full:]


def _epoch_rows(
    table: pa.Table,
    recipe: Recipe,
    epoch: int,
    sources: list[str],
    num_text_tokens: Callable[[str], int],
) -> tuple[pa.Table, pa.Table]:
    """Usable clips in epoch order, all columns but step, pack and position; and the refused."""
    # 64-bit offsets: the captions of tens of millions of clips exceed 2 GiB.
    captions = table["captions"].cast(pa.large_list(pa.large_string()))
    table = table.select([*_FROM_MANIFEST, *_SEEN]).append_column("captions", captions)
    ids = table["clip_id"].to_numpy()
    assert len(np.unique(ids)) == len(ids), "clip_id repeats in the manifest"
    order = np.argsort(hash64_array(hash64(recipe.seed, "order", epoch), ids), kind="stable")
    clips, ids = table.take(order), ids[order]

    columns = {name: clips[name].to_numpy() for name in ("clip_id", *_SEEN)}
    views = choose_views(
        columns, recipe.views, recipe.geometry, recipe.max_tokens, recipe.seed, epoch
    )
    captions = _choose_captions(clips["captions"].combine_chunks(), ids, recipe, epoch)
    texts = captions.dictionary_encode()  # a caption that many clips share is counted once
    lengths = np.array([num_text_tokens(text) for text in texts.dictionary.to_pylist()], np.int64)
    if len(lengths) and lengths.min() < 1:
        raise ValueError("num_text_tokens gave 0 for a caption; every text needs at least 1 token")
    text_tokens = lengths[texts.indices.to_numpy()]

    cause = np.where(
        (views.refused == "") & (text_tokens > recipe.max_text_tokens),
        "too_much_text",
        views.refused,
    )
    values = {name: clips[name] for name in _FROM_MANIFEST} | {
        "first_frame": views.first_frame,
        "stride": views.stride,
        "num_frames": views.num_frames,
        "height": views.height,
        "width": views.width,
        "flip": views.flip,
        "fps": views.fps,
        "caption": captions,
        "tokens": views.tokens,
        "text_tokens": text_tokens,
        "source_id": pc.index_in(clips["source"], pa.array(sources, pa.string())),
        "weight": np.ones(len(ids), np.float32),
        "dummy": np.zeros(len(ids), bool),
    }
    is_used = pa.array(cause == "")
    rows = pa.table(values).filter(is_used)
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


def _packs(rows: pa.Table, recipe: Recipe) -> Iterator[list[int]]:
    tokens = rows["tokens"].to_pylist()
    text_tokens = rows["text_tokens"].to_pylist()
    if recipe.policy == "mixed":
        return pack_mixed(tokens, text_tokens, recipe.limits, recipe.open_bins)
    grid_of = functools.cache(recipe.geometry.token_grid)
    shapes = (rows[name].to_pylist() for name in ("num_frames", "height", "width"))
    return pack_bucketed(
        tokens, text_tokens, [grid_of(*s) for s in zip(*shapes, strict=True)], recipe.limits
    )


def _step_rows(
    rows: pa.Table, dummy: pa.Table, packs: list[list[int]], recipe: Recipe, step: int
) -> pa.Table:
    """The rows of one step, filled up with dummy packs to G.

    Inside a pack clips of equal length are neighbours, and among them those of equal text:
    attention on a CPU works on such runs at once.
    """
    clips = np.concatenate(packs)
    sizes = np.array([len(pack) for pack in packs])
    pack = np.repeat(np.arange(len(packs)), sizes)
    taken = rows.take(clips)
    keys = [taken[name].to_numpy() for name in ("clip_id", "text_tokens", "tokens")]
    taken = taken.take(np.lexsort([*keys, pack]))
    position = np.arange(len(clips)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    placed = {"step": np.full(len(clips), step), "pack": pack, "position": position}
    for name, values in placed.items():
        taken = taken.append_column(name, pa.array(values, pa.int32()))
    taken = taken.select(ROWS.names).cast(ROWS)
    dummies = []
    for index in range(len(packs), recipe.global_batch_packs):
        for name, value in (("step", step), ("pack", index)):
            at = ROWS.get_field_index(name)
            dummy = dummy.set_column(at, ROWS.field(at), pa.array([value], pa.int32()))
        dummies.append(dummy)
    return pa.concat_tables([taken, *dummies])


def _totals(table: pa.Table, recipe: Recipe, window: int, row_group: int) -> dict[str, Any]:
    """A step's row of the index."""
    real = table.filter(pc.invert(table["dummy"]))
    costs: defaultdict[int, list[int]] = defaultdict(list)
    for pack, tokens in zip(table["pack"].to_pylist(), table["tokens"].to_pylist(), strict=True):
        costs[pack].append(tokens)
    pack_costs = [recipe.cost.pack_cost(tokens) for tokens in costs.values()]
    num_packs, tokens = pc.count_distinct(real["pack"]).as_py(), pc.sum(real["tokens"]).as_py()
    return {
        "step": table["step"][0].as_py(),
        "window": window,
        "row_group": row_group,
        "packs": num_packs,
        "clips": real.num_rows,
        "tokens": tokens,
        "loss_tokens": tokens,
        "text_tokens": pc.sum(real["text_tokens"]).as_py(),
        "cost": sum(pack_costs),
        "max_cost": max(pack_costs),
        "fill": tokens / (num_packs * recipe.max_tokens),
    }


def _to_parquet(tables: list[pa.Table]) -> bytes:
    """Parquet with one row group a table; the same tables always give the same bytes."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, tables[0].schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=max(1, table.num_rows))
    return sink.getvalue().to_pybytes()


if __name__ == "__main__":
    from framework.assembly import Assembly
    from framework.config import RunConfig, entry
    from framework.data.manifest import read_manifest
    from framework.mapping import flatten, to_mapping
    from framework.train.identity import claim

    def main(config: RunConfig) -> None:
        """Plan the steps of a run and print what the plan is like."""
        assembly = Assembly.of(config)
        assembly.check()
        read_manifest(config.data.manifest)
        run = claim(config.run, flatten(to_mapping(config)))
        assembly.make_plan(run, config.train.steps, print)

    entry(main)
