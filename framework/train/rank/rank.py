"""One rank of a run: what it was given, its place among the others, how they agree."""

import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from ray.actor import ActorHandle
from torch import distributed

from framework.data.plan.store import Plan
from framework.run.checkpoint import Checkpoint, Checkpoints
from framework.run.fence import Fence
from framework.run.logs import RunLog
from framework.storage import TRAINING, Store
from framework.terminal import Line
from framework.train.collectives import all_gather
from framework.train.job import Job

T = TypeVar("T")


@dataclass(frozen=True)
class WorkerArgs:
    """All that a rank needs, picklable; made once an attempt by the driver."""

    job: Job
    plan_digest: str
    shards_url: str
    first_shard: str
    code_version: str
    fence: Fence
    restarts: int  # of this driver, before this attempt
    session_began: float  # when this driver began, in seconds since 1970
    mailbox: ActorHandle


@dataclass(frozen=True)
class Rank:
    """This worker: its place among the others, and what it works on."""

    args: WorkerArgs
    dp_rank: int
    dp_size: int
    device: torch.device
    store: Store  # the run's folder
    plan: Plan
    checkpoints: Checkpoints
    log: RunLog

    @property
    def job(self) -> Job:
        """The configs of the run."""
        return self.args.job

    @property
    def is_first(self) -> bool:
        """Whether it is rank 0, which speaks for all."""
        return self.dp_rank == 0

    def tell(self, line: Line) -> None:
        """Show a line on the driver's terminal, once for all ranks."""
        if self.is_first:
            self.args.mailbox.tell.remote(line)

    def from_rank_0(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on every rank: two listings of a store may differ. A collective."""
        found = [find() if self.is_first else None]
        if self.dp_size > 1:
            distributed.broadcast_object_list(found)
        return found[0]  # type: ignore[return-value]

    def report_hang(self, stacks: str) -> None:
        """Keep the stacks of this rank's threads with the run."""
        name = f"hangs/attempt-{self.args.fence.number:04d}/rank-{self.dp_rank:05d}.txt"
        timeout_s = self.job.train.hang_timeout_s
        print(f"no step ended for {timeout_s:g} s; this rank stands at:\n{stacks}", flush=True)
        text = f"{self.store.url}/{name}: rank {self.dp_rank} ended no step for {timeout_s:g} s"
        self.args.mailbox.tell.remote({"text": text})
        try:
            self.store.with_retry(TRAINING).write(name, stacks.encode())
            self.log.save()
        except OSError:  # it may be the store that hangs
            traceback.print_exc()

    def latest_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, each rank reading its share of the files. A collective.

        One that is torn or altered is refused and marked so, and the run says so. ValueError where
        there were some and none is whole.
        """
        steps = self.from_rank_0(self.checkpoints.committed_steps)
        for step in reversed(steps):
            found, problem = self._look_at(step, (self.dp_rank, self.dp_size))
            problems = [text for text in all_gather(problem, self.dp_size) if text]
            if not problems:
                return found
            # A machine without the shared folder must not have its say on what is in it.
            own = self.from_rank_0(partial(self._problem, step))
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
