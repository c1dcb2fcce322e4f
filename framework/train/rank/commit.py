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
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import distributed

from framework.run.checkpoint import Checkpoints
from framework.run.fence import Fence
from framework.run.sharded_state import RanksFailed
from framework.train.engine.protocol import Engine
from framework.train.engine.snapshot import Snapshot
from framework.train.observers.observer import Kept, Saved
from framework.train.rank.failures import SaveFailed, is_retryable

MAX_FAILED_SAVES = 3  # in a row; chosen by hand


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay, see `Checkpoints.retain`."""

    keep_last: int
    milestones_every: int = 0


class Committer:
    """Saves an engine's state, one checkpoint at a time; all ranks call it alike."""

    def __init__(
        self,
        engine: Engine,
        fence: Fence,
        retention: Retention,
        *,
        dp_rank: int,
        dp_size: int,
        beat: Callable[[], None],
    ) -> None:
        """Into the run that `fence` gives the right to; `beat` is called during waits."""
        self._engine, self._fence, self._run = engine, fence, fence.run
        self._checkpoints = Checkpoints(self._run.child("checkpoints"))
        self._retention, self._beat = retention, beat
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._thread = ThreadPoolExecutor(1, "commit")
        self._pending: Future[Saved] | None = None
        self._failed = 0

    def begin(self, steps_done: int, meta: Mapping[str, Any], kept: Sequence[Kept]) -> None:
        """Copy the state after so many steps, and write it with `kept` from now on.

        `meta`: for the checkpoint's meta.json, beside what `kept` has for it. The save before this
        one has been waited for.
        """
        assert self._pending is None, "wait for the save under way"
        snapshot = self._engine.snapshot()
        self._pending = self._thread.submit(self._write, steps_done, snapshot, meta, kept)

    def poll(self) -> Saved | None:
        """The save that has ended meanwhile, if one has; never waits."""
        is_over = self._pending is not None and self._pending.done()
        return self.wait() if is_over else None

    def wait(self) -> Saved | None:
        """Wait for the save under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is None:
            return None
        while not pending.done():
            self._beat()  # a slow store is no hang
            futures.wait([pending], timeout=1.0)
        saved = pending.result()
        self._failed = self._failed + 1 if saved.error is not None else 0
        return saved

    def check(self, saved: Saved) -> None:
        """Raise what made too many saves in a row fail, or will go on doing so (a full disk)."""
        error = saved.error
        if isinstance(error, SaveFailed):
            if not error.is_retryable or self._failed >= MAX_FAILED_SAVES:
                raise error
        elif error is not None:
            raise error

    def close(self) -> None:
        """Write nothing more; a save under way is left to itself."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _write(
        self, steps_done: int, snapshot: Snapshot, meta: Mapping[str, Any], kept: Sequence[Kept]
    ) -> Saved:
        began = time.perf_counter()
        checkpoints, run = self._checkpoints, self._run

        def begin() -> None:
            self._fence.check()
            checkpoints.begin(steps_done)
            for one in kept:
                for folder in one.folders:
                    run.delete_folder(folder)

        def state() -> None:
            snapshot.write(checkpoints.folder(steps_done), self._fence.attempt)

        def files() -> None:
            for one in kept:
                for name, read in one.files.items():
                    run.write(name, read())
                for name, read in one.spare_files.items():
                    with contextlib.suppress(OSError):
                        run.write(name, read())

        def commit() -> None:
            self._fence.check()
            all_meta = dict(meta)
            for one in kept:
                all_meta |= one.meta
            checkpoints.commit(steps_done, all_meta)

        # In turn, each after all ranks have ended the one before.
        phases = ((begin, True), (state, False), (files, False), (commit, True))
        error: SaveFailed | None = None
        for action, only_first in phases:
            if error is None:
                error = self._together(action if self._dp_rank == 0 or not only_first else None)
        snapshot.drop()
        if error is None and self._dp_rank == 0:
            with contextlib.suppress(OSError):  # the next time is as good
                checkpoints.retain(self._retention.keep_last, self._retention.milestones_every)
        return Saved(steps_done, time.perf_counter() - began, error)

    def _together(self, action: Callable[[], None] | None) -> SaveFailed | None:
        """Do it, and hear how the others fared: the first rank's trouble, on each rank."""
        mine: tuple[str, bool] | None = None
        try:
            if action is not None:
                action()
        except Exception as error:
            traceback.print_exc()
            mine = (self._words(error), is_retryable(error))
        found: list[Any] = [mine] * self._dp_size
        if self._dp_size > 1:
            distributed.all_gather_object(found, mine, group=self._engine.group)
        failed = [told for told in found if told is not None]
        if not failed:
            return None
        return SaveFailed(failed[0][0], all(retryable for _, retryable in failed))

    def _words(self, error: Exception) -> str:
        """The error, and on which rank; all ranks have heard already of what failed together."""
        if isinstance(error, RanksFailed):
            return str(error)
        return f"rank {self._dp_rank}: {type(error).__name__}: {error}"
