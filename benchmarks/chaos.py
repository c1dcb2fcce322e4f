"""A run that is disturbed at random for as long as you like: what it loses, whether it is right.

    python -m benchmarks.chaos --minutes 60 --mtbf-s 120 [--seed 0] [--quick]
                               [--store-away-s 60 60] [--mlflow-away-s 600]

The small line of the tests on two ranks, in a bucket of an S3 server (moto) and on an MLflow
server, in processes of their own. At exponentially distributed times, `--mtbf-s` apart on the
average, one of these, all alike probable, meets it:

    rank killed     kill -9 of a worker
    driver killed   kill -9 of the driver's whole session; the same command at once
    notice          SIGTERM to a worker
    rank hangs      SIGSTOP of a worker; SIGCONT comes long after the others have given up
    store away      SIGSTOP of the S3 server, for 5 to 20 s where `--store-away-s` does not say

`--mlflow-away-s` holds the MLflow server as well, once, from the third minute on. The next event
may come before the last is over. A command that ends by itself (too many failures without a
checkpoint between) is started again and counted as well. When time is up, the run is stopped by
Ctrl-C, which commits. Then the same run is made without disturbance, up to the same step of as
many, and the ledgers are compared: clips of each step, and losses, to the bit. MLflow must have
each step's loss once.

goodput: seconds of steps whose last execution was kept (`speed/step_s` without `data/wait_share`),
over wall time from the first command to the run's orderly end. Beside it the run's own
`run/goodput`, whose wall leaves out what lies between two drivers. steps_redone: executions logged
less steps. Recovery: from an event to the end of the first step, after it, that was not done before
it. Steps have their metrics logged one by one, which they would not in earnest.

The last line is JSON.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from benchmarks.real_run import LOOK_EVERY_S, RealRun, make_data
from framework.demo.local_s3 import s3_server
from framework.run.ledger import read_ledger

NUM_CLIPS = 960  # about 250 steps an epoch
MAX_STEPS_PER_S = 10  # more than it makes; the run must not come to its last step
MLFLOW_AWAY_FROM_S = 120.0
MAX_GIVEN_UP = 5  # ends of the command in a row without a new step: then it is a bug
LINE = [
    "experiment=demo",
    "~evaluate.gates",
    "data.max_tokens=192",
    "model.hidden_size=32",
    "model.ffn=64",
    "model.num_heads=2",
    "model.depth=2",
    "model.text_depth=1",
    "train.checkpoint_every=25",
    "train.log_every=1",
    "train.deterministic=true",
]


@dataclass
class Event:
    """Something that happened to the run."""

    kind: str
    at: float
    done: int  # the last step that was done before, by number


class Freezer:
    """Processes that were stopped, until they go on."""

    def __init__(self) -> None:
        self._frozen: list[tuple[float, psutil.Process]] = []

    def freeze(self, process: psutil.Process, seconds: float) -> None:
        """SIGSTOP of it and its children, and SIGCONT so much later."""
        for stopped in (process, *process.children(recursive=True)):
            stopped.suspend()
            self._frozen.append((time.monotonic() + seconds, stopped))

    def thaw(self, everything: bool = False) -> None:
        """Those whose time is over go on, or all; call it often."""
        for due, process in list(self._frozen):
            if everything or time.monotonic() >= due:
                self._frozen.remove((due, process))
                try:
                    process.resume()
                except psutil.NoSuchProcess:
                    continue  # killed meanwhile


@dataclass
class Chaos:
    """Disturbs a run; `store` and `mlflow` are the servers' processes."""

    run: RealRun
    store: psutil.Process
    mlflow: psutil.Process
    chance: random.Random
    mtbf_s: float
    hang_s: float
    store_away_s: tuple[float, float]
    mlflow_away_s: float
    freezer: Freezer = field(default_factory=Freezer)
    events: list[Event] = field(default_factory=list)

    def go_on(self, seconds: float) -> None:
        """Until time is up."""
        kinds = {
            "rank killed": self._kill_rank,
            "driver killed": self._kill_driver,
            "notice": self._notice,
            "rank hangs": self._hang,
            "store away": self._store_away,
        }
        deadline = time.monotonic() + seconds
        mlflow_due = time.monotonic() + MLFLOW_AWAY_FROM_S
        due, kind = self._next(list(kinds))
        given_up = 0
        while time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            self.freezer.thaw()
            self.run.look()
            if self.run.ended():
                given_up = given_up + 1 if self._is_stuck() else 1
                if given_up > MAX_GIVEN_UP:
                    raise RuntimeError(f"it ends again and again: {self.run.last_words()}")
                self._note("command ended")
                self.run.start()
            if self.mlflow_away_s and time.monotonic() >= mlflow_due:
                self._note("MLflow away", f"for {self.mlflow_away_s:.0f} s")
                self.freezer.freeze(self.mlflow, self.mlflow_away_s)
                mlflow_due = math.inf
            needs_worker = kind in ("rank killed", "notice", "rank hangs")
            if time.monotonic() >= due and (self.run.workers() or not needs_worker):
                kinds[kind]()
                due, kind = self._next(list(kinds))
        self.freezer.thaw(everything=True)

    def _next(self, kinds: list[str]) -> tuple[float, str]:
        """When something happens next, and what."""
        wait_s = self.chance.expovariate(1 / self.mtbf_s)
        return time.monotonic() + wait_s, self.chance.choice(kinds)

    def _is_stuck(self) -> bool:
        """Whether the command ended the last time as well, with no new step since."""
        ends = [event for event in self.events if event.kind == "command ended"]
        return bool(ends) and ends[-1].done == _last_done(self.run)

    def _note(self, kind: str, victim: str = "") -> None:
        self.events.append(Event(kind, time.time(), _last_done(self.run)))
        print(f"  {time.strftime('%H:%M:%S')}  step {self.events[-1].done:>6}  {kind} {victim}")

    def _victim(self) -> psutil.Process:
        return self.chance.choice(self.run.workers())

    def _kill_rank(self) -> None:
        victim = self._victim()
        self._note("rank killed", str(victim.pid))
        victim.kill()

    def _kill_driver(self) -> None:
        self._note("driver killed")
        self.run.kill()
        self.run.start()

    def _notice(self) -> None:
        victim = self._victim()
        self._note("notice", str(victim.pid))
        victim.terminate()

    def _hang(self) -> None:
        victim = self._victim()
        self._note("rank hangs", str(victim.pid))
        self.freezer.freeze(victim, self.hang_s)

    def _store_away(self) -> None:
        seconds = self.chance.uniform(*self.store_away_s)
        self._note("store away", f"for {seconds:.0f} s")
        self.freezer.freeze(self.store, seconds)


def _last_done(run: RealRun) -> int:
    return max((step.number for step in run.steps), default=-1)


def recoveries(run: RealRun, events: list[Event]) -> dict[str, list[float]]:
    """Kind -> seconds from each event to the next step that was not done before it."""
    found: dict[str, list[float]] = {}
    for event in events:
        new = [s.at for s in run.steps if s.at >= event.at and s.number > event.done]
        if new:  # else time was up first
            found.setdefault(event.kind, []).append(min(new) - event.at)
    return found


def productive_s(run: RealRun, steps: int) -> float:
    """Seconds of the last execution of each of the first steps, without their wait for data."""
    last = {step.number: step.figures for step in run.steps if step.number < steps}
    return sum(
        figures["speed/step_s"] * (1 - figures["data/wait_share"])
        for figures in last.values()
        if "speed/step_s" in figures
    )


def stop(run: RealRun, timeout_s: float) -> None:
    """By Ctrl-C: the run commits where it is."""
    if run.ended():
        run.start()
    run.wait_for(lambda: bool(run.workers()), timeout_s)
    assert run.process is not None
    os.kill(run.process.pid, signal.SIGINT)
    run.wait_for(run.ended, timeout_s)
    run.look()


def compare(expected: dict[int, dict[str, Any]], found: dict[int, dict[str, Any]]) -> list[str]:
    """What differs between two ledgers, step by step; the second may be shorter."""
    problems = []
    if sorted(found) != list(range(len(found))):
        problems.append(f"steps are missing: {sorted(set(range(max(found) + 1)) - set(found))}")
    for step, row in sorted(found.items()):
        for name in ("clips", "loss"):
            if row[name] != expected[step][name]:
                problems.append(f"step {step}: {name} {row[name]}, expected {expected[step][name]}")
    return problems


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    """Its address and its process."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **quiet}
        )
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            if server.poll() is not None:
                raise SystemExit((folder / "server.log").read_text())
            time.sleep(0.2)  # it says nothing when it is ready
        yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait(timeout=60)


def steps_in_mlflow(uri: str) -> list[int]:
    """Of the loss of the only run that the server has."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("longtake").experiment_id])
    return sorted(m.step for m in client.get_metric_history(run.info.run_id, "train/loss"))


def main() -> None:
    """Print what happens, a table, and one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--mtbf-s", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-timeout-s", type=float, default=30.0)
    parser.add_argument("--store-away-s", type=float, nargs=2, default=(5.0, 20.0))
    parser.add_argument("--mlflow-away-s", type=float, default=0.0)
    parser.add_argument("--quick", action="store_true", help="3 minutes, an event every 40 s")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    minutes, mtbf_s = (3.0, 40.0) if options.quick else (options.minutes, options.mtbf_s)
    with (
        tempfile.TemporaryDirectory() as name,
        s3_server("bench", Path(name) / "s3.log") as environment,
        mlflow_server(Path(name) / "mlflow") as (mlflow_uri, mlflow),
    ):
        folder = Path(name)
        (server,) = (p for p in psutil.Process().children() if "moto.server" in p.cmdline())
        os.environ.update(environment)  # of this process, which looks at the store as well
        steps = math.ceil(60 * minutes * MAX_STEPS_PER_S)
        line = [*LINE, *make_data("s3://bench/data", NUM_CLIPS), f"train.steps={steps}"]
        line.append(f"train.hang_timeout_s={options.hang_timeout_s}")
        with RealRun(folder / "disturbed", line, "s3://bench/disturbed", mlflow=mlflow_uri) as run:
            chaos = Chaos(
                run,
                server,
                mlflow,
                random.Random(options.seed),
                mtbf_s,
                2 * options.hang_timeout_s,
                tuple(options.store_away_s),
                options.mlflow_away_s,
            )
            began = run.start()
            try:
                chaos.go_on(60 * minutes)
                stop(run, timeout_s=300)
            except RuntimeError as error:  # what was committed is compared all the same
                print(error)
            finally:
                chaos.freezer.thaw(everything=True)
                run.kill()
            wall_s, committed = time.time() - began, run.committed()
            found = read_ledger(run.store)
        in_mlflow = steps_in_mlflow(mlflow_uri)
        with RealRun(folder / "undisturbed", line, "s3://bench/undisturbed") as whole:
            whole.start()
            whole.wait_for(lambda: whole.committed() >= committed, timeout_s=600 + 2 * wall_s)
            expected = read_ledger(whole.store)
    problems = compare(expected, found)
    if in_mlflow != list(range(committed)):
        missing = sorted(set(range(committed)) - set(in_mlflow))
        problems.append(f"MLflow has {len(in_mlflow)} of {committed} losses; missing: {missing}")
    report(run, chaos.events, wall_s, committed, problems)


def report(
    run: RealRun, events: list[Event], wall_s: float, committed: int, problems: list[str]
) -> None:
    """The table and the JSON line."""
    by_kind, counts = recoveries(run, events), Counter(event.kind for event in events)
    print(f"\n{'event':16}{'times':>7}{'s to the next new step, median':>34}{'worst':>9}")
    for kind, count in sorted(counts.items()):
        seconds = by_kind.get(kind, [math.nan])
        print(f"{kind:16}{count:>7}{statistics.median(seconds):>34.1f}{max(seconds):>9.1f}")
    everything = [s for seconds in by_kind.values() for s in seconds] or [math.nan]
    own = [s.figures["run/goodput"] for s in run.steps if "run/goodput" in s.figures]
    distinct = len({step.number for step in run.steps})
    print(f"{committed} steps committed in {wall_s / 60:.1f} min, {run.steps[-1].attempt} attempts")
    for problem in problems[:20]:
        print(f"  {problem}")
    print(
        json.dumps(
            {
                "goodput": round(productive_s(run, committed) / wall_s, 4),
                "run_goodput": round(own[-1], 4),
                "steps_redone": len(run.steps) - distinct,
                "steps": committed,
                "recovery_s_median": round(statistics.median(everything), 1),
                "recovery_s_worst": round(max(everything), 1),
                "ledger_equal": not problems,
                "events": dict(counts),
            }
        )
    )


if __name__ == "__main__":
    main()
