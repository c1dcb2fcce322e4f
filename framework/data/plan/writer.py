"""Packs to window files: dealt into steps of alike cost, sorted, with the index of their totals."""

from itertools import pairwise

import numpy as np
import pyarrow as pa

from framework.data.parquet import to_parquet
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import ROWS, UNPLACED, ClipPlan
from framework.data.plan.store import INDEX
from framework.seeding import hash64, hash64_array
from framework.storage import Store

# Steps are read by the row group: of some hundred KB, since each costs a millisecond to write.
ROW_GROUP_CLIPS = 4096


class PlanWriter:
    """Packs on their way into window files; it holds the rows of clips that are not written yet."""

    def __init__(self, folder: Store, recipe: Recipe, epoch: int, dummy: ClipPlan) -> None:
        self.index = [INDEX.empty_table()]  # rows of the steps written
        self._steps = 0
        self._folder = folder
        self._recipe = recipe
        self._epoch = epoch
        self._dummy = dummy
        self._rows = UNPLACED.empty_table()
        self._numbers = np.empty(0, np.int64)  # of the rows, ascending
        self._added = 0
        self._packs: list[list[int]] = []
        self._windows = 0

    def add(self, rows: pa.Table) -> int:
        """Take clips in; the number of the first, the others follow."""
        first = self._added
        self._added += rows.num_rows
        self._numbers = np.concatenate([self._numbers, np.arange(first, self._added)])
        self._rows = pa.concat_tables([self._rows, rows])
        return first

    def pack(self, pack: list[int]) -> None:
        """Take a pack; a full window is written."""
        self._packs.append(pack)
        if len(self._packs) == self._recipe.window_steps * self._recipe.global_batch_packs:
            self.flush()

    def forget(self, waiting: list[int]) -> None:
        """Drop the rows of clips that are neither in `waiting` nor in a pack of this window."""
        needed = np.sort(np.array([*waiting, *(c for p in self._packs for c in p)], np.int64))
        self._rows = self._rows.take(np.searchsorted(self._numbers, needed)).combine_chunks()
        self._numbers = needed

    def flush(self) -> None:
        """Write the packs taken as a window."""
        if not self._packs:
            return
        recipe, packs = self._recipe, self._packs
        sizes = np.array([len(pack) for pack in packs])
        at = np.searchsorted(self._numbers, np.concatenate(packs))
        tokens = self._rows["tokens"].to_numpy()[at]
        starts = np.cumsum(sizes) - sizes
        costs = np.add.reduceat(recipe.cost.clip_costs(tokens), starts)
        steps = deal_steps(costs, recipe, self._epoch, self._windows)

        step_of, place_of = np.empty(len(packs), np.int64), np.empty(len(packs), np.int64)
        for number, step in enumerate(steps, self._steps):
            step_of[step], place_of[step] = number, np.arange(len(step))
        table = _placed(self._rows.take(at), np.repeat(step_of, sizes), np.repeat(place_of, sizes))
        numbers = self._steps + np.arange(len(steps))
        borders = np.searchsorted(table["step"].to_numpy(), [*numbers, numbers[-1] + 1])
        groups = (borders - 1) // ROW_GROUP_CLIPS  # a step is in the group of its last clip
        row_group = np.unique(groups[1:], return_inverse=True)[1]
        index = _totals(table, borders, [costs[step] for step in steps], recipe)
        placed = {"step": numbers, "window": np.full(len(steps), self._windows)}
        self.index.append(pa.table({**index, **placed, "row_group": row_group}, INDEX))

        dummies = _dummies(self._dummy, int(numbers[-1]), len(steps[-1]), recipe.global_batch_packs)
        table = pa.concat_tables([table, dummies])
        starts = [borders[np.argmax(row_group == g)] for g in range(row_group[-1] + 1)]
        pieces = [
            table.slice(start, stop - start) for start, stop in pairwise([*starts, table.num_rows])
        ]
        self._folder.write(f"window-{self._windows:05d}.parquet", to_parquet(pieces))
        self._steps += len(steps)
        self._windows += 1
        self._packs = []


def _placed(rows: pa.Table, step: np.ndarray, pack: np.ndarray) -> pa.Table:
    """ROWS, by step and pack.

    Inside a pack clips of equal length are neighbours, and among them those of equal text:
    attention on a CPU works on such runs at once.
    """
    keys = [rows[name].to_numpy() for name in ("clip_id", "text_tokens", "tokens")]
    order = np.lexsort([*keys, pack, step])
    step, pack = step[order], pack[order]
    is_first = np.ones(len(step), bool)
    is_first[1:] = (np.diff(step) != 0) | (np.diff(pack) != 0)
    starts = np.flatnonzero(is_first)
    position = np.arange(len(step)) - starts[np.cumsum(is_first) - 1]
    rows = rows.take(order)
    for name, values in (("step", step), ("pack", pack), ("position", position)):
        rows = rows.append_column(name, pa.array(values, pa.int32()))
    return rows.select(ROWS.names).cast(ROWS)


def _dummies(dummy: ClipPlan, step: int, num_packs: int, wanted: int) -> pa.Table:
    """Dummy packs that a step of `num_packs` lacks to `wanted`."""
    row = dummy.to_row() | {"step": step, "position": 0}
    rows = [row | {"pack": pack} for pack in range(num_packs, wanted)]
    return pa.Table.from_pylist(rows, ROWS)


def _totals(
    table: pa.Table, borders: np.ndarray, costs: list[np.ndarray], recipe: Recipe
) -> dict[str, np.ndarray]:
    """Columns of the index, dummies left out but for the cost.

    borders: (n + 1,) rows where steps begin; costs: of each step's packs.
    """

    def by_step(*names: str) -> np.ndarray:
        """Sums over steps of the product of some columns."""
        factors = [table[name].to_numpy().astype(np.int64) for name in names]
        return np.add.reduceat(np.prod(factors, axis=0), borders[:-1])

    packs = np.array([len(step) for step in costs])
    lacking = recipe.global_batch_packs - packs
    return {
        "packs": packs,
        "clips": np.diff(borders),
        "tokens": by_step("tokens"),
        "loss_tokens": by_step("tokens"),
        "text_tokens": by_step("text_tokens"),
        "pixels": by_step("num_frames", "height", "width"),
        "cost": np.array([step.sum() for step in costs]) + lacking * recipe.dummy_cost,
        "max_cost": np.array([step.max() for step in costs]),
        "fill": by_step("tokens") / (packs * recipe.max_tokens),
    }


def deal_steps(costs: np.ndarray, recipe: Recipe, epoch: int, window: int) -> list[np.ndarray]:
    """Sort the packs of a window by cost, cut them into steps of G, shuffle the steps.

    costs: (n,) int64, of each pack. Gives, for each step, the numbers of its packs. Within a step
    costs fall, so that any dp_size neighbours, which ranks work on at one time, are alike too. A
    step of fewer than G packs, the cheapest, stays last: the epoch ends with it.
    """
    order = np.argsort(-costs, kind="stable")  # ties in packing order
    size = recipe.global_batch_packs
    steps = [order[at : at + size] for at in range(0, len(order), size)]
    num_full = len(costs) // size
    shuffle = hash64_array(hash64(recipe.seed, "steps", epoch, window), np.arange(num_full))
    return [steps[i] for i in np.argsort(shuffle, kind="stable")] + steps[num_full:]
