"""A command beside an S3 server of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow]


def test_its_results_are_kept_and_its_exit_status_given(tmp_path: Path) -> None:
    program = (
        "from framework.storage import Store; s = Store('s3://made/run');"
        "s.write('summary.json', b'{}'); s.write('clips/0.tar', b'x'); raise SystemExit(3)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "framework.demo.local_s3", "made", str(tmp_path / "kept")),
            *(sys.executable, "-c", program),
        ],
        env=environment,
        timeout=200,
    )
    assert done.returncode == 3
    assert (tmp_path / "kept/run/summary.json").read_bytes() == b"{}"
    assert not (tmp_path / "kept/run/clips").exists()
