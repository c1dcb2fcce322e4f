"""What the ledger says of steps, of clips that failed, and of a rank that died."""

import json
import math
from pathlib import Path

from framework.storage import Store
from framework.train.observers.ledger import LedgerKeeper
from framework.train.observers.observer import Saved
from tests.train.steps import pack, step_output


def written(keeper: LedgerKeeper, steps_done: int) -> dict[str, bytes]:
    return {name: read() for name, read in keeper.commit(steps_done).files.items()}


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    keeper = LedgerKeeper(Store(tmp_path), dp_rank=3, attempt=1)
    keeper.step(step_output(0, loss=math.nan, skipped="not finite"))
    (line,) = written(keeper, 1)["ledger/step-00000001/rank-00003.jsonl"].splitlines()
    assert json.loads(line) == {"step": 0, "clips": [0], "loss": None, "skipped": "not finite"}


def test_failed_clips_stay_named_until_they_are_committed(tmp_path: Path) -> None:
    keeper = LedgerKeeper(Store(tmp_path), dp_rank=0, attempt=1)
    torn = pack([5, -1], weights=[0.0, 0.0], failed=("a: torn",))
    keeper.step(step_output(0, torn))
    name = "quarantine/step-00000001/rank-00000.json"
    assert json.loads(written(keeper, 1)[name]) == ["a: torn"]
    keeper.step(step_output(1))
    keeper.committed(Saved(1, 0.1, OSError("the store is away")))
    assert json.loads(written(keeper, 2)[name.replace("1/", "2/")]) == ["a: torn"]
    rows = written(keeper, 2)["ledger/step-00000002/rank-00000.jsonl"].splitlines()
    assert [json.loads(row)["clips"] for row in rows] == [[5], [1]]
    keeper.committed(Saved(2, 0.1))
    assert list(written(keeper, 3)) == ["ledger/step-00000003/rank-00000.jsonl"]


def test_a_failure_keeps_the_rows_that_no_checkpoint_has(tmp_path: Path) -> None:
    run = Store(tmp_path)
    keeper = LedgerKeeper(run, dp_rank=1, attempt=2)
    keeper.step(step_output(0))
    keeper.commit(1)
    keeper.committed(Saved(1, 0.1))
    keeper.step(step_output(1))
    keeper.end(None)
    assert run.list() == []
    keeper.end(RuntimeError("a bug"))
    (row,) = run.read("failed/attempt-0002/rank-00001.jsonl").splitlines()
    assert json.loads(row)["step"] == 1
