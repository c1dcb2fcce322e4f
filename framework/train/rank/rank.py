"""One rank of a run: what it was given, its place among the others, how they agree."""

import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from ray.actor import ActorHandle
from torch import distributed

from framework.assembly import Assembly
from framework.data.config import StreamConfig
from framework.data.plan.store import Plan
from framework.run.checkpoint import Checkpoint, Checkpoints
from framework.run.fence import Fence
from framework.run.identity import Identity
from framework.run.logs import RunLog
from framework.storage import Store
from framework.train.config import TrainConfig

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerArgs:
    """All that a rank needs, picklable; made once an attempt by the driver."""

    assembly: Assembly
    train: TrainConfig
    optimizer: Any
    engine: Any
    tracking: Any
    stream: StreamConfig
    run_url: str
    run_name: str
    plan_digest: str
    shards_url: str
    first_shard: str
    identity: Identity  # kept in each checkpoint
    code_version: str
    threads: int
    profile: bool
    fence: Fence
    restarts: int  # of this driver, before this attempt
    session_began: float  # when this driver began, in seconds since 1970
    board: ActorHandle


@dataclass(frozen=True)
class Rank:
    """This worker: its place among the others, and what it works on."""

    args: WorkerArgs
    number: int
    dp_size: int
    device: torch.device
    store: Store  # the run's folder
    plan: Plan
    checkpoints: Checkpoints
    log: RunLog

    @property
    def is_first(self) -> bool:
        """Whether it is rank 0, which speaks for all."""
        return self.number == 0

    def tell(self, line: dict[str, Any]) -> None:
        """Show a line on the driver's terminal, once for all ranks."""
        if self.is_first:
            self.args.board.tell.remote(line)

    def first_says(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank: two listings of a store may differ. A collective."""
        found = [find() if self.is_first else None]
        if self.dp_size > 1:
            distributed.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]

    def everyone(self, mine: T) -> list[T]:
        """What each rank has, by rank. A collective."""
        return everyone(mine, self.dp_size)

    def report_hang(self, stacks: str) -> None:
        """Keep the stacks of this rank's threads with the run."""
        name = f"hangs/attempt-{self.args.fence.number:04d}/rank-{self.number:05d}.txt"
        timeout_s = self.args.train.hang_timeout_s
        print(f"no step ended for {timeout_s:g} s; this rank stands at:\n{stacks}", flush=True)
        text = f"{self.store.url}/{name}: rank {self.number} ended no step for {timeout_s:g} s"
        self.args.board.tell.remote({"text": text})
        try:
            self.store.write(name, stacks.encode())
            self.log.save()
        except OSError:  # it may be the store that hangs
            traceback.print_exc()

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, each rank reading its share of the files. A collective.

        One that is torn or altered is refused and marked so, and the run says so. ValueError where
        there were some and none is whole.
        """
        steps = self.first_says(self.checkpoints.committed_steps)
        for step in reversed(steps):
            found, problem = self._look_at(step, (self.number, self.dp_size))
            problems = [text for text in self.everyone(problem) if text]
            if not problems:
                return found
            # A machine without the shared folder must not have its say on what is in it.
            own = self.first_says(partial(self._problem, step))
            if not own:
                raise OSError(f"rank 0 finds it whole, another rank does not: {problems[0]}")
            self.tell({"text": f"checkpoint refused: {own}; taking the one before"})
            if self.is_first:
                self.args.fence.check()
                self.checkpoints.refuse(step, own)
        if steps:
            raise ValueError(
                f"none of the checkpoints in {self.checkpoints.store.url} is whole; put one back, "
                "or start over by run.fresh=true"
            )
        return None

    def _problem(self, step: int) -> str:
        return self._look_at(step, (0, 1))[1]

    def _look_at(self, step: int, share: tuple[int, int]) -> tuple[Checkpoint | None, str]:
        """A checkpoint of which this share of the files is whole, or what is wrong with it."""
        try:
            return self.checkpoints.get(step, share), ""
        except ValueError as error:
            return None, f"{error} (seen from {platform.node()})"


def everyone(mine: T, dp_size: int) -> list[T]:
    """What each rank has, by rank. A collective."""
    if dp_size == 1:
        return [mine]
    gathered: list[Any] = [None] * dp_size
    distributed.all_gather_object(gathered, mine)
    return gathered
