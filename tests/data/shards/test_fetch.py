"""Ranges of shards: neighbours in one request, order kept, what is gone in its place."""

import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.shards import fetch as module
from framework.data.shards.fetch import MAX_GAP_BYTES, MAX_RUN_BYTES, fetch
from framework.storage import Store

BYTES = np.random.default_rng(0).bytes(3 << 20)


@dataclass(frozen=True)
class Piece:
    shard: str
    offset: int
    size_bytes: int


class CountingStore(Store):
    """Remembers the ranges that were asked for."""

    def __init__(self, url: str | Path) -> None:
        super().__init__(url)
        self.asked: list[tuple[str, int, int]] = []

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        self.asked.append((name, offset, size_bytes))
        return super().read_range(name, offset, size_bytes)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for name in ("a.tar", "b.tar"):
        (folder / name).write_bytes(BYTES)
    return folder


@pytest.mark.parametrize("shard", ["file://{}/private", "../private", "a/../../private"])
def test_ranges_of_a_strange_plan_lie_in_the_store(tmp_path: Path, shard: str) -> None:
    (tmp_path / "private").write_bytes(BYTES)
    (tmp_path / "shards").mkdir()
    pieces = [Piece(shard.format(tmp_path), 0, 10)]
    with pytest.raises(ValueError, match=r"lies outside|leads out of"):
        list(fetch(Store(tmp_path / "shards"), pieces))


def test_neighbours_are_one_request_and_far_ones_are_not(shards: Path) -> None:
    store = CountingStore(shards)
    near, far = 1000 + MAX_GAP_BYTES, 3 * MAX_GAP_BYTES
    pieces = [
        Piece("a.tar", far, 10),
        Piece("a.tar", 0, 1000),
        Piece("b.tar", 0, 10),
        Piece("a.tar", near, 20),
        Piece("a.tar", 500, 100),  # inside another
    ]
    found = list(fetch(store, pieces))
    assert found == [BYTES[p.offset : p.offset + p.size_bytes] for p in pieces]
    assert sorted(store.asked) == [
        ("a.tar", 0, near + 20),
        ("a.tar", far, 10),
        ("b.tar", 0, 10),
    ]


def test_a_request_does_not_grow_without_bound(shards: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_RUN_BYTES", 1 << 20)
    assert MAX_RUN_BYTES > 1 << 20
    store = CountingStore(shards)
    pieces = [Piece("a.tar", at, 200_000) for at in range(0, 3_000_000, 200_000)]
    assert list(fetch(store, pieces)) == [BYTES[p.offset :][: p.size_bytes] for p in pieces]
    assert max(size for _, _, size in store.asked) <= 1 << 20
    assert 3 <= len(store.asked) <= 4


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a.tar", "b.tar", "gone.tar"]),
            st.integers(0, 4 << 20),
            st.integers(1, 1 << 20),
        ),
        max_size=12,
    )
)
def test_each_range_gets_its_bytes_or_its_error(shards: Path, ranges: list) -> None:
    pieces = [Piece(*r) for r in ranges]
    for piece, found in zip(pieces, fetch(Store(shards), pieces), strict=True):
        if piece.shard == "gone.tar":
            assert isinstance(found, FileNotFoundError)
        elif piece.offset + piece.size_bytes > len(BYTES):
            assert isinstance(found, EOFError)
        else:
            assert found == BYTES[piece.offset :][: piece.size_bytes]


def test_a_store_that_denies_is_an_error_and_ends_the_reading(shards: Path) -> None:
    class Denied(CountingStore):
        def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
            raise PermissionError("ACCESS_DENIED")

    with pytest.raises(PermissionError):
        list(fetch(Denied(shards), [Piece("a.tar", 0, 1)]))


def test_requests_overlap(shards: Path) -> None:
    """Eight ranges that wait for one another come only if eight requests are in flight."""
    together = threading.Barrier(8, timeout=60)

    class Slow(CountingStore):
        def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
            together.wait()
            return super().read_range(name, offset, size_bytes)

    apart = [Piece("ab"[i % 2] + ".tar", i // 2 * (MAX_GAP_BYTES + 100), 5) for i in range(8)]
    assert all(isinstance(found, bytes) for found in fetch(Slow(shards), apart))


def test_readers_of_remote_objects_are_kept(s3_bucket: str) -> None:
    store = Store(s3_bucket)
    store.write("x.tar", BYTES)
    pieces = [Piece("x.tar", at, 1000) for at in (0, 1 << 20, 2 << 20)]
    for _ in range(2):
        assert list(fetch(store, pieces)) == [BYTES[p.offset :][:1000] for p in pieces]
    store.write("x.tar", BYTES[: 1 << 20])  # another object of this name: what is left is read
    found = list(fetch(store, pieces))
    assert found[0] == BYTES[:1000]
    assert all(isinstance(part, EOFError | OSError) for part in found[1:])
