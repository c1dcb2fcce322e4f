"""Checkpoints of a run in training: copied at once, written beside the next steps, then committed.

Training stands still only for the copy of its state into memory. A thread writes it, and does its
collectives on the engine's own process group. What went wrong on one rank is known to all, so that
they go on alike.

Invariant: rank 0 sets the marker after every rank has written, and only while this attempt is the
run's newest.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import distributed

from framework.checkpoint import Checkpoints
from framework.storage import Store, is_transient
from framework.train.engine import Engine, Snapshot
from framework.train.fence import Fence
from framework.train.report import Reporter, Segment, clear_segments

MAX_FAILED_SAVES = 3  # in a row; chosen by hand


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written, or was not: then `errors` says why, of every rank alike."""

    step: int
    write_s: float
    segment: Segment
    errors: list[BaseException]


class Committer:
    """Saves an engine's state, one checkpoint at a time; all ranks call it alike."""

    def __init__(
        self,
        run: Store,
        engine: Engine,
        reporter: Reporter,
        fence: Fence,
        *,
        rank: int,
        dp_size: int,
        keep: int,
        milestone_every: int,
        extra_files: Callable[[], dict[str, bytes]],
        on_end: Callable[[Saved], None],
    ) -> None:
        """`extra_files`: what rank 0 writes into the run's folder with each checkpoint. `on_end` is
        called in the caller's thread when a save has ended, one way or the other."""
        self._run, self._checkpoints = run, Checkpoints(run.child("checkpoints"))
        self._engine, self._reporter, self._fence = engine, reporter, fence
        self._rank, self._dp_size = rank, dp_size
        self._keep, self._milestone_every = keep, milestone_every
        self._extra_files, self._on_end = extra_files, on_end
        self._thread = ThreadPoolExecutor(1, "commit")
        self._pending: Future[Saved] | None = None
        self._failed = 0

    def save(self, step: int, meta: Callable[[], dict[str, Any]]) -> float:
        """Begin the checkpoint of `step`; the seconds that training stood still for it.

        Waits for the one before it. Raises what made too many saves in a row fail, or will go on
        doing so (a full disk, access denied).
        """
        began = time.perf_counter()
        self.wait()
        segment = self._reporter.take_segment()
        snapshot, meta_now = self._engine.snapshot(), meta()
        self._pending = self._thread.submit(self._write, step, snapshot, segment, meta_now)
        return time.perf_counter() - began

    def poll(self) -> None:
        """Take note of a save that has ended; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        saved = pending.result()
        self._on_end(saved)
        if not saved.errors:
            self._failed = 0
            return saved
        self._failed += 1
        self._reporter.give_back(saved.segment)
        first = saved.errors[0]
        may_end = isinstance(first, OSError) and is_transient(first)
        if not may_end or self._failed >= MAX_FAILED_SAVES:
            raise first
        return saved

    def finish(self, step: int, meta: Callable[[], dict[str, Any]]) -> None:
        """Save `step` and see it committed; raises where it was not."""
        self.save(step, meta)
        saved = self.wait()
        assert saved is not None
        if saved.errors:
            raise saved.errors[0]

    def close(self) -> None:
        """Write nothing more; a save under way is left to itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(
        self, step: int, snapshot: Snapshot, segment: Segment, meta: dict[str, Any]
    ) -> Saved:
        began = time.perf_counter()
        folder = self._checkpoints.folder(step)

        def begin() -> None:
            self._fence.check()
            self._checkpoints.begin(step)
            clear_segments(self._run, step)

        def write() -> None:
            segment.write(self._run, step, self._rank)

        def commit() -> None:
            for name, data in self._extra_files().items():
                self._run.write(name, data)
            self._fence.check()
            self._checkpoints.commit(step, meta)
            self._checkpoints.retain(self._keep, self._milestone_every)

        def state() -> None:
            snapshot.write(folder, self._fence.attempt)

        # In turn, each after all ranks have ended the one before.
        phases = ((begin, True), (state, False), (write, False), (commit, True))
        errors: list[BaseException] = []
        for action, only_first in phases:
            if not errors:
                errors = self._together(action if self._rank == 0 or not only_first else None)
        snapshot.drop()
        return Saved(step, time.perf_counter() - began, segment, errors)

    def _together(self, action: Callable[[], None] | None) -> list[BaseException]:
        """Do it, and hear how the others fared: what was raised on any rank, on each."""
        error: BaseException | None = None
        try:
            if action is not None:
                action()
        except Exception as raised:
            error = _plain(raised)
        if self._dp_size == 1:
            return [] if error is None else [error]
        found: list[Any] = [None] * self._dp_size
        distributed.all_gather_object(found, error, group=self._engine.group)
        return [error for error in found if error is not None]


def _plain(error: BaseException) -> BaseException:
    """What torch's checkpoint wraps, taken out; without a traceback, to travel between ranks."""
    failures = getattr(error, "failures", None)
    if failures:  # CheckpointException: rank -> (exception, traceback)
        error = next(iter(failures.values()))[0]
    return error.with_traceback(None)
