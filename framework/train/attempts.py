"""Start the workers as often as it takes: after a death, on fewer nodes, on more, never for a bug.

An attempt is one group of workers of a fixed number, started by Ray Train. It ends because all
steps are done, because the run is stopped, because the workers were asked to leave (nodes come or
go), or because something died. Ray Train's own restarts and elasticity are not used: they retry a
user's errors as well, resize without a checkpoint, and wait for nodes that are dead until a
time-out (both seen in 2.60).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from ray.train.v2.api.exceptions import TrainingFailedError

from framework.checkpoint import Checkpoints
from framework.cluster import ClusterConfig, leaving_nodes, room
from framework.storage import Store
from framework.train.failures import Patience
from framework.train.fence import Fence, begin_attempt
from framework.train.progress import Interrupts, Line, Stopped, follow, make_board

LOOK_EVERY_S = 2.0  # at the cluster's nodes


@dataclass
class Attempts:
    """Drives a run to its last step.

    `fit(num_workers, fence, restarts, board)` starts one group of workers and returns when it has
    ended; `check` is called every second, and raises what makes the run impossible.
    """

    run: Store
    cluster: ClusterConfig
    num_steps: int
    show: Callable[[Line], None]
    check: Callable[[], None]
    fit: Callable[[int, Fence, int, Any], object]
    _patience: Patience = field(init=False)
    _gone: frozenset[str] = frozenset()  # nodes that are to be left

    def __post_init__(self) -> None:
        self._patience = Patience(self.cluster.max_failures)

    def to_the_end(self) -> None:
        """Return when the last step is committed.

        ValueError for what no further attempt would change; SystemExit, with its cause, after too
        many failures in a row, or when there is no room for the workers; Stopped where Ctrl-C or
        SIGTERM ended it.
        """
        with Interrupts() as interrupts:
            for restarts in count():
                num_workers = self._wait_for_room(interrupts)
                if self._attempt(num_workers, restarts, interrupts):
                    return

    def _attempt(self, num_workers: int, restarts: int, interrupts: Interrupts) -> bool:
        """Whether the run is done."""
        board = make_board()
        fence = begin_attempt(self.run, num_workers)
        watch = _NodeWatch(self.cluster, num_workers, self._gone)

        def wish() -> str:
            self.check()
            return watch.wish()

        died: TrainingFailedError | None = None
        try:
            follow(
                board,
                lambda: self.fit(num_workers, fence, restarts, board),
                self.show,
                interrupts,
                wish,
            )
        except TrainingFailedError as error:
            died = error
        self._gone = watch.gone
        refusal, left = ray.get([board.refusal.remote(), board.left.remote()])
        ray.kill(board)
        if refusal:
            raise ValueError(refusal) from died
        committed = self._committed()
        if committed == self.num_steps:
            return True
        if interrupts.count:
            at = f"at step {committed}, committed" if committed else "before its first step"
            raise Stopped(f"stopped {at}; the same command goes on with it")
        if died is None or left:
            why = left or "the workers left"
            self.show({"text": f"{why}; step {committed} is committed, starting again"})
            return False
        if self._patience.is_over(committed):
            raise SystemExit(
                f"training failed in {self.run.url}, {self._patience.count} times in a row without "
                f"a checkpoint between (cluster.max_failures={self.cluster.max_failures}): {died}"
            ) from died
        self.show(
            {
                "text": f"{_first_words(died)}; starting again from step {committed} (failure "
                f"{self._patience.count} of {self.cluster.max_failures} allowed in a row)"
            }
        )
        return False

    def _committed(self) -> int:
        return (Checkpoints(self.run.child("checkpoints")).committed_steps() or [0])[-1]

    def _wait_for_room(self, interrupts: Interrupts) -> int:
        """The number of workers to start; SystemExit where there is no room for the fewest."""
        fewest, told = self.cluster.min_workers, -1
        deadline = time.monotonic() + self.cluster.wait_for_room_s
        while True:
            self._gone |= leaving_nodes()
            has = room(self.cluster, self._gone)
            if has >= fewest:
                return has
            if interrupts.count:
                raise Stopped("stopped while waiting for nodes; the same command goes on with it")
            self.check()
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{self.run.url}: no room for {fewest} workers in {self.cluster.wait_for_room_s:g} "
                    f"s, only for {has}; add nodes, or let it go on with fewer by "
                    f"cluster.num_workers=[{max(has, 1)},{self.cluster.max_workers}]"
                )
            if told != has:
                told = has
                self.show({"text": f"waiting for nodes: room for {has} workers, {fewest} needed"})
            time.sleep(1.0)


class _NodeWatch:
    """Whether the workers should leave, for nodes that go or come."""

    def __init__(self, cluster: ClusterConfig, num_workers: int, gone: frozenset[str]) -> None:
        self._cluster, self._num_workers = cluster, num_workers
        self.gone = gone
        self._began = self._looked = time.monotonic()

    def wish(self) -> str:
        """Why to leave; empty while there is no reason."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return ""
        self._looked = now
        if new := leaving_nodes() - self.gone:
            self.gone |= new
            if len(ray.nodes()) > 1:
                return f"a node is being drained ({', '.join(sorted(n[:8] for n in new))})"
        may_grow = now - self._began >= self._cluster.grow_after_s
        if may_grow and (has := room(self._cluster, self.gone)) > self._num_workers:
            return f"there is room for {has} workers now, {self._num_workers} train"
        return ""


def _first_words(error: TrainingFailedError, limit: int = 200) -> str:
    """Who died of what, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, cause = min(failures.items())
        ranks = f"rank {rank}" if len(failures) == 1 else f"{len(failures)} ranks"
        text = f"{ranks} failed: {_last_line(str(cause)) or type(cause).__name__}"
    else:
        text = _last_line(str(error))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""
