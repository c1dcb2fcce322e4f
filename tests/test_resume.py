"""A run that is killed goes on as if it had never stopped: ledger, losses, MLflow run."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from framework.checkpoint import Checkpoints
from framework.storage import Store
from framework.train.report import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 60
Start = Callable[..., "subprocess.Popen[str]"]


def overrides(small_line: list[str], small_data: list[str], name: str) -> list[str]:
    return [
        *small_line,
        *small_data,
        f"run.name={name}",
        f"train.steps={STEPS}",
        "train.checkpoint_every=6",
        "train.deterministic=true",
    ]


def train_workers(process: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    """The ranks of a running job, by pid."""
    workers = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                workers[child.pid] = child
    return workers


def wait_for_new_workers(process: "subprocess.Popen[str]", old: dict[int, psutil.Process]) -> None:
    """Wait until Ray has started as many ranks anew."""
    while len(set(train_workers(process)) - set(old)) < len(old):
        assert process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.1)


def test_killed_and_resumed_equals_never_stopped(
    small_line: list[str],
    small_data: list[str],
    start: Start,
    finish: Callable[..., str],
    wait_for_commit: Callable[..., int],
    tmp_path: Path,
) -> None:
    straight = overrides([o for o in small_line if "tracking" not in o], small_data, "straight")
    straight += ["tracking=none"]
    finish("framework.train", *straight)
    root = Store(tmp_path / "runs")
    expected = read_ledger(root.child("straight"))
    assert sorted(expected) == list(range(STEPS))

    killed = overrides(small_line, small_data, "killed")
    store = root.child("killed")
    process = start("framework.train", *killed)
    wait_for_commit(process, store)
    workers = train_workers(process)
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)  # one rank: Ray restarts the group
    wait_for_new_workers(process, workers)
    seen = Checkpoints(store.child("checkpoints")).committed_steps()[-1]
    wait_for_commit(process, store, after=seen)
    os.killpg(process.pid, signal.SIGKILL)  # the whole job, driver first
    output = process.communicate(timeout=60)[0]
    assert "resuming at step" in output
    assert sorted(read_ledger(store)) != list(range(STEPS)), "the job was done before the kill"

    printed = finish("framework.train", *killed)  # the same command
    assert "resuming at step" in printed
    found = read_ledger(store)
    assert {s: row["clips"] for s, row in found.items()} == {
        s: row["clips"] for s, row in expected.items()
    }
    assert {s: row["loss"] for s, row in found.items()} == {
        s: row["loss"] for s, row in expected.items()
    }

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
    (run,) = [run for run in runs if run.info.run_name == "killed"]
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(STEPS))  # once each

    # The last two checkpoints are lost, and there is one rank now.
    root.child("straight", "checkpoints").delete_folder(f"step-{STEPS:08d}")
    root.child("straight", "checkpoints").delete_folder(f"step-{STEPS - 6:08d}")
    printed = finish("framework.train", *straight, "cluster.num_workers=1")
    assert f"resuming at step {STEPS - 12}" in printed
    found = read_ledger(root.child("straight"))
    assert sorted(found) == list(range(STEPS))
    for step, row in expected.items():
        assert found[step]["clips"] == row["clips"], step
        # Another order of summation, through Adam, for 12 steps: far from bit equality.
        assert found[step]["loss"] == pytest.approx(row["loss"], rel=1e-4), step
