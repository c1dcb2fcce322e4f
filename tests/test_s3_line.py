"""The line with everything in object storage, from clips to samples."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.checkpoint import Checkpoints
from framework.storage import Store
from framework.train.report import read_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_trains_from_s3_and_resumes_from_it(
    small_line: list[str],
    s3_bucket: str,
    make_data: Callable[[str], list[str]],
    finish: Callable[..., str],
) -> None:
    command = [*small_line, *make_data(s3_bucket), f"run.root={s3_bucket}/runs"]
    printed = finish("framework.train", *command)
    run = Store(f"{s3_bucket}/runs/small")
    assert f"committed: {run.url}/checkpoints/step-00000012" in printed
    expected = read_ledger(run)
    assert sorted(expected) == list(range(12))
    logs = run.list("logs")
    assert {name.split("/")[1].rsplit("-", 1)[0] for name in logs} == {
        "driver",
        "rank-00000",
        "rank-00001",
    }

    checkpoints = run.child("checkpoints")
    checkpoints.delete_folder("step-00000012")
    printed = finish("framework.train", *command)
    assert "resuming at step 8" in printed
    assert Checkpoints(checkpoints).committed_steps()[-1] == 12
    found = read_ledger(run)
    assert {s: row["clips"] for s, row in found.items()} == {
        s: row["clips"] for s, row in expected.items()
    }

    finish("framework.sample", *command, 'sample.prompts=["a red circle over grey"]')
    assert run.exists("samples/00-a-red-circle-over-grey.mp4")
    assert "evaluated already" not in finish("framework.evaluate", *command)


def test_a_command_beside_a_server_of_its_own_leaves_its_results(tmp_path: Path) -> None:
    program = (
        "from framework.storage import Store; s = Store('s3://made/run');"
        "s.write('summary.json', b'{}'); s.write('clips/0.tar', b'x'); raise SystemExit(3)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "framework.local_s3", "made", str(tmp_path / "kept")),
            *(sys.executable, "-c", program),
        ],
        env=environment,
        timeout=200,
    )
    assert done.returncode == 3
    assert (tmp_path / "kept/run/summary.json").read_bytes() == b"{}"
    assert not (tmp_path / "kept/run/clips").exists()
