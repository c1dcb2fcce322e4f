"""Ctrl-C: once, the run commits and stops where it is; twice, it stops at once."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.checkpoint import Checkpoints
from framework.storage import Store
from framework.train.report import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_once_commits_and_stops_twice_stops_at_once(
    small_line: list[str],
    small_data: list[str],
    start: Callable[..., "subprocess.Popen[str]"],
    wait_for_commit: Callable[..., int],
    tmp_path: Path,
) -> None:
    command = [*small_line, *small_data, "train.steps=2000", "train.checkpoint_every=5"]
    run = Store(tmp_path / "runs/small")
    process = start("framework.train", *command)
    wait_for_commit(process, run)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: driver, Ray and workers alike
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130, output
    assert "stopping after a checkpoint" in output
    step = Checkpoints(run.child("checkpoints")).committed_steps()[-1]
    assert f"stopped at step {step}, committed; the same command goes on" in output
    assert "Traceback" not in output
    assert sorted(read_ledger(run)) == list(range(step))
    assert status(tmp_path) == "KILLED"

    process = start("framework.train", *command)
    wait_for_commit(process, run, after=step)
    assert status(tmp_path) == "RUNNING"
    os.kill(process.pid, signal.SIGTERM)  # as `ray job stop` does
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130, output
    assert f"resuming at step {step}" in output
    assert "Traceback" not in output


def status(tmp_path: Path) -> str:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
    return run.info.status
