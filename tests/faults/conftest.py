"""What the fault tests share: an undisturbed run to compare with, and a user's own faulty model."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

import framework
from framework.run.checkpoint import Checkpoints
from framework.run.fence import read_attempt
from framework.storage import Store
from tests.conftest import use_s3

Process = subprocess.Popen[str]

FAULTY_MODEL = '''
"""A user's own model, with a mistake in it for each of some clips."""
from dataclasses import dataclass, field

import torch

from model_zoo.models.dit import DiT, DiTConfig


@dataclass(frozen=True)
class FaultyConfig(DiTConfig):
    faults: dict[str, int] = field(default_factory=dict)  # what goes wrong, and at which clip

    def build(self, *args, **kwargs):
        model = super().build(*args, **kwargs)
        model.__class__, model.faults = Faulty, self.faults
        return model


class Faulty(DiT):
    def forward(self, tokens, t, layout, text):
        out = super().forward(tokens, t, layout, text)
        ids = layout.clip_ids.tolist()
        if self.faults.get("nan") in ids:
            out = out * float("nan")
        if self.faults.get("spike") in ids:
            out = out + 100.0
        if "bug" in self.faults:
            return out["velocity"]
        if "memory" in self.faults:
            out = out + torch.empty(1 << 50)[0]
        return out
'''


@dataclass(frozen=True)
class UserCode:
    """A checkout of a user's own, with `model=faulty`."""

    folder: Path
    start: Callable[..., Process]

    def train(self, *overrides: str) -> Process:
        return self.start("framework.train", *overrides, cwd=self.folder)


@pytest.fixture
def user_code(tmp_path: Path, start: Callable[..., Process]) -> UserCode:
    root = Path(framework.__file__).parent.parent
    folder = tmp_path / "code"
    for name in ("framework", "model_zoo", "conf"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "model_zoo/faulty.py").write_text(FAULTY_MODEL)
    yaml = "defaults: [dit_xs, _self_]\n_target_: model_zoo.faulty.FaultyConfig\n"
    (folder / "conf/model/faulty.yaml").write_text(yaml)
    return UserCode(folder, start)


@dataclass(frozen=True)
class Run:
    """A run under way, and what its store says of it."""

    process: Process
    store: Store

    def committed(self) -> int:
        return (Checkpoints(self.store.child("checkpoints")).committed_steps() or [0])[-1]

    def attempt(self) -> int:
        return int(read_attempt(self.store).get("number", 0))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 600
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0][-6000:]
            assert time.monotonic() < deadline, f"it does not come; see {self.store.url}/logs"
            time.sleep(0.05)  # a store tells nobody when it changes

    def wait_for_commit_after(self, step: int) -> None:
        self.wait_until(lambda: self.committed() > step)

    def wait_for_attempt_after(self, number: int) -> None:
        self.wait_until(lambda: self.attempt() > number)

    def workers(self) -> list[psutil.Process]:
        """The ranks that live, the oldest first."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                    found.append(child)
        return sorted(found, key=lambda child: child.create_time())

    def end(self) -> str:
        """What it printed, once it has ended well."""
        output = self.process.communicate(timeout=900)[0]
        assert self.process.returncode == 0, output[-6000:]
        return output

    def stop(self) -> str:
        """Ctrl-C, and what it printed."""
        os.killpg(self.process.pid, signal.SIGINT)
        output = self.process.communicate(timeout=200)[0]
        assert self.process.returncode == 130, output[-6000:]
        return output


def clips_of(ledger: dict[int, dict[str, Any]]) -> dict[int, list[int]]:
    return {step: row["clips"] for step, row in ledger.items()}


def losses_of(ledger: dict[int, dict[str, Any]]) -> dict[int, float]:
    return {step: row["loss"] for step, row in ledger.items()}


def skipped_in(run: Store) -> dict[int, str]:
    """Why the ledger of rank 0 says that steps were skipped."""
    found = {}
    for name in run.list("ledger"):
        if name.endswith("rank-00000.jsonl"):
            rows = [json.loads(line) for line in run.read(name).decode().splitlines()]
            found |= {row["step"]: row["skipped"] for row in rows if "skipped" in row}
    return found


@pytest.fixture
def s3_process(free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """A real S3 server in a process of its own, which can be held; the bucket is s3://bucket."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    address = f"http://127.0.0.1:{port}"
    use_s3(monkeypatch, address)
    try:
        while True:
            assert server.poll() is None
            with contextlib.suppress(OSError):
                request = urllib.request.Request(f"{address}/bucket", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            time.sleep(0.1)  # it says nothing when it is ready
        yield server
    finally:
        server.send_signal(signal.SIGCONT)
        server.kill()
        server.wait(timeout=30)
