"""The bytes of a pack's clips: many range requests in flight, neighbours read in one.

A request to an object store costs tens of milliseconds whatever its size, so requests overlap, and
two clips that lie near each other in a shard are fetched together with what is between them.
"""

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from framework.storage import Store

IN_FLIGHT = 16  # requests of one process; S3 wants 8 to 32 of a reader
# Random reads of S3 are as fast as sequential ones from 1 MiB on, and six times slower at 128 KiB
# (measured on a local server): below this gap the bytes between cost less than a request.
MAX_GAP_BYTES = 512 << 10
MAX_RUN_BYTES = 32 << 20  # of one request; a clip alone may be larger


_Part = bytes | OSError | EOFError


class Range(Protocol):
    """Where the bytes of a clip lie."""

    @property
    def shard(self) -> str:
        """The object's name in the store."""

    @property
    def offset(self) -> int:
        """Of the first byte."""

    @property
    def size_bytes(self) -> int:
        """How many."""


def fetch(store: Store, ranges: Sequence[Range]) -> Iterator[_Part]:
    """The bytes of each range, in order, read ahead; an error in place of those that are gone.

    FileNotFoundError and EOFError (the object ends before) stand in their range's place. OSError is
    raised where the store fails for another cause, after retries.
    """
    parts: dict[int, tuple[Future[list[_Part]], int]] = {}
    for run in _runs(ranges):
        future = _pool().submit(_read_run, store, [ranges[i] for i in run])
        parts |= {i: (future, place) for place, i in enumerate(run)}
    try:
        for i in range(len(ranges)):
            future, place = parts.pop(i)  # a run is let go with its last clip
            yield future.result()[place]
    finally:  # whoever stops asking wants no more of it
        for future, _ in parts.values():
            future.cancel()


def _runs(ranges: Sequence[Range]) -> list[list[int]]:
    """Indices of ranges that are read together, in the order in which each run is first needed."""
    runs: list[list[int]] = []
    end = 0  # of the last run
    for i in sorted(range(len(ranges)), key=lambda i: (ranges[i].shard, ranges[i].offset)):
        here = ranges[i]
        if runs:
            first = ranges[runs[-1][0]]
            is_near = here.offset - end <= MAX_GAP_BYTES
            length = max(end, here.offset + here.size_bytes) - first.offset
            if here.shard == first.shard and is_near and length <= MAX_RUN_BYTES:
                runs[-1].append(i)
                end = first.offset + length
                continue
        runs.append([i])
        end = here.offset + here.size_bytes
    return sorted(runs, key=min)


def _read_run(store: Store, run: Sequence[Range]) -> list[_Part]:
    """Ranges of one object that lie near each other; where it is too short, each by itself."""
    start = run[0].offset
    end = max(part.offset + part.size_bytes for part in run)
    try:
        where, name = store.at(run[0].shard)
        block = memoryview(where.read_range(name, start, end - start))
    except FileNotFoundError as error:
        return [error] * len(run)
    except EOFError as error:
        return [error] if len(run) == 1 else [_read_run(store, [part])[0] for part in run]
    return [bytes(block[p.offset - start :][: p.size_bytes]) for p in run]


@functools.lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(IN_FLIGHT, "fetch")
