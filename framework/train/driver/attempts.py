"""Start the workers as often as it takes: after a death, on fewer nodes, on more, never for a bug.

An attempt is one group of workers of a fixed number, started by Ray Train. It ends because all
steps are done, because the run is stopped, because the workers were asked to leave (nodes come or
go), or because something died. Ray Train's own restarts and elasticity are not used: they retry a
user's errors as well, resize without a checkpoint, and wait for nodes that are dead until a
time-out (both seen in 2.60).
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.train import ControllerError, TrainingFailedError

from framework.cluster import ClusterConfig, leaving_nodes, room
from framework.run.checkpoint import Checkpoints
from framework.run.fence import Fence, Superseded, begin_attempt
from framework.storage import Store
from framework.terminal import Show
from framework.train.driver.follow import Interrupts, Stopped, follow
from framework.train.mailbox import NO_ROOM, make_mailbox

LOOK_EVERY_S = 2.0  # at the cluster's nodes


@dataclass
class Attempts:
    """Drives a run to its last step.

    `fit(num_workers, fence, restarts, mailbox)` starts one group of workers and returns when it has
    ended; `check` is called every second, and raises what makes the run impossible.
    """

    run: Store
    cluster: ClusterConfig
    num_steps: int
    show: Show
    check: Callable[[], None]
    fit: Callable[[int, Fence, int, ActorHandle], object]
    _fence: Fence | None = None
    _gone: frozenset[str] = frozenset()  # nodes that are to be left
    # Nodes on which a group of so many workers, and no more, may start: others had no room.
    _cap: tuple[frozenset[str], int] | None = None

    def __post_init__(self) -> None:
        self._patience = Patience(self.cluster.max_failures)
        self._committed = self._latest_step()

    def is_newest(self) -> bool:
        """Whether no other driver has begun an attempt since."""
        if self._fence is None:
            return True
        try:
            self._fence.check()
        except (Superseded, OSError):
            return False
        return True

    def run_until_done(self) -> None:
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
        mailbox = make_mailbox()
        fence = self._fence = begin_attempt(self.run, num_workers)
        watch = _NodeWatch(self.cluster, num_workers, self._gone, self._room)

        def why_leave() -> str:
            self.check()
            return watch.why_leave()

        died: Exception | None = None
        refusal, left = None, ""
        try:
            follow(
                mailbox,
                lambda: self.fit(num_workers, fence, restarts, mailbox),
                self.show,
                interrupts,
                why_leave,
            )
        except (TrainingFailedError, RayError) as error:
            died = error
        self._gone = watch.gone
        with contextlib.suppress(RayError):
            refusal, left = ray.get([mailbox.refusal.remote(), mailbox.left.remote()], timeout=60)
        ray.kill(mailbox)
        if refusal:
            raise ValueError(refusal) from died
        before, self._committed = self._committed, self._latest_step()
        if self._committed == self.num_steps:
            return True
        if interrupts.count:
            at = f"at step {self._committed}, committed" if self._committed else "before step 1"
            raise Stopped(f"stopped {at}; the same command goes on with it")
        if died is None and self._committed > before:
            self.show({"text": f"{left}; step {self._committed} is committed, starting again"})
            return False
        if isinstance(died, ControllerError) and self.cluster.min_workers < num_workers:
            self._cap = (_standing_nodes(), max(self.cluster.min_workers, num_workers // 2))
        words = _first_words(died) if died is not None else left or "the workers left"
        if self._patience.is_over(self._committed):
            raise SystemExit(
                f"training failed in {self.run.url}, {self._patience.count} times in a row without "
                f"a checkpoint between (cluster.max_failures={self.cluster.max_failures}): "
                f"{died or words}"
            ) from died
        self.show(
            {
                "text": f"{words}; starting again from step {self._committed} (failure "
                f"{self._patience.count} of {self.cluster.max_failures} allowed in a row)"
            }
        )
        return False

    def _latest_step(self) -> int:
        latest = Checkpoints(self.run.child("checkpoints")).latest()
        return latest.step if latest is not None else 0

    def _room(self) -> int:
        """For how many workers there is room, as far as is known."""
        has = room(self.cluster, self._gone)
        if self._cap is not None and self._cap[0] == _standing_nodes():
            return min(has, self._cap[1])
        return has

    def _wait_for_room(self, interrupts: Interrupts) -> int:
        """The number of workers to start; SystemExit where there is no room for the fewest."""
        fewest, told = self.cluster.min_workers, -1
        patience_s = self.cluster.wait_for_room_s
        deadline = time.monotonic() + patience_s
        while True:
            self._gone |= leaving_nodes()
            has = self._room()
            if has >= fewest:
                return has
            if interrupts.count:
                raise Stopped("stopped while waiting for nodes; the same command goes on with it")
            self.check()
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{self.run.url}: no room for {fewest} workers in {patience_s:g} s, only for "
                    f"{has}; add nodes, or let it go on with fewer by "
                    f"cluster.num_workers=[{max(has, 1)},{self.cluster.max_workers}]"
                )
            if told != has:
                told = has
                self.show({"text": f"waiting for nodes: room for {has} workers, {fewest} needed"})
            time.sleep(1.0)  # Ray tells nobody when a node joins


class Patience:
    """Counts failures in a row: a checkpoint between two of them starts the count anew."""

    def __init__(self, max_failures: int) -> None:
        self._max_failures = max_failures
        self._committed: int | None = None
        self.count = 0

    def is_over(self, committed: int) -> bool:
        """Take one more failure, with `committed` steps in the store; whether to give up."""
        self.count = (
            1 if self._committed is not None and committed > self._committed else (self.count + 1)
        )
        self._committed = committed
        return self.count > self._max_failures


class _NodeWatch:
    """Whether the workers should leave, for nodes that go or come."""

    def __init__(
        self,
        cluster: ClusterConfig,
        num_workers: int,
        gone: frozenset[str],
        room_now: Callable[[], int],
    ) -> None:
        self._cluster, self._num_workers, self._room_now = cluster, num_workers, room_now
        self.gone = gone
        self._looked = time.monotonic()
        self._seen = num_workers  # room for so many, since then
        self._since = self._looked

    def why_leave(self) -> str:
        """Why to leave; empty while there is no reason, or the head cannot be asked."""
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return ""
        self._looked = now
        with contextlib.suppress(RayError):
            if new := leaving_nodes() - self.gone:
                self.gone |= new
                return f"a node is being drained ({', '.join(sorted(n[:8] for n in new))})"
            if (has := self._room_now()) != self._seen:
                self._seen, self._since = has, now
            if has < self._num_workers:
                return f"{NO_ROOM} for {self._num_workers} workers any more, only for {has}"
            # Nodes come one by one: wait until there are no more.
            if has > self._num_workers and now - self._since >= self._cluster.grow_after_s:
                return f"there is room for {has} workers now, {self._num_workers} train"
        return ""


def _standing_nodes() -> frozenset[str]:
    return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])


def _first_words(error: Exception, limit: int = 200) -> str:
    """Who died of what, in one line."""
    failures = dict(getattr(error, "worker_failures", {}))
    # The others only miss the one that died.
    dead = {rank: cause for rank, cause in failures.items() if _has_died(cause)}
    if dead:
        text = f"{_ranks(dead)} died: {_exit_detail(str(min(dead.items())[1]))}"
    elif failures:
        cause = min(failures.items())[1]
        text = f"{_ranks(failures)} failed: {_last_line(str(cause)) or type(cause).__name__}"
    else:
        text = _last_line(str(error))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _ranks(failures: Iterable[int]) -> str:
    ranks = sorted(failures)
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _has_died(error: Exception) -> bool:
    return isinstance(getattr(error, "health_check_failure", error), RayActorError)


def _exit_detail(text: str) -> str:
    """Why a process is gone, as far as Ray knows, from what it says of an actor that died."""
    detail = text.rpartition("Worker exit detail: ")[2].strip()
    if detail.startswith("Worker unexpectedly exits"):  # and then Ray guesses, as we do
        return "its process was killed, or crashed; its log, or the system's, may say more"
    return _last_line(detail)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else ""
