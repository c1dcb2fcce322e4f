"""What passes by itself leaves no trace in the clips and losses of a run.

One run in object storage is held, warned, cut off from its store, and finds its newest checkpoint
altered; kills and the death of its driver are in tests/test_resume.py, the loss of nodes in
test_resize.py, MLflow that is away in tests/tracking/test_mlflow.py. Outages here last seconds; the
long form, with all of these at random and outages as in earnest, is `python -m benchmarks.chaos
--minutes 20 --hang-timeout-s 90 --store-away-s 60 60 --mlflow-away-s 600`.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.run.ledger import read_ledger
from framework.storage import Store
from tests.faults.conftest import Process, Run, clips_of, losses_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 45
# Far above all that a start takes on a busy machine, where twenty seconds were too few.
HANG_TIMEOUT_S = 60


def test_hang_notice_outage_and_altered_checkpoint(
    small_line: list[str],
    make_data: Callable[[str], list[str]],
    s3_process: Process,
    start: Callable[..., Process],
    finish: Callable[..., str],
    tmp_path: Path,
) -> None:
    line = [override for override in small_line if "tracking" not in override]
    line += [
        *make_data("s3://bucket"),
        f"train.steps={STEPS}",
        "train.checkpoint_every=5",
        "train.log_every=5",
        "train.deterministic=true",
        "tracking=none",
    ]
    finish("framework.train", *line, "train.try_largest_packs=false")  # which changes nothing
    expected = read_ledger(Store(tmp_path / "runs/small"))
    assert sorted(expected) == list(range(STEPS))

    line += ["run.root=s3://bucket/runs", f"train.hang_timeout_s={HANG_TIMEOUT_S}"]
    run = Run(start("framework.train", *line), Store("s3://bucket/runs/small"))
    run.wait_for_commit_after(0)
    hold_a_rank(run)
    take_the_store_away(run, s3_process)
    warn_a_rank(run)
    output = run.stop()
    assert "Traceback" not in output

    alter_the_newest_checkpoint(run)
    output = finish("framework.train", *line)
    assert "checkpoint refused" in output
    assert "was altered (its checksum differs)" in output
    assert "taking the one before" in output
    found = read_ledger(run.store)
    assert clips_of(found) == clips_of(expected)
    assert losses_of(found) == losses_of(expected)  # to the bit


def hold_a_rank(run: Run) -> None:
    """It hangs: the other says where it stands, and the group starts again."""
    attempt = run.attempt()
    run.workers()[-1].send_signal(signal.SIGSTOP)
    run.wait_for_attempt_after(attempt)
    dumps = run.store.list(f"hangs/attempt-{attempt:04d}")
    assert dumps, "no rank said where it stood"
    text = run.store.read(dumps[0]).decode()
    assert "most recent call first" in text
    assert "session.py" in text
    run.wait_for_commit_after(run.committed())


def take_the_store_away(run: Run, server: Process) -> None:
    """No answer for a while: training goes on, and no start is needed."""
    attempt, committed = run.attempt(), run.committed()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        signal.sigtimedwait([], 8)  # an outage has a length: this is the one thing to wait for
    finally:
        os.kill(server.pid, signal.SIGCONT)
    run.wait_for_commit_after(committed)
    assert run.attempt() == attempt


def warn_a_rank(run: Run) -> None:
    """SIGTERM, as a scheduler gives notice: a checkpoint at once, and a new start."""
    attempt = run.attempt()
    run.wait_until(lambda: len(run.workers()) >= 2)
    run.workers()[-1].send_signal(signal.SIGTERM)
    run.wait_for_attempt_after(attempt)
    run.wait_for_commit_after(run.committed())


def alter_the_newest_checkpoint(run: Run) -> None:
    """One byte, in a file that keeps its size."""
    folder = run.store.child("checkpoints", f"step-{run.committed():08d}")
    name = next(name for name in folder.list("state") if name.endswith(".bin"))
    data = bytearray(folder.read(name))
    data[len(data) // 2] ^= 1
    folder.write(name, bytes(data))
