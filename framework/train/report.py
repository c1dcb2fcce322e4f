"""What a rank writes down about its steps: the ledger, the metrics, the line that a person watches.

The ledger is the run's account of itself: for each step, the clips that each rank trained on and
the loss. A segment is written just before the checkpoint that ends it, under that checkpoint's
name, so that a step done again after a failure replaces its first account: the ledger holds the
last execution of each step.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed

from framework.storage import Store
from framework.tracking import Tracker
from framework.train.loop import StepOutput
from framework.train.throughput import Throughput


def ledger_name(step: int, rank: int) -> str:
    """Where the ledger segment of one rank lies that ends with the checkpoint of `step`."""
    return f"ledger/step-{step:08d}/rank-{rank:05d}.jsonl"


def read_ledger(store: Store) -> dict[int, dict[str, Any]]:
    """step -> {"clips": sorted ids over all ranks, "loss": float}; `store` is the run's folder."""
    steps: dict[int, dict[str, Any]] = {}
    for name in store.list("ledger"):
        for line in store.read(name).decode().splitlines():
            row = json.loads(line)
            entry = steps.setdefault(row["step"], {"clips": [], "loss": row["loss"]})
            entry["clips"] = sorted(entry["clips"] + row["clips"])
    return steps


class Reporter:
    """Collects what `loop.train` gives after each step; all ranks call it alike."""

    def __init__(
        self,
        store: Store,
        tracker: Tracker,
        throughput: Throughput,
        show: Callable[[dict[str, Any]], None],
        *,
        rank: int,
        dp_size: int,
        log_every: int,
        total_steps: int,
    ) -> None:
        self._store, self._tracker, self._throughput, self._show = store, tracker, throughput, show
        self._rank, self._dp_size = rank, dp_size
        self._log_every, self._total_steps = log_every, total_steps
        self._pending: list[StepOutput] = []
        self._rows: list[dict[str, Any]] = []
        self._failed: list[str] = []
        self._seconds = self._tokens = self._wait_s = 0.0

    def record(self, output: StepOutput) -> None:
        """Take one step; every `log_every` steps its window is reduced over ranks and logged."""
        self._pending.append(output)
        done = output.inputs.number + 1
        if done % self._log_every == 0 or done == self._total_steps:
            self.flush()

    def flush(self) -> None:
        """Reduce the losses of the steps since the last call, log them, add them to the ledger."""
        if not self._pending:
            return
        losses = torch.stack([output.loss_share for output in self._pending]).double().cpu()
        if self._dp_size > 1:
            distributed.all_reduce(losses)
        speed = self._throughput.window()
        if speed:
            seconds = speed["speed/step_s"] * len(self._pending)
            self._seconds += seconds
            self._tokens += speed["speed/tokens_per_s"] * seconds
            self._wait_s += speed["data/wait_share"] * seconds
        for output, loss in zip(self._pending, losses.tolist(), strict=True):
            inputs = output.inputs
            packs = [batch for batch, _ in inputs.packs]
            clips = [i for batch in packs for i in batch.clip_ids.tolist() if i >= 0]
            self._failed += [name for batch in packs for name in batch.failed]
            self._rows.append({"step": inputs.number, "clips": clips, "loss": loss})
            self._tracker.log_metrics(
                {
                    "train/loss": loss,
                    "train/grad_norm": output.stats.grad_norm,
                    "train/lr": output.stats.lr,
                    "train/epoch": inputs.epoch,
                    "data/tokens": inputs.tokens,
                },
                step=inputs.number,
            )
        last = self._pending[-1]
        self._tracker.log_metrics(speed, step=last.inputs.number)
        mean = sum(losses.tolist()) / len(losses)
        self._show(
            {"step": last.inputs.number + 1, "steps": self._total_steps, "loss": mean, **speed}
        )
        self._pending.clear()

    def write_ledger(self, step: int) -> None:
        """Write this rank's segment that ends with the checkpoint of `step`, and its quarantine."""
        self.flush()
        text = "".join(json.dumps(row) + "\n" for row in self._rows)
        self._store.write(ledger_name(step, self._rank), text.encode())
        if self._failed:
            name = f"quarantine/step-{step:08d}/rank-{self._rank:05d}.json"
            self._store.write(name, json.dumps(self._failed, indent=1).encode())
            self._tracker.log_metrics({"data/failed_clips": len(self._failed)}, step=step - 1)
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
