"""`ray job submit` to a cluster with tokens: code and overrides arrive, refusals are clear."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from framework.run.checkpoint import Checkpoints
from framework.storage import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

WHERE = "source != 'none' and height >= 16"  # spaces, quotes, signs
ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A running head, and the environment in which its token is known."""

    dashboard: str
    address: str
    token: str
    environment: dict[str, str]

    def submit(self, working_dir: Path, *command: str, **environment: str) -> tuple[int, str]:
        """`ray job submit`, to its end; the exit status and what was printed."""
        options = ("--working-dir", str(working_dir), "--", *command)
        return self.job("submit", *options, **environment)

    def job(self, word: str, *arguments: str, **environment: str) -> tuple[int, str]:
        """`ray job WORD …`; the exit status and what was printed."""
        done = subprocess.run(
            [str(BIN / "ray"), "job", word, "--address", self.dashboard, *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return done.returncode, done.stdout

    def status(self, job: str) -> str:
        """What the dashboard says of a job."""
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{job}", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["status"]


def with_token(home: Path, token: str) -> dict[str, str]:
    path = home / f"token-{secrets.token_hex(4)}"
    path.touch(mode=0o600)
    path.write_text(token)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path), "HOME": str(home)}


@pytest.fixture
def cluster(tmp_path: Path, free_port: Callable[[], int]) -> Iterator[Cluster]:
    """`ray start --head` with a token of its own, on ports of its own."""
    token = secrets.token_hex(32)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **with_token(tmp_path, token),
        "PATH": f"{BIN}:{os.environ['PATH']}",  # a job's `python` is the head's
    }
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="lt-", dir="/tmp") as folder:  # sockets want it short
        log = tmp_path / "head.log"
        head = subprocess.Popen(
            [
                *(str(BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats"),
                *("--node-ip-address=127.0.0.1", f"--port={port}"),
                *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}"),
                *("--dashboard-agent-listen-port=0", "--min-worker-port=0", "--max-worker-port=0"),
                *("--num-cpus=3", f"--object-store-memory={1100 << 20}", f"--temp-dir={folder}"),
            ],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{dashboard}"
            while not answers(url):
                assert head.poll() is None, log.read_text()
                time.sleep(0.2)
            yield Cluster(url, f"127.0.0.1:{port}", token, environment)
        finally:
            os.killpg(head.pid, signal.SIGKILL)  # the head's own session, with all of Ray
            head.wait(timeout=30)


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it wants a token
    except OSError:
        return False
    return True


def test_the_line_runs_as_a_job(
    cluster: Cluster,
    small_line: list[str],
    small_data: list[str],
    start: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
) -> None:
    # Another version than the installed one: what runs must be what was sent.
    code = tmp_path / "code"
    for name in ("framework", "model_zoo", "conf"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    init = code / "framework/__init__.py"
    init.write_text(init.read_text().replace("__version__ = ", '__version__ = "sent-" + '))

    line = [override for override in small_line if "tracking" not in override]
    line += [*small_data, "tracking=none", "cluster.num_workers=1"]
    line += [f'data.where="{WHERE}"', "optimizer.lr=5e-4"]
    returncode, output = cluster.submit(code, "python", "-m", "framework.train", *line)
    assert returncode == 0, output
    assert "step     12/12" in output
    run = Store(tmp_path / "runs/small")
    checkpoint = Checkpoints(run.child("checkpoints")).latest()
    assert checkpoint is not None
    assert checkpoint.step == 12
    assert checkpoint.meta["code_version"].startswith("sent-")
    assert checkpoint.meta["config"]["data.where"] == WHERE
    assert checkpoint.meta["config"]["optimizer.lr"] == 5e-4
    # Preflight says that all ranks have it.
    assert "sent-" in (run.local_path() / "logs/driver.log").read_text()

    wrong = with_token(tmp_path, secrets.token_hex(32))
    driver = start(
        "framework.train",
        *(*line, "run.name=outside", f"cluster.address={cluster.address}"),
        **{**cluster.environment, **wrong},
    )
    stop_it(cluster, code, [*line, "run.name=stopped", "train.steps=2000"], tmp_path)

    # A relative path would lie in Ray's own copy of the code, and be deleted with it.
    relative = [o for o in line if not o.startswith("run.root")] + ["run.root=runs"]
    returncode, output = cluster.submit(code, "python", "-m", "framework.train", *relative)
    assert returncode != 0
    assert "run.root=runs lies in the job's own copy of the code" in output
    assert "Traceback" not in output

    returncode, output = cluster.submit(code, "python", "-c", "print('in')", **wrong)
    assert returncode != 0
    assert "authentication token is invalid" in output

    said = driver.communicate(timeout=200)[0]
    assert driver.returncode == 2, said
    assert f"no Ray cluster can be joined at {cluster.address}" in said
    assert "RAY_AUTH_TOKEN_PATH must be as on the head" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("include_gitignore", [True, False])
def test_secrets_stay_at_home(include_gitignore: bool, tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    code = tmp_path / "code"
    secret = (".git/config", ".env", ".env.local", "conf/.env", "id.pem", "a/tls.key", ".netrc")
    for name in (*secret, "conf/config.yaml"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("x")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, code)
    create_package(str(code), tmp_path / "code.zip", include_gitignore, excludes=[])
    with zipfile.ZipFile(tmp_path / "code.zip") as package:
        files = {name for name in package.namelist() if not name.endswith("/")}
    assert files == {".gitignore", ".rayignore", "conf/config.yaml"}


def stop_it(cluster: Cluster, code: Path, line: list[str], tmp_path: Path) -> None:
    """`ray job stop` on a run: it commits and stops where it is."""
    patience = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "200"}}'
    options = ["--no-wait", "--submission-id=stopped", f"--runtime-env-json={patience}"]
    options += ["--working-dir", str(code), "--", "python", "-m", "framework.train", *line]
    returncode, output = cluster.job("submit", *options)
    assert returncode == 0, output
    run = Store(tmp_path / "runs/stopped")
    checkpoints = Checkpoints(run.child("checkpoints"))
    while not checkpoints.committed_steps():
        time.sleep(0.5)
        assert cluster.status("stopped") in ("RUNNING", "PENDING"), cluster.job("logs", "stopped")
    returncode, output = cluster.job("stop", "stopped")
    assert returncode == 0, output
    log = (run.local_path() / "logs/driver.log").read_text()
    assert f"stopped at step {checkpoints.committed_steps()[-1]}, committed" in log
