"""Shared by all tests: a small line, and Ray in processes of its own that never outlive a test."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from moto.server import ThreadedMotoServer
from torch import Tensor

from framework.data.config import IndexConfig, SyntheticConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.demo.clips.moving_shapes import write_dataset
from framework.run.checkpoint import Checkpoints
from framework.storage import Store

# Two cores are shared with Ray's workers and servers; more threads only get in each other's way.
torch.set_num_threads(1)

# A line that trains in seconds, on two ranks: the same parts as the demo's, only smaller.
SMALL_LINE = (
    "experiment=demo",
    "data.synthetic.num_clips=96",
    "data.synthetic.clips_per_shard=32",
    "data.index.heldout_fraction=0.2",
    "data.max_tokens=192",
    "model.hidden_size=32",
    "model.ffn=64",
    "model.num_heads=2",
    "model.depth=2",
    "model.text_depth=1",
    "cluster.num_cpus=3",
    "train.steps=12",
    "train.checkpoint_every=4",
    "train.log_every=2",
    "~evaluate.gates",
    "evaluate.num_prompts=8",
    "evaluate.validation_packs=2",
    "sampler.num_steps=2",
)


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, of tensors of the same shape.

    Sums in float32 round in another order under each instruction set. The largest difference grows
    with the outputs' size and number; this does not: some 1e-6.
    """
    assert ours.shape == theirs.shape
    return ((ours - theirs).norm() / theirs.norm().clamp(min=1e-6)).item()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs keep their files in a cache of the tests'; what torch compiles stays where it was."""
    cache = tmp_path_factory.mktemp("cache")
    known = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "torch_extensions")
    (cache / "torch_extensions").symlink_to(known)
    known.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture
def small_line(tmp_path: Path) -> list[str]:
    """Overrides of a run named `small` below tmp_path."""
    return [
        *SMALL_LINE,
        "run.name=small",
        f"run.root={tmp_path}/runs",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The clips of SMALL_LINE."""
    folder = tmp_path_factory.mktemp("small") / "clips"
    write_dataset(SyntheticConfig(num_clips=96, clips_per_shard=32), str(folder))
    return Store(folder)


@pytest.fixture
def make_data(small_shards: Store) -> Callable[[str], list[str]]:
    """Puts these clips and their manifest below a URL, without Ray; gives the overrides that name
    them."""

    def make(root: str) -> list[str]:
        shards, chosen = Store(f"{root}/clips"), IndexConfig(heldout_fraction=0.2)
        names = [name for name in small_shards.list() if name.endswith(".tar")]
        for name in names:
            shards.write(name, small_shards.read(name))
        found = {name: index_shard(shards.url, name, chosen) for name in names}
        write_index(shards.url, f"{root}/manifest", found, chosen)
        return [f"data.shards={root}/clips", f"data.manifest={root}/manifest"]

    return make


@pytest.fixture
def small_data(make_data: Callable[[str], list[str]], tmp_path: Path) -> list[str]:
    """The same below tmp_path, made; the overrides."""
    return make_data(str(tmp_path))


@pytest.fixture
def wait_for_commit() -> Callable[..., int]:
    """Wait until a run has committed a checkpoint later than step `after`; its step."""

    def wait(process: "subprocess.Popen[str]", run: Store, after: int = 0) -> int:
        checkpoints = Checkpoints(run.child("checkpoints"))
        while process.poll() is None:
            steps = checkpoints.committed_steps()
            if steps and steps[-1] > after:
                return steps[-1]
            time.sleep(0.02)
        raise AssertionError(f"the run ended first: {process.communicate()[0][-6000:]}")

    return wait


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Ports that nobody listens at, each another, far from those that Ray takes by default."""
    taken: set[int] = set()

    def port() -> int:
        while True:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                number = free.getsockname()[1]
            if number > 20_000 and number not in taken:
                taken.add(number)
                return number

    return port


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a real S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def use_s3(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """This process and its children take s3:// to be the server at `address`."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def s3_bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket there; this process and its children have the credentials."""
    use_s3(monkeypatch, s3_server)
    for path, method in (("moto-api/reset", "POST"), ("bucket", "PUT")):
        urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{path}", method=method)).close()
    return "s3://bucket"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -m MODULE OVERRIDES…` in a session of its own; all of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(
        module: str, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "HYDRA_FULL_ERROR": "1", **environment},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        try:  # the group is this test's own: nobody else is in that session
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait(timeout=30)


@pytest.fixture
def finish(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., str]:
    """Run a command to its end and give back what it printed; fails where it does."""

    def run(module: str, *arguments: str) -> str:
        process = start(module, *arguments)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == 0, output[-6000:]
        return output

    return run
