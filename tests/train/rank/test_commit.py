"""Saves beside training: what is committed, what a failed save leaves behind, who may commit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from framework.batch import ReadStats
from framework.run.checkpoint import Checkpoints
from framework.run.fence import begin_attempt
from framework.run.ledger import read_ledger
from framework.storage import Store
from framework.tracking.gauges import Gauges
from framework.tracking.tracker import NoTracker
from framework.train.config import TrainConfig
from framework.train.engine.optimizer import AdamWConfig
from framework.train.engine.plain import PlainConfig
from framework.train.engine.protocol import StepStats
from framework.train.observers import report
from framework.train.observers.report import Reporter, Window
from framework.train.rank.commit import Committer, Saved
from framework.train.rank.failures import SaveFailed


class Line:
    """One rank without a process group: a real engine, reporter and store."""

    def __init__(self, run: Store) -> None:
        self.run, self.ended = run, list[Saved]()
        torch.manual_seed(0)
        self.engine = PlainConfig().build(
            lambda: nn.Linear(3, 2), AdamWConfig(), 100, torch.device("cpu")
        )
        self.reporter = Reporter(
            NoTracker(),
            Gauges("test", 0),
            lambda line: None,
            lambda: Window({}, 0.0, 0.01, {}, torch.zeros(2, 1)),
            lambda sums: {},
            dict,
            rank=0,
            dp_size=1,
            train=TrainConfig(),
        )
        self.fence = begin_attempt(run, 1)
        self.committer = Committer(
            run,
            self.engine,
            self.reporter,
            self.fence,
            rank=0,
            dp_size=1,
            keep=2,
            milestone_every=0,
            extra_files=dict,
            on_end=self.ended.append,
            beat=lambda: None,
        )

    def train(self, steps: range) -> None:
        for number in steps:
            loss = self.engine.model(torch.full((3,), float(number))).square().sum()
            self.engine.backward(loss)
            stats = self.engine.step()
            self.reporter._pending.append(step_of(number, stats))

    def meta(self) -> dict[str, Any]:
        return {"plan_digest": "x"}


def step_of(number: int, stats: StepStats) -> report._Step:
    return report._Step(
        number, 0, 8, 8, float(number), stats, "", 1.0, [number], [], 0, ReadStats()
    )


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(Store(tmp_path))


def test_training_goes_on_and_what_was_saved_is_what_was(line: Line) -> None:
    line.train(range(3))
    then = line.engine.full_state()
    line.committer.save(3, line.meta)
    line.train(range(3, 6))
    line.committer.wait()
    (saved,) = line.ended
    assert (saved.step, saved.error) == (3, None)
    latest = Checkpoints(line.run.child("checkpoints")).latest((0, 1))
    assert latest is not None
    assert latest.step == 3
    line.engine.load(latest.store)
    for name, tensor in line.engine.full_state().items():
        assert torch.equal(tensor, then[name]), name
    assert sorted(read_ledger(line.run)) == [0, 1, 2]


def test_a_failed_save_costs_the_checkpoint_and_nothing_else(line: Line, tmp_path: Path) -> None:
    line.train(range(2))
    line.committer.finish(2, line.meta)
    line.train(range(2, 4))
    blocked = tmp_path / "checkpoints" / "step-00000004"
    blocked.write_text("a file where a folder is to be")
    line.committer.save(4, line.meta)
    with pytest.raises(SaveFailed, match="rank 0: "):
        line.committer.wait()  # it will not pass by itself
    blocked.unlink(missing_ok=True)
    line.train(range(4, 6))
    line.committer.finish(6, line.meta)
    ledger = read_ledger(line.run)
    assert {step: row["clips"] for step, row in ledger.items()} == {s: [s] for s in range(6)}


def test_a_segment_without_a_checkpoint_is_told_again_once(line: Line) -> None:
    line.train(range(2))
    line.committer.finish(2, line.meta)
    line.train(range(2, 4))
    line.reporter.take_segment().write(line.run, 4, 0)  # killed before the marker
    line.train(range(2, 6))
    line.committer.finish(6, line.meta)
    ledger = read_ledger(line.run)
    assert {step: row["clips"] for step, row in ledger.items()} == {s: [s] for s in range(6)}


def test_a_superseded_attempt_commits_nothing(line: Line) -> None:
    line.train(range(2))
    begin_attempt(line.run, 1)
    with pytest.raises(SaveFailed, match="was superseded by attempt 2"):
        line.committer.finish(2, line.meta)
    assert Checkpoints(line.run.child("checkpoints")).committed_steps() == []


def test_a_loss_that_is_no_number_is_null_in_the_ledger(line: Line) -> None:
    stats = StepStats(math.inf, 0.1)
    step = step_of(0, stats)
    row = report._Step(
        *[*vars(step).values()][:4], math.nan, stats, "not finite", *[*vars(step).values()][7:]
    ).row()
    assert json.loads(json.dumps(row)) == {
        "step": 0, "clips": [0], "loss": None, "skipped": "not finite"
    }  # fmt: skip
