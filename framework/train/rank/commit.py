"""Checkpoints of a run in training: copied at once, written beside the next steps, then committed.

Training stands still only for the copy of its state into memory. A thread writes it, and does its
collectives on the engine's own process group. What went wrong on one rank is known to all, so that
they go on alike.

Invariant: rank 0 sets the marker after every rank has written, and only while this attempt is the
run's newest.
"""

import contextlib
import time
import traceback
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import distributed

from framework.run.checkpoint import Checkpoints
from framework.run.fence import Fence
from framework.run.ledger import Segment, clear_segments
from framework.run.sharded_state import RanksFailed
from framework.storage import Store
from framework.train.engine.protocol import Engine
from framework.train.engine.snapshot import Snapshot
from framework.train.observers.report import Reporter
from framework.train.rank.failures import SaveFailed, may_pass

MAX_FAILED_SAVES = 3  # in a row; chosen by hand


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written, or was not: then `error` says why, on every rank alike."""

    step: int
    write_s: float
    segment: Segment
    error: SaveFailed | None


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
        beat: Callable[[], None],
    ) -> None:
        """`extra_files`: what this rank writes into the run's folder with each checkpoint. `on_end`
        is called in the caller's thread when a save has ended, one way or the other; `beat` while
        that thread waits for one."""
        self._run, self._checkpoints = run, Checkpoints(run.child("checkpoints"))
        self._engine, self._reporter, self._fence = engine, reporter, fence
        self._rank, self._dp_size = rank, dp_size
        self._keep, self._milestone_every = keep, milestone_every
        self._extra_files, self._on_end, self._beat = extra_files, on_end, beat
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
        while not pending.done():
            self._beat()  # a slow store is no hang
            futures.wait([pending], timeout=1.0)
        saved = pending.result()
        self._on_end(saved)
        if saved.error is None:
            self._failed = 0
            return saved
        self._failed += 1
        self._reporter.give_back(saved.segment)
        if not saved.error.passing or self._failed >= MAX_FAILED_SAVES:
            raise saved.error
        return saved

    def finish(self, step: int, meta: Callable[[], dict[str, Any]]) -> None:
        """Save `step` and see it committed; raises where it was not."""
        self.save(step, meta)
        saved = self.wait()
        assert saved is not None
        if saved.error is not None:
            raise saved.error

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

        def state() -> None:
            snapshot.write(folder, self._fence.attempt)

        def write() -> None:
            segment.write(self._run, step, self._rank)
            for name, data in self._extra_files().items():
                self._run.write(name, data)

        def commit() -> None:
            self._fence.check()
            self._checkpoints.commit(step, meta)

        def retain() -> None:
            with contextlib.suppress(OSError):  # the next time is as good
                self._checkpoints.retain(self._keep, self._milestone_every)

        # In turn, each after all ranks have ended the one before.
        phases = ((begin, True), (state, False), (write, False), (commit, True))
        error: SaveFailed | None = None
        for action, only_first in phases:
            if error is None:
                error = self._together(action if self._rank == 0 or not only_first else None)
        snapshot.drop()
        if error is None and self._rank == 0:
            retain()
        return Saved(step, time.perf_counter() - began, segment, error)

    def _together(self, action: Callable[[], None] | None) -> SaveFailed | None:
        """Do it, and hear how the others fared: the first rank's trouble, on each rank."""
        mine: tuple[str, bool] | None = None
        try:
            if action is not None:
                action()
        except Exception as error:
            traceback.print_exc()
            mine = (self._words(error), may_pass(error))
        found: list[Any] = [mine] * self._dp_size
        if self._dp_size > 1:
            distributed.all_gather_object(found, mine, group=self._engine.group)
        failed = [told for told in found if told is not None]
        if not failed:
            return None
        return SaveFailed(failed[0][0], all(passing for _, passing in failed))

    def _words(self, error: Exception) -> str:
        """The error, and on which rank; all ranks have heard already of what failed together."""
        if isinstance(error, RanksFailed):
            return str(error)
        return f"rank {self._rank}: {type(error).__name__}: {error}"
