"""What a rank writes down about its steps: the ledger, the metrics, the line that a person watches.

The ledger is the run's account of itself: for each step, the clips that each rank trained on and
the loss. A segment is written just before the checkpoint that ends it, under that checkpoint's
name, so that a step done again after a failure replaces its first account: the ledger holds the
last execution of each step.
"""

import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from framework.batch import ReadStats
from framework.checkpoint import Checkpoints
from framework.storage import Store
from framework.tracking import Tracker
from framework.train.config import TrainConfig
from framework.train.engine import StepStats
from framework.train.loop import StepOutput
from framework.train.throughput import Throughput


def ledger_name(step: int, rank: int) -> str:
    """Where the ledger segment of one rank lies that ends with the checkpoint of `step`."""
    return f"ledger/step-{step:08d}/rank-{rank:05d}.jsonl"


def read_ledger(run: Store) -> dict[int, dict[str, Any]]:
    """step -> {"clips": sorted ids over all ranks, "loss": float}, up to the last checkpoint.

    `run` is the run's folder. A segment whose checkpoint was not committed may lack a rank, and its
    steps will be done again: it does not count.
    """
    committed = Checkpoints(run.child("checkpoints")).committed_steps()
    steps: dict[int, dict[str, Any]] = {}
    for name in run.list("ledger"):
        segment = int(name.split("/")[1].removeprefix("step-"))
        if not committed or segment > committed[-1]:
            continue
        for line in run.read(name).decode().splitlines():
            row = json.loads(line)
            entry = steps.setdefault(row["step"], {"clips": [], "loss": row["loss"]})
            entry["clips"] = sorted(entry["clips"] + row["clips"])
    return steps


def segment_loss(run: Store, step: int) -> tuple[int, float] | None:
    """Number of steps and mean loss of the ledger segment that the checkpoint of `step` ends.

    None where there is no such segment in the run's folder `run`.
    """
    try:
        lines = run.read(ledger_name(step, 0)).decode().splitlines()  # all ranks have the loss
    except FileNotFoundError:
        return None
    losses = [json.loads(line)["loss"] for line in lines]
    return (len(losses), sum(losses) / len(losses)) if losses else None


@dataclass(frozen=True)
class _Step:
    """What is kept of a step until its window ends: no batch, no noise."""

    number: int
    epoch: int
    tokens: int
    loss_tokens: int
    loss_share: Tensor
    stats: StepStats
    clips: list[int]
    failed: list[str]
    lost_tokens: int
    read: ReadStats

    @classmethod
    def of(cls, output: StepOutput) -> "_Step":
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
            loss_share=output.loss_share,
            stats=output.stats,
            clips=[i for batch in batches for i in batch.clip_ids.tolist() if i >= 0],
            failed=[name for batch in batches for name in batch.failed],
            lost_tokens=int(sum(lengths.sum() for lengths in lost)),
            read=sum((batch.read for batch in batches), ReadStats()),
        )


class Reporter:
    """Collects what `loop.train` gives after each step; all ranks call it alike."""

    def __init__(
        self,
        store: Store,
        tracker: Tracker,
        throughput: Throughput,
        show: Callable[[dict[str, Any]], None],
        stop_asked: Callable[[], bool],
        steps_ready: Callable[[], float],
        *,
        rank: int,
        dp_size: int,
        train: TrainConfig,
    ) -> None:
        self._store, self._tracker, self._throughput, self._show = store, tracker, throughput, show
        self._stop_asked = stop_asked  # rank 0's answer counts
        self._steps_ready = steps_ready  # prefetched, on the average since it was last asked
        self._rank, self._dp_size, self._train = rank, dp_size, train
        self._pending: list[_Step] = []
        self._rows: list[dict[str, Any]] = []
        self._failed: list[str] = []
        self._seconds = self._tokens = self._wait_s = 0.0

    def record(self, output: StepOutput) -> bool:
        """Take one step; every `log_every` steps its window is reduced over ranks and logged.

        Whether training is to stop after this step: all ranks say the same.
        """
        self._pending.append(_Step.of(output))
        done = output.inputs.number + 1
        if done % self._train.log_every == 0 or done == self._train.steps:
            return self.flush()
        return False

    def flush(self) -> bool:
        """Sum over ranks what happened since the last call; log it, add it to the ledger.

        Whether a stop was asked for. RuntimeError where more than `max_lost_share` of the tokens
        are of clips that failed.
        """
        if not self._pending:
            return False
        stop = self._rank == 0 and self._stop_asked()
        speed = self._window(len(self._pending))
        by_step = torch.tensor(
            [[s.loss_share.item(), s.lost_tokens, len(s.failed)] for s in self._pending],
            dtype=torch.float64,
        )
        read = sum((step.read for step in self._pending), ReadStats())
        mine = [*astuple(read), speed.get("data/wait_share", 0.0), self._steps_ready()]
        by_rank = torch.zeros(self._dp_size, len(mine), dtype=torch.float64)
        by_rank[self._rank] = torch.tensor(mine, dtype=torch.float64)
        parts = [torch.tensor([stop], dtype=torch.float64), by_step.flatten(), by_rank.flatten()]
        summed = torch.cat(parts)
        if self._dp_size > 1:
            distributed.all_reduce(summed)
        stopped, steps, ranks = summed.split([len(part) for part in parts])
        stop, sums = bool(stopped), steps.view_as(by_step)
        rows = list(zip(self._pending, sums.tolist(), strict=True))
        speed |= _reading(ranks.view_as(by_rank), speed, len(rows))
        for step, (loss, lost_tokens, num_failed) in rows:
            self._failed += step.failed
            row = {"step": step.number, "clips": step.clips, "loss": loss}
            self._rows.append({**row, "failed": step.failed} if step.failed else row)
            metrics = {
                "train/loss": loss,
                "train/grad_norm": step.stats.grad_norm,
                "train/lr": step.stats.lr,
                "train/epoch": step.epoch,
                "data/tokens": step.tokens,
                "data/lost_share": lost_tokens / step.loss_tokens,
                "data/failed_clips": num_failed,
            }
            self._tracker.log_metrics(metrics, step=step.number)
        last, mean_loss = self._pending[-1], sums[:, 0].mean().item()
        self._tracker.log_metrics(speed, step=last.number)
        self._show(
            {"step": last.number + 1, "steps": self._train.steps, "loss": mean_loss, **speed}
        )
        lost_share = sums[:, 1].sum().item() / sum(step.loss_tokens for step in self._pending)
        self._pending.clear()
        if lost_share > self._train.max_lost_share:
            raise RuntimeError(
                f"{lost_share:.0%} of the tokens of steps {rows[0][0].number} to {last.number} are "
                f"of clips that could not be read (train.max_lost_share="
                f"{self._train.max_lost_share}); on this rank: {'; '.join(self._failed[:3])}"
            )
        return stop

    def _window(self, num_steps: int) -> dict[str, float]:
        speed = self._throughput.window()
        if speed:
            seconds = speed["speed/step_s"] * num_steps
            self._seconds += seconds
            self._tokens += speed["speed/tokens_per_s"] * seconds
            self._wait_s += speed["data/wait_share"] * seconds
        return speed

    def clear_ledger(self, step: int) -> None:
        """Delete what an earlier attempt, maybe of more ranks, wrote for this checkpoint."""
        for folder in ("ledger", "quarantine"):
            self._store.delete_folder(f"{folder}/step-{step:08d}")

    def write_ledger(self, step: int) -> None:
        """Write this rank's segment that ends with the checkpoint of `step`, and its quarantine."""
        self.flush()
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._store.write(ledger_name(step, self._rank), text.encode())
        if self._failed:
            name = f"quarantine/step-{step:08d}/rank-{self._rank:05d}.json"
            self._store.write(name, json.dumps(self._failed, indent=1).encode())
        self._rows.clear()
        self._failed.clear()

    def average_speed(self) -> dict[str, float]:
        """Over all steps of this process, checkpoints left out."""
        if not self._seconds:
            return {"tokens_per_s": 0.0, "wait_share": 0.0}
        return {
            "tokens_per_s": self._tokens / self._seconds,
            "wait_share": self._wait_s / self._seconds,
        }


def _reading(by_rank: Tensor, speed: dict[str, float], num_steps: int) -> dict[str, float]:
    """How the data came in a window: sums over ranks a second, means a clip, and the worst rank.

    by_rank: (dp_size, 6), the fields of ReadStats, the share of time spent waiting, steps ready.
    """
    clips, size_bytes, fetch_s, decode_s = by_rank[:, :4].sum(dim=0).tolist()
    if not speed or not clips:
        return {}
    seconds = speed["speed/step_s"] * num_steps
    return {
        "data/clips_per_s": clips / seconds,
        "data/mb_per_s": size_bytes / seconds / 1e6,
        "data/fetch_ms": 1e3 * fetch_s / clips,
        "data/decode_ms": 1e3 * decode_s / clips,
        "data/wait_share": by_rank[:, 4].mean().item(),
        "data/wait_share_worst": by_rank[:, 4].max().item(),
        "data/steps_ready_worst": by_rank[:, 5].min().item(),
    }
