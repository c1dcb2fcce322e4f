"""A user's mistakes end a run at once, in their own words; a bad clip costs what the rule says."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.run.fence import read_attempt
from framework.run.ledger import read_ledger
from framework.storage import Store
from tests.faults.conftest import UserCode, clips_of, losses_of, skipped_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 30


@pytest.fixture
def line(small_line: list[str], small_data: list[str]) -> list[str]:
    without_tracking = [override for override in small_line if "tracking" not in override]
    return [
        *without_tracking,
        *small_data,
        "tracking=none",
        f"train.steps={STEPS}",
        "train.checkpoint_every=5",
        "train.log_every=5",
        "train.deterministic=true",
        "train.try_largest_packs=false",
    ]


def test_steps_that_went_wrong_are_left_out_and_nothing_else(
    user_code: UserCode, line: list[str], finish: Callable[..., str], tmp_path: Path
) -> None:
    finish("framework.train", *line)
    expected = read_ledger(Store(tmp_path / "runs/small"))
    nan_step, spike_step = 7, 23
    nan, spike = expected[nan_step]["clips"][0], expected[spike_step]["clips"][0]
    assert len(expected) == STEPS

    process = user_code.train(
        *line,
        "model=faulty",
        "run.name=faulty",
        f"model.faults={{nan: {nan}, spike: {spike}}}",
        "train.guard.on_spike=rollback",
    )
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output[-6000:]
    assert f"step {spike_step} has a loss spike" in output
    assert f"back to step 20, and on without step {spike_step}" in output

    run = Store(tmp_path / "runs/faulty")
    assert json.loads(run.read("left-out-steps.json")) == [spike_step]
    # A pass has 16 steps, so each of the two clips may come once more.
    bad = {step for step, row in expected.items() if {nan, spike} & set(row["clips"])}
    skipped = skipped_in(run)
    assert {nan_step: skipped[nan_step], spike_step: skipped[spike_step]} == {
        nan_step: "not finite",
        spike_step: "rolled back",
    }
    assert set(skipped) <= bad
    found = read_ledger(run)
    assert clips_of(found) == clips_of(expected)
    before = {step: loss for step, loss in losses_of(expected).items() if step < min(bad)}
    assert {step: losses_of(found)[step] for step in before} == before
    assert found[nan_step]["loss"] is None
    assert read_attempt(run)["number"] == 1, "no restart was needed"


@pytest.mark.parametrize(
    ("fault", "options", "words"),
    [
        ("bug", ["cluster.num_workers=1"], "IndexError"),
        ("memory", ["train.try_largest_packs=true"], "memory runs out on a pack that the recipe"),
    ],
)
def test_a_mistake_of_the_users_own_ends_the_run_at_once(
    user_code: UserCode,
    line: list[str],
    tmp_path: Path,
    fault: str,
    options: list[str],
    words: str,
) -> None:
    process = user_code.train(*line, "model=faulty", f"model.faults={{{fault}: 1}}", *options)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 2, output[-6000:]
    assert "error: " in output
    assert words in output.split("error: ")[1]
    assert "faulty.py" in output or fault == "memory"
    assert read_attempt(Store(tmp_path / "runs/small"))["number"] == 1, "it was tried again"


IN_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=64m none "$DISK"
"$@" > "$OUT/first.log" 2>&1 &
train=$!
until ls "$DISK"/runs/small/checkpoints/*/COMMITTED > /dev/null 2>&1; do
    kill -0 $train; sleep 0.1
done
head -c 64m /dev/zero > "$DISK/full" 2> /dev/null || true
code=0; wait $train || code=$?
echo $code > "$OUT/code"
rm "$DISK/full"
"$@" > "$OUT/second.log" 2>&1
cp -r "$DISK/runs" "$OUT/runs"
"""


def test_a_full_disk_ends_the_run_and_the_next_resumes(line: list[str], tmp_path: Path) -> None:
    """In a mount namespace of its own, with a disk of 64 MB that somebody fills."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ("unshare", "--mount", "--map-root-user")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives no mount namespace")
    command = [sys.executable, "-m", "framework.train", *line, f"run.root={disk}/runs"]
    command += ["train.steps=80", "train.keep_checkpoints=1"]
    done = subprocess.run(
        [*alone, "sh", "-c", IN_A_SMALL_DISK, "sh", *command],
        env={**os.environ, "DISK": str(disk), "OUT": str(tmp_path)},
        timeout=600,
    )
    printed = (tmp_path / "first.log").read_text()
    assert done.returncode == 0, printed[-3000:]
    assert (tmp_path / "code").read_text().strip() == "2", printed[-3000:]
    assert "No space left on device" in printed.split("error: ")[-1]
    again = (tmp_path / "second.log").read_text()
    assert "resuming at step" in again
    assert sorted(read_ledger(Store(tmp_path / "runs/small"))) == list(range(80))
