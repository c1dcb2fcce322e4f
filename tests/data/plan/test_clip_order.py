"""The order of an epoch's clips: every clip once a pass, and each source's share of any stretch."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.plan.clip_order import CHUNK_CLIPS, Cursor, by_weight, cursors_from, one_pass

Load = Callable[[int, int, str | None], pa.Table]


def loader(sizes: dict[str, int], num_parts: int) -> Load:
    """Parts of sources "a", "b", … with that many clips, dealt in turn; clips are (source, i)."""

    def load(part: int, passes: int, source: str | None) -> pa.Table:
        names = [source] if source else list(sizes)
        clips = [(n, i) for n in names for i in range(sizes[n]) if i % num_parts == part]
        order = np.random.default_rng([part, passes]).permutation(len(clips))
        return pa.table(
            {
                "source": pa.array([clips[i][0] for i in order], pa.string()),
                "clip": pa.array([clips[i][1] for i in order], pa.int64()),
                "pass": pa.array([passes] * len(clips), pa.int64()),
            }
        )

    return load


def test_a_pass_gives_every_clip_once_in_another_order_each_epoch() -> None:
    load = loader({"a": 30, "b": 7}, 4)
    epochs = [pa.concat_tables(one_pass(load, 3, epoch, 4)).to_pylist() for epoch in range(6)]
    for rows in epochs:
        assert len({(row["source"], row["clip"]) for row in rows}) == len(rows) == 37
    first_parts = {rows[0]["clip"] % 4 for rows in epochs}
    assert len(first_parts) > 1


def draw(
    load: Load, parts: int, weights: dict[str, float], counts: list[int]
) -> tuple[list[list[dict]], dict[str, Cursor]]:
    """Epochs of so many clips, each begun anew from the cursors that the last one left."""
    kept: dict[str, dict[str, int]] = {}
    epochs = []
    for count in counts:
        cursors = cursors_from(kept, weights)
        tables = by_weight(load, 3, parts, weights, cursors, count)
        epochs.append(pa.concat_tables(tables).to_pylist())
        kept = {name: cursor.to_mapping() for name, cursor in cursors.items()}
    return epochs, cursors


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    shares=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
    counts=st.lists(st.integers(1, 25), min_size=1, max_size=4),
    parts=st.integers(1, 3),
)
def test_shares_and_passes_hold_over_any_epochs(
    sizes: list[int], shares: list[float], counts: list[int], parts: int
) -> None:
    weights = dict(zip("abcd"[: len(sizes)], shares, strict=False))
    named = dict(zip(weights, sizes, strict=True))
    load = loader(named, parts)
    epochs, cursors = draw(load, parts, weights, counts)
    assert [len(rows) for rows in epochs] == counts
    rows = [row for epoch in epochs for row in epoch]
    whole = draw(load, parts, weights, [sum(counts)])[0][0]
    assert rows == whole  # an epoch's border does not show

    total, given_so_far = sum(weights.values()), Counter()
    for number, row in enumerate(rows, 1):
        given_so_far[row["source"]] += 1
        for name, weight in weights.items():
            assert abs(given_so_far[name] - number * weight / total) <= len(weights)
    for name, size in named.items():
        mine = [row for row in rows if row["source"] == name]
        assert cursors[name].taken == len(mine)
        for start in range(0, len(mine), size):
            of_pass = mine[start : start + size]
            assert len({row["clip"] for row in of_pass}) == len(of_pass)  # once a pass
            assert {row["pass"] for row in of_pass} == {start // size}


def test_two_sources_are_never_more_than_one_clip_off() -> None:
    weights = {"a": 3.0, "b": 1.0}
    count = CHUNK_CLIPS + 1001  # over the border of a chunk
    ((rows,), _) = draw(loader({"a": 5000, "b": 7}, 2), 2, weights, [count])
    of_a = np.cumsum([row["source"] == "a" for row in rows])
    assert np.abs(of_a - 0.75 * np.arange(1, count + 1)).max() <= 1


def test_a_source_without_clips_is_named() -> None:
    with pytest.raises(ValueError, match="'b', of which no clip can be used"):
        draw(loader({"a": 5, "b": 0}, 2), 2, {"a": 1.0, "b": 1.0}, [4])
