"""The parts of `benchmarks.engine` that run on bare ranks: gloo processes of one thread each.

    python -m benchmarks.engine_ranks JOB WORLD FOLDER

`run_ranks` starts it; FOLDER/work.json says what there is to do. Times are of the slowest rank.
"""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from framework.assembly import Assembly
from framework.cluster import KEEP_MEMORY
from framework.config import compose
from framework.data.stream.collate import assemble
from framework.storage import Store
from framework.train.engine.plain import PlainConfig
from framework.train.engine.protocol import Engine
from framework.train.engine.zero import ZeroConfig
from framework.train.loop import StepInput, train

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What the ranks are given; travels as JSON."""

    overrides: list[str]  # of the line
    plan: str  # URL of a run's folder, for plans
    steps: int  # of the line; so many are timed
    saves: int = 0  # pairs of saves; loads
    stores: dict[str, str] | None = None  # name -> URL of a checkpoint's folder


def run_ranks(
    job: str, world: int, work: Work, folder: Path, environment: Mapping[str, str] | None = None
) -> Any:
    """What the job returned on rank 0 of `world`; RuntimeError where a rank failed."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*"):
        old.unlink()
    (folder / "work.json").write_text(json.dumps(asdict(work)))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.engine_ranks", job, str(world), str(folder)],
        env={**os.environ, **KEEP_MEMORY, **(environment or {})},  # as a driver sets it for ranks
        start_new_session=True,
    )
    try:
        code = process.wait(timeout=3600)
    finally:
        with contextlib.suppress(ProcessLookupError):  # ranks that wait for one that is gone
            os.killpg(process.pid, signal.SIGKILL)
    if code:
        logs = "\n".join(log.read_text()[-2000:] for log in folder.glob("*.log"))
        raise RuntimeError(f"{job} on {world} ranks: {logs}")
    return json.loads((folder / "result.json").read_text())


class Line:
    """The line's packs in memory, and its engines."""

    def __init__(self, work: Work, rank: int, world: int) -> None:
        self.config = compose(work.overrides)
        self.assembly = Assembly.of(self.config)
        self.objective = self.assembly.build_objective()
        self.num_steps, self.world = work.steps, world
        self._store, self._rank = Store(work.plan), rank

    def build(self, engine: Any) -> Engine:
        """The engine of this config, at step 0."""
        return engine.build(self._model, self.config.optimizer, self.num_steps, CPU)

    def _model(self) -> nn.Module:
        model: Any = self.assembly.build_model()
        model.set_checkpointing(self.config.train.activation_checkpointing)
        return model

    def steps(self) -> list[StepInput]:
        """This rank's share of the plan's first steps, with their random draws."""
        plan = self.assembly.planner().make(self._store, self.num_steps, lambda text: None)
        reader = self.assembly.reader(
            self.assembly.planner().pinned_manifest(self._store).shards_url
        )
        made = []
        for number in range(self.num_steps):
            epoch, epoch_step = plan.locate(number)
            totals, packs = plan.totals(epoch, epoch_step), []
            num_averaged = totals.averaged_over(self.objective.averaged_over)
            for pack in plan.packs(epoch, epoch_step, self._rank, self.world):
                batch = assemble(pack, reader, plan.recipe, self.assembly.data.stream.static_shapes)
                packs.append((batch, self.objective.draw(batch, self.assembly.seed, number)))
            made.append(StepInput(number, epoch, epoch_step, num_averaged, totals.tokens, packs))
        return made

    def train(self, engine: Engine, step: StepInput) -> None:
        """One step, by the loop of real runs."""
        train(
            engine,
            self.objective,
            [step],
            lambda inputs, loss_share: (loss_share.item(), ""),
            lambda output: True,
            dp_size=self.world,
            device=CPU,
        )


def timed(action: Callable[[], object]) -> float:
    """Seconds that it takes the slowest rank, all beginning together."""
    distributed.barrier()
    began = time.perf_counter()
    action()
    seconds: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(seconds, time.perf_counter() - began)
    return max(seconds)


def time_steps(name: str, work: Work, rank: int, world: int) -> Any:
    """Seconds of each step in one engine, "plain" or "zero".

    Each in processes of its own, as the real line has it: in turns in one process, ZeRO-3 seemed
    faster than plain.
    """
    line = Line(work, rank, world)
    zero = line.config.engine
    assert isinstance(zero, ZeroConfig), zero
    engine = line.build(zero if name == "zero" else PlainConfig(ema_decay=zero.ema_decay))
    return [timed(partial(line.train, engine, step)) for step in line.steps()]


def time_saves(work: Work, rank: int, world: int) -> Any:
    """Seconds that training stands still for a save beside it, and for one in the foreground.

    Also of the steps beside a save, and of those without one. Both go to S3; at the end the local
    store gets a checkpoint as well, for loads.
    """
    line = Line(work, rank, world)
    engine, steps = line.build(line.config.engine), line.steps()
    assert work.stores is not None
    store = Store(work.stores["s3"])
    names = ("stall", "write", "foreground", "beside", "alone")
    found: dict[str, list[float]] = {name: [] for name in names}
    with ThreadPoolExecutor(1) as thread:
        for turn in range(work.saves + 1):
            now: dict[str, list[float]] = {name: [] for name in names}
            now["alone"] = [timed(partial(line.train, engine, step)) for step in steps]
            pending: list[Future[None]] = []
            now["stall"] = [timed(lambda: _begin_save(thread, engine, store, pending))]  # noqa: B023 - called at once
            began = time.perf_counter()
            for step in cycle(steps):
                if _everywhere(pending[0].done()):
                    break
                now["beside"].append(timed(partial(line.train, engine, step)))
            pending[0].result()
            now["write"] = [time.perf_counter() - began]
            now["foreground"] = [timed(partial(engine.save, store))]
            if turn > 0:  # the first makes its buffers
                for name in names:
                    found[name] += now[name]
    engine.save(Store(work.stores["local"]))
    return found


def _begin_save(
    thread: ThreadPoolExecutor, engine: Engine, store: Store, pending: list[Future[None]]
) -> None:
    """As `framework.train.rank.commit.Committer.begin` does it."""
    pending.append(thread.submit(engine.snapshot().write, store))


def _everywhere(flag: bool) -> bool:
    """Whether it is so on all ranks."""
    flags = torch.tensor(float(flag))
    distributed.all_reduce(flags, distributed.ReduceOp.MIN)
    return bool(flags)


class CountingStore(Store):
    """A store that counts the ranges that are read: on an object store each is a request."""

    reads = 0

    def read_range(self, name: str, offset: int, size_bytes: int) -> bytes:
        """As any other store."""
        self.reads += 1
        return super().read_range(name, offset, size_bytes)


def time_loads(work: Work, rank: int, world: int) -> Any:
    """Seconds of each load, the first not counted, and how many ranges the busiest rank reads."""
    line = Line(work, rank, world)
    engine = line.build(line.config.engine)
    assert work.stores is not None
    store = CountingStore(work.stores["local"])
    engine.load(store)
    reads: list[Any] = [None] * world
    distributed.all_gather_object(reads, store.reads)
    seconds = [timed(partial(engine.load, store)) for _ in range(work.saves)]
    return {"seconds": seconds, "reads": max(reads)}


JOBS: dict[str, Callable[[Work, int, int], Any]] = {
    "plain": partial(time_steps, "plain"),
    "zero": partial(time_steps, "zero"),
    "saves": time_saves,
    "loads": time_loads,
}


def main() -> None:
    """Fork the ranks; 0 where all of them ended well."""
    job, world, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_rank_main, args=(job, rank, world, folder), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    while alive := [process.sentinel for process in ranks if process.is_alive()]:
        multiprocessing.connection.wait(alive)
        if any(p.exitcode not in (None, 0) for p in ranks):
            break  # the others would wait for it
    sys.exit(any(p.exitcode != 0 for p in ranks))


def _rank_main(job: str, rank: int, world: int, folder: Path) -> None:
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    result = JOBS[job](Work(**json.loads((folder / "work.json").read_text())), rank, world)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
