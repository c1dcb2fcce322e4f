"""A run in object storage, interrupted in every way, goes on as if it had never been.

Its rank is killed, its driver is killed, it is stopped by Ctrl-C, and it ends on another number of
ranks: clips, losses and the MLflow run are those of a run that never stopped.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from framework.run.checkpoint import Checkpoints
from framework.run.fence import read_attempt
from framework.run.ledger import read_ledger
from framework.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 45  # a stop is heard within two seconds, in which ten may be trained
Process = subprocess.Popen[str]
Wait = Callable[..., int]


@dataclass(frozen=True)
class Broken:
    """The run that is interrupted, and how to start and watch it."""

    command: list[str]
    store: Store
    mlflow_uri: str
    start: Callable[..., Process]
    wait_for_commit: Wait

    def started(self) -> tuple[Process, int]:
        """The command, begun again, once it has committed a step that was not yet; that step."""
        before = Checkpoints(self.store.child("checkpoints")).committed_steps()
        process = self.start("framework.train", *self.command)
        return process, self.wait_for_commit(process, self.store, *before[-1:])

    def committed(self) -> int:
        return Checkpoints(self.store.child("checkpoints")).committed_steps()[-1]

    def mlflow_status(self) -> str:
        from mlflow import MlflowClient

        client = MlflowClient(self.mlflow_uri)
        (run,) = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
        return run.info.status


def test_interrupted_in_every_way_equals_never_stopped(
    small_line: list[str],
    s3_bucket: str,
    make_data: Callable[[str], list[str]],
    start: Callable[..., Process],
    finish: Callable[..., str],
    wait_for_commit: Wait,
    tmp_path: Path,
) -> None:
    line = [
        *small_line,
        *make_data(s3_bucket),
        f"train.steps={STEPS}",
        "train.checkpoint_every=5",
        "train.deterministic=true",
        "train.try_largest_packs=false",
    ]
    finish("framework.train", *without_tracking(line), "tracking=none")
    expected = read_ledger(Store(tmp_path / "runs/small"))
    assert sorted(expected) == list(range(STEPS))

    run = Broken(
        command=[*line, f"run.root={s3_bucket}/runs"],
        store=Store(f"{s3_bucket}/runs/small"),
        mlflow_uri=f"sqlite:///{tmp_path}/mlflow.db",
        start=start,
        wait_for_commit=wait_for_commit,
    )
    kill_a_rank_and_then_the_driver(run)
    stop(run)
    changed = run.committed()
    printed = finish("framework.train", *run.command, "cluster.num_workers=1")
    assert f"resuming at step {changed}" in printed
    assert f"committed: {run.store.url}/checkpoints/step-{STEPS:08d}" in printed

    found = read_ledger(run.store)
    assert {s: row["clips"] for s, row in found.items()} == {
        s: row["clips"] for s, row in expected.items()
    }
    for step, row in expected.items():
        if step < changed:
            assert found[step]["loss"] == row["loss"], step
        else:  # another order of summation, through Adam
            assert found[step]["loss"] == pytest.approx(row["loss"], rel=1e-4), step
    check_mlflow(run)
    logs = {name.split("/")[1].rsplit("-", 1)[0] for name in run.store.list("logs")}
    assert logs == {"driver", "rank-00000", "rank-00001"}


def without_tracking(line: list[str]) -> list[str]:
    return [override for override in line if "tracking" not in override]


def kill_a_rank_and_then_the_driver(run: Broken) -> None:
    """Ray restarts the group; then nobody is left to do so."""
    process, _ = run.started()
    workers = train_workers(process)
    assert len(workers) == 2
    os.kill(max(workers), signal.SIGKILL)
    wait_for_new_workers(process, workers)
    run.wait_for_commit(process, run.store, after=run.committed())
    ranks = train_workers(process)
    os.killpg(process.pid, signal.SIGKILL)  # the whole job, driver first
    for rank in ranks.values():  # it is of another group, and may still commit before it notices
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    assert not psutil.wait_procs(ranks.values(), timeout=60)[1]
    process.communicate(timeout=60)
    assert read_attempt(run.store)["number"] == 2
    assert run.committed() < STEPS, "the job was done before the kill"


def stop(run: Broken) -> None:
    """It commits where it is."""
    process, _ = run.started()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: driver, Ray and workers alike
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 130, output
    assert "resuming at step" in output
    assert "stopping after a checkpoint" in output
    step = run.committed()
    assert f"stopped at step {step}, committed; the same command goes on" in output
    assert "Traceback" not in output
    assert sorted(read_ledger(run.store)) == list(range(step))
    assert run.mlflow_status() == "KILLED"


def check_mlflow(run: Broken) -> None:
    """One run, each step's loss once."""
    from mlflow import MlflowClient

    client = MlflowClient(run.mlflow_uri)
    (found,) = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
    assert found.info.status == "FINISHED"
    points = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(STEPS))


def train_workers(process: Process) -> dict[int, psutil.Process]:
    """The ranks of a running job, by pid."""
    workers = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                workers[child.pid] = child
    return workers


def wait_for_new_workers(process: Process, old: dict[int, psutil.Process]) -> None:
    """Wait until Ray has started as many ranks anew."""
    while len(set(train_workers(process)) - set(old)) < len(old):
        assert process.poll() is None, process.communicate()[0][-6000:]
        time.sleep(0.1)
