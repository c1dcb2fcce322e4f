"""What a rank writes down about its steps: the ledger, the metrics, the line that a person watches.

The ledger is the run's account of itself: for each step, the clips that each rank trained on and
the loss. A segment is written just before the checkpoint that ends it, under that checkpoint's
name, so that a step done again after a failure replaces its first account: the ledger holds the
last execution of each step.
"""

import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from framework.batch import ReadStats
from framework.run.ledger import Segment
from framework.tracking.gauges import Gauges
from framework.tracking.tracker import Tracker
from framework.train.config import TrainConfig
from framework.train.engine.protocol import StepStats
from framework.train.loop import StepOutput
from framework.train.observers.probe import slow_ranks
from framework.train.rank.rank import everyone

SLOW_WINDOWS = 5  # after so many in a row a rank is named; chosen by hand


@dataclass(frozen=True)
class _Step:
    """What is kept of a step until its window ends: no batch, no noise."""

    number: int
    epoch: int
    tokens: int
    loss_tokens: int
    loss: float
    stats: StepStats
    skipped: str
    cost: float
    clips: list[int]
    failed: list[str]
    lost_tokens: int
    read: ReadStats

    @classmethod
    def of(cls, output: StepOutput, cost: float) -> "_Step":
        inputs = output.inputs
        batches = [batch for batch, _ in inputs.packs]
        lost = [
            batch.cu_seqlens.diff()[(batch.clip_ids >= 0) & (batch.clip_weights == 0)]
            for batch in batches
        ]
        return cls(
            number=inputs.number,
            epoch=inputs.epoch,
            tokens=inputs.tokens,
            loss_tokens=inputs.loss_tokens,
            loss=output.loss,
            stats=output.stats,
            skipped=output.skipped,
            cost=cost,
            clips=[i for batch in batches for i in batch.clip_ids.tolist() if i >= 0],
            failed=[name for batch in batches for name in batch.failed],
            lost_tokens=int(sum(lengths.sum() for lengths in lost)),
            read=sum((batch.read for batch in batches), ReadStats()),
        )

    def row(self) -> dict[str, Any]:
        """The step in the ledger; a loss that is no number is null there."""
        loss = self.loss if math.isfinite(self.loss) else None
        row: dict[str, Any] = {"step": self.number, "clips": self.clips, "loss": loss}
        if self.failed:
            row["failed"] = self.failed
        if self.skipped:
            row["skipped"] = self.skipped
        return row

    def metrics(self) -> dict[str, float]:
        """What is logged of every step; what is no number is left out."""
        figures = {
            "train/loss": self.loss,
            "train/grad_norm": self.stats.grad_norm,
            "train/lr": self.stats.lr,
            "train/epoch": self.epoch,
            "train/skipped": float(bool(self.skipped)),
            "data/tokens": self.tokens,
        }
        return {name: value for name, value in figures.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Window:
    """What a rank can say of its last steps beside what the steps themselves say."""

    speed: dict[str, float]  # of `Throughput.window`
    steps_ready: float  # prefetched, on the average
    probe_s: float  # of `framework.train.observers.probe`
    memory: dict[str, float]
    breakdown: Tensor  # sums of `framework.train.observers.breakdown`, on the CPU


class Reporter:
    """Collects what `loop.train` gives after each step; all ranks call it alike."""

    def __init__(
        self,
        tracker: Tracker,
        gauges: Gauges,
        show: Callable[[dict[str, Any]], None],
        measure: Callable[[], Window],
        names: Callable[[Tensor], dict[str, float]],
        extra: Callable[[], dict[str, float]],
        *,
        rank: int,
        dp_size: int,
        train: TrainConfig,
    ) -> None:
        """`measure` is asked of every rank at a window's end; `names` turns the breakdown's sums
        into metrics; `extra` are rank 0's own figures."""
        self._tracker, self._gauges, self._show = tracker, gauges, show
        self._measure, self._names, self._extra = measure, names, extra
        self._rank, self._dp_size, self._train = rank, dp_size, train
        self._pending: list[_Step] = []
        self._rows: list[dict[str, Any]] = []
        self._failed: list[str] = []
        self._slow_for: dict[int, int] = {}  # windows in a row, by rank
        self._hosts = everyone(platform.node(), dp_size)
        self._seconds = self._tokens = self._wait_s = 0.0
        self.productive_s = 0.0  # of steps that changed the weights, without waiting for data

    def record(self, output: StepOutput, cost: float) -> None:
        """Take one step; every `log_every` steps its window is gathered over ranks and logged.

        `cost`: of this rank's packs, in any unit that all ranks share.
        """
        self._pending.append(_Step.of(output, cost))
        done = output.inputs.number + 1
        if done % self._train.log_every == 0 or done == self._train.steps:
            self.flush()

    def flush(self) -> None:
        """Gather over ranks what happened since the last call; log it, add it to the ledger.

        ValueError where more than `max_lost_share` of the tokens are of clips that failed.
        """
        steps, self._pending = self._pending, []
        if not steps:
            return
        window = self._measure()
        by_rank = everyone(_Share.of(steps, window), self._dp_size)
        for step in steps:
            self._rows.append(step.row())
            self._failed += step.failed
            self._tracker.log_metrics(step.metrics(), step=step.number)
        self._add_up(window.speed, steps)
        last = steps[-1]
        lost_share = sum(r.lost_tokens for r in by_rank) / sum(s.loss_tokens for s in steps)
        losses = [step.loss for step in steps if math.isfinite(step.loss)]
        if self._rank == 0:
            figures = {
                **_over_ranks(by_rank, window.speed, len(steps)),
                **self._names(torch.stack([r.breakdown for r in by_rank]).sum(0)),
                "data/lost_share": lost_share,
                "data/failed_clips": sum(r.num_failed for r in by_rank),
                **self._extra(),
            }
            self._tracker.log_metrics(figures, step=last.number)
            self._gauges.show({**last.metrics(), **figures})
            self._name_slow_ranks([r.probe_s for r in by_rank])
            self._show(
                {
                    "step": last.number + 1,
                    "steps": self._train.steps,
                    "loss": sum(losses) / len(losses) if losses else math.nan,
                    **figures,
                }
            )
        if lost_share > self._train.max_lost_share:
            raise ValueError(
                f"{lost_share:.0%} of the tokens of steps {steps[0].number} to {last.number} are "
                f"of clips that could not be read (train.max_lost_share="
                f"{self._train.max_lost_share}); on this rank: {'; '.join(self._failed[:3])}"
            )

    def _name_slow_ranks(self, probe_s: list[float]) -> None:
        """Once, when it has been slow for some windows in a row: a neighbour may pass."""
        slow = slow_ranks(probe_s)
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in slow}
        for rank in (r for r, windows in self._slow_for.items() if windows == SLOW_WINDOWS):
            times = probe_s[rank] / statistics.median_low(probe_s)
            self._show(
                {
                    "text": f"rank {rank} on {self._hosts[rank]} is slow: the same matrix products "
                    f"take it {times:.1f} times as long as the median rank"
                }
            )

    def _add_up(self, speed: dict[str, float], steps: list[_Step]) -> None:
        if not speed:
            return
        seconds = speed["speed/step_s"] * len(steps)
        waited = speed["data/wait_share"] * seconds
        self._seconds += seconds
        self._tokens += speed["speed/tokens_per_s"] * seconds
        self._wait_s += waited
        updated = sum(not step.skipped for step in steps) / len(steps)
        self.productive_s += updated * (seconds - waited)

    def take_segment(self) -> Segment:
        """What the ledger is to say of the steps since the last checkpoint; a collective."""
        self.flush()
        segment = Segment(self._rows, self._failed)
        self._rows, self._failed = [], []
        return segment

    def open_segment(self) -> Segment:
        """What is not written yet, where no other rank can be asked any more."""
        return Segment([*self._rows, *(step.row() for step in self._pending)], self._failed)

    def give_back(self, segment: Segment) -> None:
        """The checkpoint that this was taken for was not committed: the next one tells it."""
        self._rows[:0], self._failed[:0] = segment.rows, segment.failed

    def average_speed(self) -> dict[str, float]:
        """Over all steps of this process, checkpoints left out."""
        if not self._seconds:
            return {"tokens_per_s": 0.0, "wait_share": 0.0}
        return {
            "tokens_per_s": self._tokens / self._seconds,
            "wait_share": self._wait_s / self._seconds,
        }


@dataclass(frozen=True)
class _Share:
    """One rank's part of a window's figures."""

    read: ReadStats
    wait_share: float
    steps_ready: float
    probe_s: float
    memory: dict[str, float]
    costs: list[float]  # of each step
    lost_tokens: int
    num_failed: int
    breakdown: Tensor

    @classmethod
    def of(cls, steps: list[_Step], window: Window) -> "_Share":
        return cls(
            read=sum((step.read for step in steps), ReadStats()),
            wait_share=window.speed.get("data/wait_share", 0.0),
            steps_ready=window.steps_ready,
            probe_s=window.probe_s,
            memory=window.memory,
            costs=[step.cost for step in steps],
            lost_tokens=sum(step.lost_tokens for step in steps),
            num_failed=sum(len(step.failed) for step in steps),
            breakdown=window.breakdown,
        )


def _over_ranks(by_rank: list[_Share], speed: dict[str, float], num_steps: int) -> dict[str, float]:
    """Sums over ranks a second, means a clip, the worst rank, and how uneven the steps were.

    speed/imbalance: predicted cost of the step's dearest rank over the mean of all, on the average.
    """
    costs = torch.tensor([share.costs for share in by_rank], dtype=torch.float64)  # (W, steps)
    probes = [share.probe_s for share in by_rank]
    figures = {
        **speed,
        "speed/imbalance": (costs.amax(0) / costs.mean(0).clamp(min=1e-30)).mean().item(),
        "speed/slowest_rank": max(probes) / max(statistics.median_low(probes), 1e-9),
    }
    for name in by_rank[0].memory:
        figures[name] = max(share.memory[name] for share in by_rank)
    read = sum((share.read for share in by_rank), ReadStats())
    if speed and read.clips:
        seconds = speed["speed/step_s"] * num_steps
        figures |= {
            "data/clips_per_s": read.clips / seconds,
            "data/mb_per_s": read.size_bytes / seconds / 1e6,
            "data/fetch_ms": 1e3 * read.fetch_s / read.clips,
            "data/decode_ms": 1e3 * read.decode_s / read.clips,
            "data/wait_share": statistics.fmean(share.wait_share for share in by_rank),
            "data/wait_share_worst": max(share.wait_share for share in by_rank),
            "data/steps_ready_worst": min(share.steps_ready for share in by_rank),
        }
    return figures
