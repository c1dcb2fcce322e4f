"""A rank's training from one checkpoint on: to the last step, a wish to leave, or a roll-back."""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from framework.batch import PackedBatch
from framework.objectives.objective import Objective
from framework.run.checkpoint import Checkpoint
from framework.storage import Store
from framework.tracking.gauges import Gauges
from framework.tracking.tracker import Tracker
from framework.train.engine.protocol import Engine
from framework.train.loop import StepInput, StepOutput, train
from framework.train.observers.breakdown import Breakdown
from framework.train.observers.memory import memory_stats
from framework.train.observers.probe import probe
from framework.train.observers.profile import Profile
from framework.train.observers.report import Reporter, Window
from framework.train.observers.throughput import Throughput
from framework.train.rank.commit import Committer, Saved
from framework.train.rank.guard import Guard
from framework.train.rank.leave_request import Wishes
from framework.train.rank.notice import noticed
from framework.train.rank.prefetch import Prefetch
from framework.train.rank.rank import Rank
from framework.train.rank.watchdog import Watchdog
from model_zoo.flops import training_flops_per_token

_LEFT_OUT = "left-out-steps.json"


def read_left_out(run: Store) -> list[int]:
    """Steps that a roll-back has told the run to come by without."""
    return list(json.loads(run.read(_LEFT_OUT))) if run.exists(_LEFT_OUT) else []


class _RollBack(Exception):
    """Training is to go on from the last checkpoint, without this step."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(step, loss)
        self.step, self.loss = step, loss


class Session:
    """Trains, reports and commits; every rank runs one, with the same calls in the same order."""

    def __init__(
        self,
        rank: Rank,
        engine: Engine,
        watchdog: Watchdog,
        tracker: Tracker,
        latest: Checkpoint | None,
    ) -> None:
        self.rank, self.engine, self.watchdog, self.tracker = rank, engine, watchdog, tracker
        args, config = rank.args, rank.args.train
        self.start = latest.step if latest is not None else 0
        self.left_out = frozenset(rank.first_says(lambda: read_left_out(rank.store)))
        self.objective: Objective = args.assembly.build_objective()
        self.throughput = Throughput(
            time.perf_counter, peak_tflops=config.peak_tflops, num_devices=rank.dp_size
        )
        self.breakdown = Breakdown(rank.plan.sources, "cpu")
        self.guard = Guard(config.guard, latest.meta.get("guard") if latest is not None else None)
        self.clock = _Clock(rank, latest)
        self.scratch = tempfile.TemporaryDirectory()
        profiler = replace(config.profiler, enabled=args.profile)
        self.profile = Profile(profiler, Path(self.scratch.name), rank.number)
        self.reporter = Reporter(
            self.tracker,
            Gauges(args.run_name, rank.number),
            rank.tell,
            self._measure,
            self.breakdown.metrics,
            lambda: self.clock.figures(self.reporter.productive_s) | self._norms,
            rank=rank.number,
            dp_size=rank.dp_size,
            train=config,
        )
        self.committer = Committer(
            rank.store,
            engine,
            self.reporter,
            args.fence,
            rank=rank.number,
            dp_size=rank.dp_size,
            keep=config.keep_checkpoints,
            milestone_every=config.milestone_every,
            extra_files=self._journal,
            on_end=self._saved,
            beat=watchdog.beat,
        )
        self._leave = ""
        self._norms: dict[str, float] = {}
        self._committed: int | None = latest.step if latest is not None else None

    def run(self, stream: Iterator[list[PackedBatch]]) -> bool:
        """Train on the stream's steps, which begin at `start`; whether to roll back and go on."""
        rank = self.rank
        self.prefetch = Prefetch(self._inputs(stream), depth=2)
        try:
            board = rank.args.board if rank.is_first else None
            with self.prefetch as steps, self.profile, Wishes(board) as self.wishes:
                train(
                    self.engine,
                    self.objective,
                    self.throughput.waits(steps),
                    self._before_update,
                    self._after_step,
                    dp_size=rank.dp_size,
                    device=rank.device,
                )
        except _RollBack as rolled:
            self._leave_out(rolled)
            return True
        except BaseException:
            self._keep_open_segment()
            self.tracker.close("FAILED", timeout_s=5)
            raise
        finally:
            self.committer.close()
            self._keep_profile()
        return False

    def _inputs(self, stream: Iterator[list[PackedBatch]]) -> Iterator[StepInput]:
        """Steps with their random draws; runs in the prefetch thread."""
        rank = self.rank
        for number, batches in enumerate(stream, self.start):
            epoch, step = rank.plan.locate(number)
            totals = rank.plan.totals(epoch, step)
            seed = rank.args.assembly.seed
            packs = [(batch, self.objective.draw(batch, seed)) for batch in batches]
            leave_out = number in self.left_out
            yield StepInput(
                number, epoch, step, totals.loss_tokens, totals.tokens, packs, leave_out
            )

    def _before_update(self, inputs: StepInput, loss_share: Tensor) -> tuple[float, str]:
        """The step's loss over all ranks, and why its update is left out; a collective.

        All ranks learn here whether one of them is to leave, so that they leave together.
        """
        wish = self.wishes.wish
        flag = torch.tensor([float(bool(wish) or noticed())], dtype=torch.float64)
        summed = torch.cat([loss_share.double().view(1), flag.to(loss_share.device)])
        if self.rank.dp_size > 1:
            distributed.all_reduce(summed)
        loss, asked = summed.tolist()
        if asked:
            self._leave = wish or "a rank was given notice (SIGTERM)"
        if inputs.leave_out:
            return float("nan"), "rolled back"
        verdict = self.guard.judge(loss)
        if verdict == "rollback":
            self.committer.wait()
            if self._committed is not None:
                self.engine.skip()  # its gradient is not to meet that of another step
                raise _RollBack(inputs.number, loss)
        if verdict != "train":
            self.rank.tell({"text": f"step {inputs.number} is skipped: loss {loss:.4g} is a spike"})
            return loss, "spike"
        return loss, ""

    def _after_step(self, output: StepOutput) -> bool:
        """Whether to go on."""
        inputs, config = output.inputs, self.rank.args.train
        flops = self._flops(inputs) if config.peak_tflops else 0.0
        self.throughput.step(inputs.tokens, flops)
        for (batch, draw), sums in zip(inputs.packs, output.clip_losses, strict=False):
            self.breakdown.add(batch, draw.t, sums.cpu())  # the step's end was waited for above
        self.reporter.record(output, self._cost(inputs))
        self.guard.learn(inputs.number, output.loss, output.skipped)
        self.committer.poll()
        self.profile.step()
        self.watchdog.beat()
        done = inputs.number + 1
        is_last = done == config.steps
        if self._leave or is_last:
            self.committer.finish(done, lambda: self._meta(done))
        elif done % config.checkpoint_every == 0:
            stall_s = self.committer.save(done, lambda: self._meta(done))
            self.tracker.log_metrics({"checkpoint/stall_s": stall_s}, inputs.number)
            self.throughput.skip()
        if self._leave and not is_last and self.rank.is_first:
            self.rank.args.board.leave.remote(self._leave)
        return not self._leave

    def _measure(self) -> Window:
        self._norms = {"train/weight_norm": self.engine.weight_norm()}
        return Window(
            speed=self.throughput.window(),
            steps_ready=self.prefetch.mean_ready(),
            probe_s=probe(self.rank.device),
            memory=memory_stats(self.rank.device),
            breakdown=self.breakdown.take(),
        )

    def _saved(self, saved: Saved) -> None:
        """A save has ended."""
        if saved.error is not None:
            self.rank.tell(
                {"text": f"the checkpoint of step {saved.step} was not written: {saved.error}"}
            )
            return
        self._committed = saved.step
        self.tracker.log_checkpoint(self.rank.checkpoints.folder(saved.step).url, saved.step)
        self.tracker.log_metrics({"checkpoint/write_s": saved.write_s}, saved.step - 1)

    def _keep_profile(self) -> None:
        """With the run and with the tracker."""
        for path in self.profile.files:
            self.rank.store.write(f"profiles/{path.name}", path.read_bytes())
            self.tracker.log_artifact(path, "profiles")
        self.scratch.cleanup()

    def _keep_open_segment(self) -> None:
        """What the ledger would have said of the steps since the last checkpoint."""
        rank = self.rank
        name = f"failed/attempt-{rank.args.fence.number:04d}/rank-{rank.number:05d}.jsonl"
        with contextlib.suppress(OSError):  # it must not stand in for what was raised
            rank.store.write(name, self.reporter.open_segment().text())

    def _journal(self) -> dict[str, bytes]:
        """Beside a checkpoint: rank 0's metrics, and each rank's log."""
        with contextlib.suppress(OSError):
            self.rank.log.save()
        path = self.tracker.journal_path
        return {} if path is None else {"tracking-journal.jsonl": path.read_bytes()}

    def _leave_out(self, rolled: _RollBack) -> None:
        """Write down what is to be left out, before anybody looks."""
        count = self.rank.args.train.guard.rollback_steps
        assert self._committed is not None
        # Steps before the checkpoint are in its weights already.
        steps = range(max(self._committed, rolled.step - count + 1), rolled.step + 1)
        if self.rank.is_first:
            all_steps = sorted(self.left_out | set(steps))
            self.rank.store.write(_LEFT_OUT, json.dumps(all_steps).encode())
        left_out = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        self.rank.tell(
            {
                "text": f"step {rolled.step} has a loss spike ({rolled.loss:.4g}): back to step "
                f"{self._committed}, and on without {left_out}"
            }
        )

    def _cost(self, inputs: StepInput) -> float:
        """Predicted cost of this rank's packs."""
        cost = self.rank.plan.recipe.cost
        lengths = [
            batch.cu_seqlens.diff()[batch.clip_ids >= 0].numpy() for batch, _ in inputs.packs
        ]
        return float(sum(cost.clip_costs(tokens).sum() for tokens in lengths))

    def _flops(self, inputs: StepInput) -> float:
        """Model FLOPs of a step over all ranks, taking this rank's clips for the mixture of all."""
        grids = []
        for batch, _ in inputs.packs:
            lengths = batch.cu_seqlens.diff().tolist()
            for b in (batch.clip_ids >= 0).nonzero().flatten().tolist():
                f, h, w = batch.grid[b].tolist()
                is_whole = f * h * w == lengths[b]  # no token of it is dropped
                grids.append((f, h, w) if is_whole else (lengths[b], 1, 1))
        return training_flops_per_token(self.rank.args.assembly.work(), grids) * inputs.tokens

    def _meta(self, done: int) -> dict[str, Any]:
        args = self.rank.args
        epoch, step = self.rank.plan.locate(done - 1)
        return {
            "step": done,
            "epoch": epoch,
            "step_in_epoch": step,
            "plan_digest": args.plan_digest,
            "dp_size": self.rank.dp_size,
            "config": dict(args.identity.values),
            "code_version": args.code_version,
            "tracker_run_id": self.tracker.run_id,
            "speed": self.reporter.average_speed(),
            "guard": self.guard.state(),
            "clock": self.clock.state(self.reporter.productive_s),
        }


class _Clock:
    """Goodput: the share of a run's wall time in which steps were made that count.

    Wall time runs from the start of a driver, through all that its workers do and suffer, to its
    last commit; between two drivers nobody wanted the run to go on. Of it, steps that changed the
    weights and were kept move the run forward, without the time that they waited for data.
    """

    def __init__(self, rank: Rank, latest: Checkpoint | None) -> None:
        kept = latest.meta.get("clock", {}) if latest is not None else {}
        self._session_began = rank.args.session_began
        self._wall_before_s = kept.get("wall_before_s", 0.0)
        self._productive_before_s = kept.get("productive_s", 0.0)
        if kept and kept["session_began"] != self._session_began:  # another driver's
            self._wall_before_s += kept["saved_at"] - kept["session_began"]
        self._restarts = rank.args.fence.number - 1

    def state(self, productive_s: float) -> dict[str, float]:
        """What the next session goes on from; `productive_s` is this one's."""
        return {
            "session_began": self._session_began,
            "saved_at": time.time(),
            "wall_before_s": self._wall_before_s,
            "productive_s": self._productive_before_s + productive_s,
        }

    def figures(self, productive_s: float) -> dict[str, float]:
        """Of the run up to now."""
        wall_s = self._wall_before_s + time.time() - self._session_began
        return {
            "run/goodput": (self._productive_before_s + productive_s) / max(wall_s, 1e-9),
            "run/restarts": float(self._restarts),
        }
