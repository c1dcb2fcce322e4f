"""A real run for benchmarks: `python -m framework.train` in a session of its own, watched, killed.

Nothing is added to the run: what it does, and when, is read from its own journal of metrics, where
rank 0 writes a line for every step, with the time, as soon as it logs it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from framework.data.config import IndexConfig, SyntheticConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.demo.clips.moving_shapes import write_dataset
from framework.run.checkpoint import Checkpoints
from framework.storage import Store

LOOK_EVERY_S = 0.1


def make_data(root: str, num_clips: int) -> list[str]:
    """Synthetic clips and their manifest below a URL; the overrides that name them."""
    write_dataset(SyntheticConfig(num_clips=num_clips), f"{root}/clips")
    store = Store(f"{root}/clips")
    shards = [name for name in store.list() if name.endswith(".tar")]
    found = {name: index_shard(store.url, name, IndexConfig()) for name in shards}
    write_index(store.url, f"{root}/manifest", found, IndexConfig())
    return [f"data.shards={root}/clips", f"data.manifest={root}/manifest"]


@dataclass(frozen=True)
class Step:
    """One execution of a step, as the journal has it."""

    number: int
    at: float  # when it was logged, in seconds since 1970
    attempt: int  # of the workers, from 1
    figures: dict[str, float]  # of the step, and of the window that it ends


class RealRun:
    """One run, below `folder`; the same command may be started again and again."""

    def __init__(
        self,
        folder: Path,
        overrides: list[str],
        root: str | None = None,
        environment: Mapping[str, str] | None = None,
        mlflow: str | None = None,
    ) -> None:
        """`root`: where the run lives, a URL; `mlflow`: its tracker; both else below `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, root = folder, root or f"{folder}/runs"
        self.store = Store(f"{root}/run")
        self.mlflow = mlflow or f"sqlite:///{folder}/mlflow.db"
        own = [f"run.root={root}", "run.name=run", f"tracking.uri={self.mlflow}"]
        self._command = [sys.executable, "-m", "framework.train", *overrides, *own]
        home = {"HOME": f"{folder}/home", "XDG_CACHE_HOME": f"{folder}/home/.cache"}
        self._environment = {**os.environ, **(environment or {}), **home}
        self.process: subprocess.Popen[bytes] | None = None
        self.steps: list[Step] = []
        self._offset = self._attempt = 0

    def __enter__(self) -> "RealRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> float:
        """Begin the command; when, in seconds since 1970."""
        (self.folder / "home").mkdir(exist_ok=True)
        with (self.folder / "output.log").open("ab") as log:
            began = time.time()
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment,
            )
        return began

    def start_and_train(self) -> float:
        """Begin the command; the seconds to the first step that it trained."""
        attempt, began = self._attempt, self.start()
        return self.wait_for_step(lambda step: step.attempt > attempt).at - began

    def ended(self) -> bool:
        """Whether the command is not running."""
        return self.process is None or self.process.poll() is not None

    def workers(self) -> list[psutil.Process]:
        """The ranks that live, by pid."""
        return sorted(
            (p for p in self._tree() if "RayTrainWorker" in _title(p)), key=lambda p: p.pid
        )

    def look(self) -> None:
        """Read what the journal has got since; new steps are added to `steps`."""
        path = self._journal()
        if path is None:
            return
        with path.open("rb") as file:
            if (
                file.seek(0, os.SEEK_END) < self._offset
            ):  # it started over, see framework.tracking.journal
                self._offset = 0
            file.seek(self._offset)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            with contextlib.suppress(ValueError):  # torn by a kill
                self._take(json.loads(line))

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 600.0) -> None:
        """Look until something has happened; RuntimeError where the run ends before, or in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            has_ended = self.ended()
            self.look()
            if happened():
                return
            if has_ended or time.monotonic() > deadline:
                raise RuntimeError(f"it ended, or hangs: {self.last_words()}")
            time.sleep(LOOK_EVERY_S)

    def wait_for_step(self, wanted: Callable[[Step], bool]) -> Step:
        """The first step of this kind that was trained, ever."""
        self.wait_for(lambda: any(map(wanted, self.steps)))
        return next(filter(wanted, self.steps))

    def finish(self, timeout_s: float = 3600.0) -> None:
        """Wait for the command's end; RuntimeError where it fails."""
        self.wait_for(self.ended, timeout_s)
        if self.process is not None and self.process.returncode != 0:
            raise RuntimeError(f"it failed: {self.last_words()}")

    def committed(self) -> int:
        """The last committed step; 0 before the first."""
        return (Checkpoints(self.store.child("checkpoints")).committed_steps() or [0])[-1]

    def last_words(self) -> str:
        """The end of what it printed."""
        return (self.folder / "output.log").read_text(errors="replace")[-3000:]

    def kill(self) -> None:
        """kill -9 of the whole session, and of what left it."""
        if self.process is None:
            return
        tree = self._tree()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in tree:
            with contextlib.suppress(psutil.NoSuchProcess):  # it knows a pid that was given anew
                child.kill()
        self.process.wait(timeout=60)
        psutil.wait_procs(tree, timeout=60)

    def _tree(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _journal(self) -> Path | None:
        """Of rank 0: with the run where that is local, else in the cache of its HOME."""
        places = ("runs/run/journal/rank-0", "home/.cache/longtake/*/rank-0")
        found = [path for p in places for path in self.folder.glob(f"{p}/journal.jsonl")]
        return found[0] if found else None

    def _take(self, entry: dict) -> None:
        if entry.get("op") == "open":
            self._attempt += 1
        values = entry.get("values", {})
        if "train/loss" in values:
            step = Step(entry["step"], entry["time"] / 1e3, self._attempt, dict(values))
            self.steps.append(step)
        elif self.steps and "speed/step_s" in values:  # of the window that this step ends
            self.steps[-1].figures.update(values)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
