"""A local Ray is of its user alone: nobody joins it without its token, or enters its folder."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

OWNER = """
import json, os, ray
from pathlib import Path
from framework.cluster import ClusterConfig, connect
connect(ClusterConfig(num_cpus=1, object_store_mb=100))
token = os.environ["RAY_AUTH_TOKEN"].encode()
session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
folder = session.parent.parent
def holds(path):
    try:
        return token in path.read_bytes()
    except OSError:  # a process that has gone, or a socket
        return False
print(json.dumps({
    "address": ray.get_runtime_context().gcs_address,
    "folder": str(folder),
    "mode": folder.stat().st_mode & 0o777,
    "computed": ray.get(ray.remote(lambda: 6 * 7).remote()),
    "token shown by": [str(p) for p in Path("/proc").glob("[0-9]*/cmdline") if holds(p)]
    + [str(p) for p in session.rglob("*") if p.is_file() and holds(p)],
}), flush=True)
input()
"""
STRANGER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print("joined", ray.get(ray.remote(lambda: 6 * 7).remote()))
"""


def strangers() -> dict[str, dict[str, str]]:
    return {
        "no token": {"RAY_AUTH_MODE": "disabled"},
        "a wrong one": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
    }


def test_nobody_joins_a_local_run(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**clean, "HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"},  # as a user may have it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        said = json.loads(owner.stdout.readline())
        assert (said["computed"], said["mode"]) == (42, 0o700)
        assert said["token shown by"] == []
        for name, token in strangers().items():
            done = subprocess.run(
                [sys.executable, "-c", STRANGER, said["address"]],
                env={**clean, "HOME": str(tmp_path), **token},
                capture_output=True,
                text=True,
                timeout=200,
            )
            assert done.returncode != 0, name
            assert "joined" not in done.stdout, name
        owner.communicate("done\n", timeout=100)
        assert owner.returncode == 0
        assert not Path(said["folder"]).exists()
        assert not (tmp_path / ".ray").exists()  # no token is left in the home
    finally:
        owner.kill()
