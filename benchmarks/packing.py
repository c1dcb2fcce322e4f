"""How full and how even the planner's packs are, and how fast it makes them.

    python -m benchmarks.packing [CLIPS]

The mixture: log-normal durations of 2 to 20 s, 240p to 720p in three aspect ratios, at the cost of
a transformer of width 3072 and packs of 131,072 tokens. Beside the planner stand two ways of
others, stated anew: fixed buckets (each clip cut down to the next of four lengths, batches of one
bucket, as in Open-Sora) and first-fit decreasing over the whole epoch, both dealt at random.
The last line is JSON; `fill` counts dummy packs as empty room.
"""

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from framework.data.plan.cost import CostModel
from framework.data.plan.packing import Packer
from framework.data.plan.planner import make_epoch
from framework.data.plan.recipe import Recipe
from framework.data.plan.views import Geometry, ViewConfig, choose_views
from framework.data.plan.writer import deal_steps
from framework.seeding import hash64_array
from framework.storage import Store

RANKS = (8, 64, 512)
STEP_S = 5.0  # of a step of the training that the planner must stay ahead of
ASPECTS = ((16, 9), (4, 3), (1, 1))
HEIGHTS = (240, 352, 480, 720)
BUCKET_FRAMES = (49, 97, 193, 385)
RECIPE = Recipe(
    views=ViewConfig(
        frames=tuple(range(17, 482, 4)),
        sizes=tuple((h, h * a // b // 16 * 16) for h in HEIGHTS for a, b in ASPECTS),
        fps=24.0,
    ),
    geometry=Geometry(4, 8, True, (1, 2, 2)),
    cost=CostModel(linear=6 * 3072),
    max_tokens=131_072,
    max_text_tokens=16_384,
    max_clips=64,
    global_batch_packs=64,
)


@dataclass(frozen=True)
class Mixture:
    """The clip table, as the planner takes it."""

    table: pa.Table
    fingerprint: str = "mixture"
    num_parts: int = 1
    sources: tuple[str, ...] = ("web",)
    scores: tuple[str, ...] = ()

    def part(self, index: int) -> pa.Table:
        """All of it."""
        return self.table


def mixture(count: int, seed: int = 0) -> Mixture:
    """`count` clips at 24 frames a second."""
    rng = np.random.default_rng(seed)
    seconds = np.clip(rng.lognormal(np.log(6.0), 0.6, count), 2, 20)
    height = rng.choice(HEIGHTS, count)
    aspect = np.array(ASPECTS)[rng.integers(0, len(ASPECTS), count)]
    text = pa.array([f"a caption of clip {i}" for i in range(count)], pa.large_string())
    columns = {
        "clip_id": (hash64_array(7, np.arange(count)) >> np.uint64(1)).astype(np.int64),
        "key": [f"clip-{i:09d}" for i in range(count)],
        "shard": [f"shard-{i // 1000:06d}.tar" for i in range(count)],
        "offset": np.arange(count) % 1000 * 500_000,
        "size_bytes": np.full(count, 500_000),
        "checksum": np.arange(count),
        "checked_bytes": np.full(count, 1),
        "first_frame": np.zeros(count, np.int32),
        "num_frames": (seconds * 24).astype(np.int32),
        "fps": np.full(count, 24, np.float32),
        "height": height.astype(np.int32),
        "width": (height * aspect[:, 0] // aspect[:, 1]).astype(np.int32),
        "captions": pa.LargeListArray.from_arrays(np.arange(count + 1), text),
        "source": np.full(count, "web"),
        "split": np.full(count, "train"),
    }
    return Mixture(pa.table(columns))


def seen_tokens(clips: Mixture, recipe: Recipe) -> np.ndarray:
    """(n,) tokens of each clip's view, in the table's order, which is as good as random."""
    names = ("clip_id", "num_frames", "fps", "height", "width")
    columns = {name: clips.table[name].to_numpy() for name in names}
    views = choose_views(columns, recipe.views, recipe.geometry, recipe.max_tokens, 0, 0)
    return views.tokens[views.refused == ""]


def bucket_batches(clips: Mixture, recipe: Recipe) -> tuple[list[list[int]], np.ndarray]:
    """Batches of fixed buckets, as positions, and the tokens that each clip is cut down to."""
    cut = replace(recipe, views=replace(recipe.views, frames=BUCKET_FRAMES))
    tokens = seen_tokens(clips, cut)
    by_size: defaultdict[int, list[int]] = defaultdict(list)
    for i, n in enumerate(tokens.tolist()):
        by_size[n].append(i)
    batches = []
    for n, members in by_size.items():
        size = recipe.max_tokens // n
        whole = len(members) // size * size  # the part-filled last batch is dropped
        batches += [members[at : at + size] for at in range(0, whole, size)]
    return batches, tokens


def first_fit_decreasing(tokens: np.ndarray, room: int) -> list[list[int]]:
    """Each clip, largest first, into the first pack that has room: a tree of largest rooms."""
    leaves = 1 << (len(tokens) - 1).bit_length()
    tree = np.full(2 * leaves, room, np.int64).tolist()
    packs: defaultdict[int, list[int]] = defaultdict(list)
    for i in np.argsort(-tokens, kind="stable").tolist():
        n, node = int(tokens[i]), 1
        while node < leaves:
            node = 2 * node if tree[2 * node] >= n else 2 * node + 1
        packs[node].append(i)
        tree[node] -= n
        while node := node // 2:
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
    return list(packs.values())


def imbalance(
    steps: Sequence[Sequence[Sequence[int]]], tokens: np.ndarray, recipe: Recipe
) -> float:
    """Sum over full steps of the dearest pack's cost, over that of the mean pack's."""
    size = max(len(step) for step in steps)
    full = [step for step in steps if len(step) == size]
    costs = np.array([[recipe.cost.clip_costs(tokens[p]).sum() for p in s] for s in full])
    return float(costs.max(axis=1).sum() / costs.mean(axis=1).sum())


def at_random(packs: list[list[int]], ranks: int) -> list[list[list[int]]]:
    """Packs in random order, dealt into steps."""
    order = np.random.default_rng(0).permutation(len(packs)).tolist()
    return [[packs[i] for i in order[at : at + ranks]] for at in range(0, len(order), ranks)]


def likeness(steps: list[list[list[int]]], tokens: np.ndarray) -> float:
    """Variance of clip length inside a step over that of all clips: 1 is as good as random."""
    by_step = [tokens[np.concatenate(step)] for step in steps]
    inside = sum(np.var(lengths) * len(lengths) for lengths in by_step)
    return float(inside / (np.var(tokens) * len(tokens)))


def main(count: int) -> None:
    """Print the tables, then one JSON line."""
    clips = mixture(count)
    all_tokens = seen_tokens(clips, RECIPE)
    found: dict[str, float] = {}
    print(f"{count:,} clips, {all_tokens.sum():,} tokens")
    print(f"{'':26}{'fill':>8}{'used':>8}" + "".join(f"{f'{r} ranks':>12}" for r in RANKS))

    fills, rates, balances = [], [], []
    for ranks in RANKS:
        recipe = replace(RECIPE, global_batch_packs=ranks)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            plan = make_epoch(clips, recipe, Store(folder), 0, lambda text: len(text) + 1, "bytes")
            rates.append(count / (time.perf_counter() - began))
            summary = plan.summary(0)
        fills.append(summary.tokens / (summary.steps * ranks * recipe.max_tokens))
        balances.append(summary.imbalance)
        found[f"imbalance_{ranks}"] = round(summary.imbalance, 4)
    used = summary.tokens / all_tokens.sum()
    line("planner", min(fills), used, balances)

    batches, cut = bucket_batches(clips, RECIPE)
    kept = sum(cut[b].sum() for b in batches)
    balances = [imbalance(at_random(batches, r), cut, RECIPE) for r in RANKS]
    full = kept / (len(batches) * RECIPE.max_tokens)
    line("fixed buckets", full, kept / all_tokens.sum(), balances)

    packs = first_fit_decreasing(all_tokens, RECIPE.max_tokens)
    balances = [imbalance(at_random(packs, r), all_tokens, RECIPE) for r in RANKS]
    line("first-fit decreasing", all_tokens.sum() / (len(packs) * RECIPE.max_tokens), 1, balances)

    print("\nthe window as a dial, 64 ranks")
    print(f"{'steps in a window':26}{'imbalance':>12}{'variance of length in a step':>32}")
    packer = Packer(RECIPE.limits, RECIPE.lookahead, 0)
    mixed = list(packer.add(0, all_tokens.tolist(), [20] * len(all_tokens)))
    mixed += packer.finish()
    costs = np.array([RECIPE.cost.clip_costs(all_tokens[pack]).sum() for pack in mixed])
    for window in (1, 4, 16, 64, 256):
        size = window * 64
        steps = [
            [mixed[at + i] for i in step]
            for at in range(0, len(mixed), size)
            for step in deal_steps(costs[at : at + size], RECIPE, 0, at)
        ]
        balance, alike = imbalance(steps, all_tokens, RECIPE), likeness(steps, all_tokens)
        print(f"{window:<26}{balance:>12.3f}{alike:>32.3f}")

    consumption = 512 * (count / len(mixed)) / STEP_S
    found = {
        "fill": round(min(fills), 4),
        **{f"fill_{r}": round(fill, 4) for r, fill in zip(RANKS, fills, strict=True)},
        **found,
        "clips_per_s": round(min(rates)),
        "plan_over_consumption": round(min(rates) / consumption, 1),
    }
    print(f"\nplanning {min(rates):,.0f} clips/s, files written; 512 ranks take {consumption:,.0f}")
    print(json.dumps(found))


def line(name: str, fill: float, used: float, balances: Sequence[float]) -> None:
    """A row of the first table."""
    print(f"{name:26}{fill:>8.3f}{used:>8.3f}" + "".join(f"{b:>12.3f}" for b in balances))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
