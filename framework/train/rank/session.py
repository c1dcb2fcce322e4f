"""A rank's training from one checkpoint on: to the last step, a request to leave, or a roll-back.

The session owns the order of things: a step is judged before its update, observers hear of it
after, then a window or a checkpoint may be due. What they make of it is theirs.
"""

import json
import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from framework.batch import PackedBatch
from framework.objectives.objective import Objective
from framework.run.checkpoint import Checkpoint
from framework.storage import Store
from framework.train.engine.protocol import Engine
from framework.train.guard import Guard
from framework.train.loop import StepInput, StepOutput, train
from framework.train.observers.observer import Observer, Saved, end_all
from framework.train.rank.commit import Committer, Retention
from framework.train.rank.leave_request import LeaveRequest
from framework.train.rank.notice import noticed
from framework.train.rank.prefetch import Prefetch
from framework.train.rank.rank import Rank
from framework.train.rank.watchdog import Watchdog

_LEFT_OUT = "left-out-steps.json"


def read_left_out(run: Store) -> list[int]:
    """Steps that the run goes on without, after a roll-back."""
    return list(json.loads(run.read(_LEFT_OUT))) if run.exists(_LEFT_OUT) else []


def step_inputs(
    rank: Rank,
    objective: Objective,
    stream: Iterator[list[PackedBatch]],
    start: int,
    left_out: Collection[int],
) -> Iterator[StepInput]:
    """The stream's steps, which begin at `start`, with their random draws; runs in a thread.

    `left_out`: of `read_left_out`, as rank 0 sees it.
    """
    seed = rank.job.assembly.seed
    for step, batches in enumerate(stream, start):
        epoch, epoch_step = rank.plan.locate(step)
        totals = rank.plan.totals(epoch, epoch_step)
        yield StepInput(
            step=step,
            epoch=epoch,
            epoch_step=epoch_step,
            num_averaged=totals.averaged_over(objective.averaged_over),
            tokens=totals.tokens,
            packs=[(batch, objective.draw(batch, seed, step)) for batch in batches],
            leave_out=step in left_out,
        )


class _RollBack(Exception):
    """Training is to go on from the last checkpoint, without this step."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step, self.loss = step, loss


class Session:
    """Trains and commits; every rank runs one, with the same calls in the same order."""

    def __init__(
        self,
        rank: Rank,
        engine: Engine,
        objective: Objective,
        observers: list[Observer],
        watchdog: Watchdog,
        latest: Checkpoint | None,
    ) -> None:
        """`latest`: the checkpoint that `engine` was loaded from, if there was one."""
        config = rank.job.train
        self.rank, self.engine, self.objective = rank, engine, objective
        self.observers, self.watchdog = observers, watchdog
        self.guard = Guard(config.guard, latest.meta.get("guard") if latest is not None else None)
        self.committer = Committer(
            engine,
            rank.args.fence,
            Retention(config.keep_checkpoints, config.milestone_every),
            dp_rank=rank.dp_rank,
            dp_size=rank.dp_size,
            beat=watchdog.beat,
        )
        self._committed = latest.step if latest is not None else None
        self._leave = ""  # why all ranks leave after this step

    def run(self, steps: Prefetch[StepInput]) -> bool:
        """Train on these steps; whether to roll back and go on."""
        rank, error = self.rank, None
        mailbox = rank.args.mailbox if rank.is_first else None
        try:
            with steps, LeaveRequest(mailbox) as self._request:
                for observer in self.observers:
                    observer.begin()
                train(
                    self.engine,
                    self.objective,
                    steps,
                    self._before_update,
                    self._after_step,
                    dp_size=rank.dp_size,
                    device=rank.device,
                )
        except _RollBack as rolled:
            self._leave_out(rolled)
            return True
        except BaseException as raised:
            error = raised
            raise
        finally:
            self.committer.close()
            end_all(self.observers, error)
        return False

    def _before_update(self, inputs: StepInput, loss_share: Tensor) -> tuple[float, str]:
        """The step's loss over all ranks, and why its update is left out; a collective.

        All ranks learn here whether one of them is to leave, so that they leave together.
        """
        why = self._request.why
        flag = torch.tensor([float(bool(why) or noticed())], dtype=torch.float64)
        summed = torch.cat([loss_share.double().view(1), flag.to(loss_share.device)])
        if self.rank.dp_size > 1:
            distributed.all_reduce(summed)
        loss, asked = summed.tolist()
        if asked:
            self._leave = why or "a rank was given notice (SIGTERM)"
        if inputs.leave_out:
            return float("nan"), "rolled back"
        verdict = self.guard.judge(loss)
        if verdict == "rollback":
            self._settle(self.committer.wait())
            if self._committed is not None:
                self.engine.skip()  # its gradient is not to meet that of another step
                raise _RollBack(inputs.step, loss)
        if verdict != "train":
            self.rank.tell({"text": f"step {inputs.step} is skipped: loss {loss:.4g} is a spike"})
            return loss, "spike"
        return loss, ""

    def _after_step(self, output: StepOutput) -> bool:
        """Whether to go on."""
        step, config = output.inputs.step, self.rank.job.train
        steps_done = step + 1
        is_last = steps_done == config.steps
        leaves = bool(self._leave) or is_last
        commits = leaves or steps_done % config.checkpoint_every == 0
        for observer in self.observers:
            observer.step(output)
        if commits or steps_done % config.log_every == 0:
            for observer in self.observers:
                observer.window()
        self.guard.learn(step, output.loss, output.skipped)
        self._settle(self.committer.poll())
        self.watchdog.beat()
        if commits:
            self._save(steps_done)
        if leaves:
            self._finish()
        if self._leave and not is_last and self.rank.is_first:
            self.rank.args.mailbox.leave.remote(self._leave)
        return not self._leave

    def _save(self, steps_done: int) -> None:
        """Begin a checkpoint, once the one before it is written."""
        began = time.perf_counter()
        self._settle(self.committer.wait())
        kept = [observer.commit(steps_done) for observer in self.observers]
        self.committer.begin(steps_done, self._meta(steps_done), kept)
        stalled_s = time.perf_counter() - began
        for observer in self.observers:
            observer.stalled(steps_done, stalled_s)

    def _finish(self) -> None:
        """See the checkpoint committed; raises where it was not."""
        saved = self.committer.wait()
        self._settle(saved)
        assert saved is not None
        if saved.error is not None:
            raise saved.error

    def _settle(self, saved: Saved | None) -> None:
        """Take note of a save that has ended."""
        if saved is None:
            return
        if saved.error is None:
            self._committed = saved.steps_done
        for observer in self.observers:
            observer.committed(saved)
        self.committer.check(saved)

    def _leave_out(self, rolled: _RollBack) -> None:
        """Write down what is to be left out, before anybody looks."""
        rank = self.rank
        count = rank.job.train.guard.rollback_steps
        assert self._committed is not None
        # Steps before the checkpoint are in its weights already.
        steps = range(max(self._committed, rolled.step - count + 1), rolled.step + 1)
        if rank.is_first:
            all_steps = sorted({*read_left_out(rank.store), *steps})
            rank.store.write(_LEFT_OUT, json.dumps(all_steps).encode())
        left_out = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        rank.tell(
            {
                "text": f"step {rolled.step} has a loss spike ({rolled.loss:.4g}): back to step "
                f"{self._committed}, and on without {left_out}"
            }
        )

    def _meta(self, steps_done: int) -> dict[str, Any]:
        args = self.rank.args
        epoch, epoch_step = self.rank.plan.locate(steps_done - 1)
        return {
            "step": steps_done,
            "epoch": epoch,
            "epoch_step": epoch_step,
            "plan_digest": args.plan_digest,
            "dp_size": self.rank.dp_size,
            "config": dict(args.job.identity.values),
            "code_version": args.code_version,
            "guard": self.guard.state(),
        }
