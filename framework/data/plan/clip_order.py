"""The order in which an epoch's clips come, one part of the manifest after another.

Parts come in an order drawn for the epoch, and each part's clips in one of their own. Since a part
is a random sample of the clips, that is as good a shuffle as one over all of them, and needs the
memory of one part.

With weights every source is an endless sequence of passes, each of which gives each of its clips
once; the sources are merged so that any n clips hold each one's share of n, up to one clip.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from framework.seeding import hash64, hash64_array

# The usable clips of a part in the order of a pass, with what the pass makes of them.
# (part, pass, source; None for all) -> rows
Load = Callable[[int, int, str | None], pa.Table]

CHUNK_CLIPS = 1 << 16  # merged at once, out of several sources


@dataclass
class Cursor:
    """How far a source has come; kept in the plan, so that the next epoch goes on there."""

    taken: int = 0  # clips given, in all passes
    passes: int = 0  # whole passes
    parts: int = 0  # parts done of this pass
    row: int = 0  # rows given of the next part

    def to_mapping(self) -> dict[str, int]:
        """Plain numbers."""
        return asdict(self)


def part_order(seed: int, passes: int, num_parts: int) -> list[int]:
    """The order of the manifest's parts in a pass."""
    return np.argsort(
        hash64_array(hash64(seed, "parts", passes), np.arange(num_parts)), kind="stable"
    ).tolist()


def one_pass(load: Load, seed: int, epoch: int, num_parts: int) -> Iterator[pa.Table]:
    """Every clip once: the epoch is the pass."""
    for part in part_order(seed, epoch, num_parts):
        yield load(part, epoch, None)


def by_weight(
    load: Load,
    seed: int,
    num_parts: int,
    weights: Mapping[str, float],
    cursors: Mapping[str, Cursor],
    num_clips: int,
) -> Iterator[pa.Table]:
    """`num_clips` clips of the sources by their weights, from the cursors on, which move along.

    ValueError where a source has no clip that can be used.
    """
    names = sorted(name for name, weight in weights.items() if weight > 0)
    sources = {
        name: _Source(load, seed, num_parts, name, cursors[name], weights[name]) for name in names
    }
    while num_clips > 0:
        chunk = min(num_clips, CHUNK_CLIPS)
        num_clips -= chunk
        # Source s gives its k-th clip at time (k + 1/2) / weight; the earliest go first.
        times = np.concatenate([sources[name].times(chunk) for name in names])
        owner = np.repeat(np.arange(len(names)), chunk)
        first = np.argsort(times, kind="stable")[:chunk]
        turn = owner[first]
        counts = np.bincount(turn, minlength=len(names)).tolist()
        taken = [sources[name].take(n) for name, n in zip(names, counts, strict=True) if n]
        rows = pa.concat_tables([table for tables in taken for table in tables])
        # Row r of the k-th source's rows stands at that source's r-th turn.
        place = np.empty(chunk, np.int64)
        place[np.argsort(turn, kind="stable")] = np.arange(chunk)
        yield rows.take(place)


class _Source:
    """An endless sequence of a source's clips."""

    def __init__(
        self, load: Load, seed: int, num_parts: int, name: str, cursor: Cursor, weight: float
    ) -> None:
        self.load = load
        self.seed = seed
        self.num_parts = num_parts
        self.name = name
        self.cursor = cursor
        self.weight = weight
        self._rows: pa.Table | None = None  # of the part that the cursor stands in

    def times(self, count: int) -> np.ndarray:
        """When the next `count` clips are due, (count,) float64."""
        return (self.cursor.taken + np.arange(count) + 0.5) / self.weight

    def take(self, count: int) -> list[pa.Table]:
        """The next `count` clips, in pieces."""
        pieces, empty = [], 0
        cursor = self.cursor
        while count:
            if self._rows is None:
                part = part_order(self.seed, cursor.passes, self.num_parts)[cursor.parts]
                self._rows = self.load(part, cursor.passes, self.name)
            piece = self._rows.slice(cursor.row, count)
            pieces.append(piece)
            count -= piece.num_rows
            cursor.row += piece.num_rows
            cursor.taken += piece.num_rows
            empty = 0 if piece.num_rows else empty + 1
            if empty > 2 * self.num_parts:
                raise ValueError(f"sources has {self.name!r}, of which no clip can be used")
            if cursor.row == self._rows.num_rows:
                self._rows, cursor.row = None, 0
                cursor.parts += 1
                if cursor.parts == self.num_parts:
                    cursor.parts, cursor.passes = 0, cursor.passes + 1
        return pieces


def cursors_from(
    mapping: Mapping[str, Any] | None, names: Mapping[str, float]
) -> dict[str, Cursor]:
    """The cursors of a run's start, or those that `Cursor.to_mapping` kept."""
    return {name: Cursor(**(mapping or {}).get(name, {})) for name in names}
