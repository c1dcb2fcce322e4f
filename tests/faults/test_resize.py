"""Nodes go and come: the run goes on with fewer ranks and grows again, with the same batches."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from framework.data.plan.store import Plan
from framework.run.fence import read_attempt
from framework.run.ledger import read_ledger
from framework.storage import Store
from tests.faults.conftest import Process, Run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 400  # more than it comes to: it is stopped


class Nodes:
    """Ray nodes on this machine, each a raylet of its own; the first holds the head."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self.processes: list[Process] = []
        self._port = port

    def add(self, num_cpus: int) -> Process:
        where = ["--head", f"--port={self._port}", "--include-dashboard=false"]
        if self.processes:
            where = [f"--address={self.address}"]
        process = subprocess.Popen(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--block", *where),
                *(f"--num-cpus={num_cpus}", "--object-store-memory=200000000"),
                *("--node-ip-address=127.0.0.1", "--disable-usage-stats"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
            env={
                **os.environ,
                "RAY_AUTH_MODE": "disabled",
                "RAY_TMPDIR": str(self.folder),
                "RAY_health_check_initial_delay_ms": "1000",
                "RAY_health_check_period_ms": "2000",
                "RAY_health_check_timeout_ms": "20000",
                "RAY_health_check_failure_threshold": "3",
            },
        )
        self.processes.append(process)
        if len(self.processes) == 1:  # a driver that joins waits for a head for some seconds alone
            self._wait_for_head(process)
        return process

    def _wait_for_head(self, process: Process) -> None:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, "the head has ended"
            assert time.monotonic() < deadline, f"no head at {self.address}"
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), timeout=5).close()
                return
            time.sleep(0.2)

    def kill(self, process: Process) -> None:
        """The node is gone at once, with all that runs on it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.fixture
def nodes(free_port: Callable[[], int]) -> Iterator[Nodes]:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # a socket's path must be short
        started = Nodes(Path(folder), free_port())
        try:
            yield started
        finally:
            for process in reversed(started.processes):
                started.kill(process)


def test_a_node_goes_and_another_comes(
    small_line: list[str],
    small_data: list[str],
    nodes: Nodes,
    start: Callable[..., Process],
    tmp_path: Path,
) -> None:
    line = [override for override in small_line if "tracking" not in override]
    line += [
        *small_data,
        "tracking=none",
        f"train.steps={STEPS}",
        "train.checkpoint_every=5",
        "train.log_every=5",
        "train.try_largest_packs=false",
        "cluster.num_workers=[1,3]",
        "data.global_batch_packs=3",
        "cluster.grow_after_s=0",
        "data.stream.object_store_mb=64",
    ]
    nodes.add(num_cpus=2)
    second = nodes.add(num_cpus=2)  # three workers and a decode task take all four
    run = Run(
        start("framework.train", *line, RAY_ADDRESS=nodes.address, RAY_AUTH_MODE="disabled"),
        Store(tmp_path / "runs/small"),
    )
    train_on(run, 3)
    nodes.kill(second)
    train_on(run, 1)
    nodes.add(num_cpus=2)
    train_on(run, 3)
    output = run.stop()
    assert "there is room for 3 workers now, 1 train" in output

    # What the plan says, once each. (That losses do not show another number of ranks is for
    # tests/test_resume.py.)
    (digest,) = {name.split("/")[1] for name in run.store.list("plan")}
    plan = Plan(run.store, digest)
    found = read_ledger(run.store)
    assert sorted(found) == list(range(run.committed()))
    for step, row in found.items():
        packs = plan.packs(*plan.locate(step), 0, 1)
        planned = [clip.clip_id for pack in packs for clip in pack.clips if clip.clip_id >= 0]
        assert row["clips"] == sorted(planned), step


def train_on(run: Run, num_workers: int) -> None:
    """Wait until it trains on so many ranks."""
    run.wait_until(lambda: read_attempt(run.store).get("num_workers") == num_workers)
    run.wait_for_commit_after(run.committed())
