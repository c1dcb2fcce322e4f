"""Shared by all tests: a small line, and Ray in processes of its own that never outlive a test."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Two cores are shared with Ray's workers and servers; more threads only get in each other's way.
torch.set_num_threads(1)

# A line that trains in seconds, on two ranks: the same parts as the demo's, only smaller.
SMALL_LINE = (
    "experiment=demo",
    "data.synthetic.num_clips=96",
    "data.synthetic.clips_per_shard=32",
    "data.heldout_fraction=0.2",
    "data.max_tokens=192",
    "model.width=32",
    "model.ffn=64",
    "model.num_heads=2",
    "model.depth=2",
    "model.text_depth=1",
    "train.steps=12",
    "train.checkpoint_every=4",
    "train.log_every=2",
    "~evaluate.gates",
    "evaluate.num_prompts=8",
    "evaluate.validation_packs=2",
    "sampler.num_steps=2",
)


@pytest.fixture
def small_line(tmp_path: Path) -> list[str]:
    """Overrides of a run named `small` below tmp_path."""
    return [
        *SMALL_LINE,
        "run.name=small",
        f"run.root={tmp_path}/runs",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    ]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -m MODULE OVERRIDES…` in a session of its own; all of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(module: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
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
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output[-6000:]
        return output

    return run
