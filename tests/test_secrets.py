"""A password that a user put into a URL is in nothing that a run writes or prints."""

from collections.abc import Callable
from pathlib import Path

import pytest

from framework.run.identity import read_config
from framework.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PASSWORD = "pl4nted"


def test_a_planted_password_is_nowhere(
    small_line: list[str], small_data: list[str], finish: Callable[..., str], tmp_path: Path
) -> None:
    # Nobody listens there: the run trains on, and says where its figures wait.
    uri = f"postgresql://someone:{PASSWORD}@127.0.0.1:9/mlflow"
    command = [*small_line, *small_data, "train.steps=4", f"tracking.uri={uri}"]
    printed = finish("framework.train", *command)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    holding = [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert not holding
    assert PASSWORD not in printed
    run = Store(tmp_path / "runs/small")
    assert read_config(run)["tracking.uri"] == "postgresql://someone:***@127.0.0.1:9/mlflow"
    assert {path.name for path in files} >= {"config.json", "journal.jsonl", "COMMITTED"}
