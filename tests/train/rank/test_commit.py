"""Saves beside training: what is committed, what a failed save leaves behind, who may commit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from framework.run.checkpoint import Checkpoints
from framework.run.fence import begin_attempt
from framework.run.ledger import read_ledger
from framework.storage import Store
from framework.train.engine.optimizer import AdamWConfig
from framework.train.engine.plain import PlainConfig
from framework.train.observers.ledger import LedgerKeeper
from framework.train.observers.observer import Kept, Saved
from framework.train.rank.commit import Committer, Retention
from framework.train.rank.failures import SaveFailed
from tests.train.steps import step_output


class Line:
    """One rank without a process group: a real engine, ledger and store."""

    def __init__(self, run: Store) -> None:
        self.run, self.ended = run, list[Saved]()
        torch.manual_seed(0)
        self.engine = PlainConfig().build(
            lambda: nn.Linear(3, 2), AdamWConfig(), 100, torch.device("cpu")
        )
        self.ledger = LedgerKeeper(run, dp_rank=0, attempt=1)
        self.committer = Committer(
            self.engine,
            begin_attempt(run, 1),
            Retention(keep_last=2),
            dp_rank=0,
            dp_size=1,
            beat=lambda: None,
        )

    def train(self, steps: range) -> None:
        for step in steps:
            loss = self.engine.model(torch.full((3,), float(step))).square().sum()
            self.engine.backward(loss)
            self.engine.step()
            self.ledger.step(step_output(step))

    def save(self, steps_done: int) -> None:
        kept = [self.ledger.commit(steps_done), Kept(meta={"guard": {"skipped": 0}})]
        self.committer.begin(steps_done, {"plan_digest": "x"}, kept)

    def finish(self, steps_done: int) -> None:
        """As a session does it."""
        self.save(steps_done)
        saved = self.committer.wait()
        assert saved is not None
        self.ended.append(saved)
        self.ledger.committed(saved)
        self.committer.check(saved)
        if saved.error is not None:
            raise saved.error

    def clips(self) -> dict[int, list[int]]:
        return {step: row["clips"] for step, row in read_ledger(self.run).items()}


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(Store(tmp_path))


def test_training_goes_on_and_what_was_saved_is_what_was(line: Line) -> None:
    line.train(range(3))
    then = line.engine.full_state()
    line.save(3)
    line.train(range(3, 6))
    saved = line.committer.wait()
    assert saved is not None
    assert (saved.steps_done, saved.error) == (3, None)
    assert line.committer.wait() is None
    latest = Checkpoints(line.run.child("checkpoints")).latest((0, 1))
    assert latest is not None
    assert latest.step == 3
    assert (latest.meta["plan_digest"], latest.meta["guard"]) == ("x", {"skipped": 0})
    line.engine.load(latest.store)
    for name, tensor in line.engine.full_state().items():
        assert torch.equal(tensor, then[name]), name
    assert sorted(read_ledger(line.run)) == [0, 1, 2]


def test_a_failed_save_costs_the_checkpoint_and_nothing_else(line: Line, tmp_path: Path) -> None:
    line.train(range(2))
    line.finish(2)
    line.train(range(2, 4))
    blocked = tmp_path / "checkpoints" / "step-00000004"
    blocked.write_text("a file where a folder is to be")
    with pytest.raises(SaveFailed, match="rank 0: "):
        line.finish(4)  # it will not pass by itself
    blocked.unlink(missing_ok=True)
    line.train(range(4, 6))
    line.finish(6)
    assert [saved.error is None for saved in line.ended] == [True, False, True]
    assert line.clips() == {s: [s] for s in range(6)}


def test_a_segment_without_a_checkpoint_is_told_again_once(line: Line) -> None:
    line.train(range(2))
    line.finish(2)
    line.train(range(2, 4))
    for name, read in line.ledger.commit(4).files.items():
        line.run.write(name, read())  # killed before the marker
    killed = Line(line.run)
    killed.train(range(2, 6))
    killed.finish(6)
    assert line.clips() == {s: [s] for s in range(6)}


def test_what_an_earlier_attempt_of_more_ranks_wrote_is_gone(line: Line) -> None:
    line.run.write("ledger/step-00000002/rank-00007.jsonl", b'{"step": 0, "clips": [99]}\n')
    line.run.write("quarantine/step-00000002/rank-00007.json", b"[]")
    line.train(range(2))
    line.finish(2)
    assert line.run.list("ledger") == ["ledger/step-00000002/rank-00000.jsonl"]
    assert line.run.list("quarantine") == []


def test_a_superseded_attempt_commits_nothing(line: Line) -> None:
    line.train(range(2))
    begin_attempt(line.run, 1)
    with pytest.raises(SaveFailed, match="was superseded by attempt 2"):
        line.finish(2)
    assert Checkpoints(line.run.child("checkpoints")).committed_steps() == []


def test_a_log_that_cannot_be_copied_costs_no_checkpoint(line: Line, tmp_path: Path) -> None:
    def gone() -> bytes:
        raise FileNotFoundError("somebody cleaned up")

    line.train(range(2))
    kept = [line.ledger.commit(2), Kept(spare_files={"logs/rank.log": gone})]
    line.committer.begin(2, {"plan_digest": "x"}, kept)
    saved = line.committer.wait()
    assert saved is not None
    assert saved.error is None
    assert Checkpoints(line.run.child("checkpoints")).committed_steps() == [2]
    assert sorted(line.clips()) == [0, 1]
