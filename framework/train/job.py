"""The driver of a run: claim the name, make the plan, start the workers, follow them.

It holds no training state. Killed and started again by the same command, it finds the run by its
name, and the workers go on from the latest committed checkpoint, in the same MLflow run.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from framework.assembly import Assembly
from framework.checkpoint import Checkpoint, Checkpoints
from framework.cluster import ClusterConfig, connect
from framework.data.manifest import read_manifest
from framework.data.plan import Plan
from framework.storage import Store
from framework.train.config import RunSection, TrainConfig
from framework.train.identity import claim, code_version
from framework.train.run_tracker import open_tracker
from framework.train.worker import WorkerArgs, work


@dataclass(frozen=True)
class Job:
    """The configs of one training run."""

    run: RunSection
    assembly: Assembly
    train: TrainConfig
    optimizer: Any
    engine: Any
    tracking: Any
    cluster: ClusterConfig
    identity: dict[str, Any]  # the whole run config, flat


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    store: Store  # the run's folder
    checkpoint: Checkpoint
    tracker_run_id: str | None
    plan: Plan


class Progress:
    """A Ray actor: the last word of rank 0, which the driver shows; it outlives worker restarts."""

    def __init__(self) -> None:
        self._line: dict[str, Any] = {"stage": "starting workers"}
        self._count = 0

    def tell(self, line: dict[str, Any]) -> None:
        """Rank 0's latest line."""
        self._line, self._count = line, self._count + 1

    def last(self) -> tuple[int, dict[str, Any]]:
        """How many lines there were, and the last one."""
        return self._count, self._line


def train(job: Job, show: Callable[[dict[str, Any]], None]) -> Result:
    """Run or resume the job to its last step; ValueError for a user's mistake."""
    job.tracking.check(job.cluster.num_workers if job.cluster.address else 1)
    connect(job.cluster)
    store = claim(job.run, job.identity)
    show({"stage": "planning"})
    plan = job.assembly.make_plan(store, job.train.steps, lambda text: show({"text": text}))
    if job.cluster.num_workers > plan.recipe.global_batch_packs:
        raise ValueError(
            f"cluster.num_workers={job.cluster.num_workers} is more than the global batch of "
            f"{plan.recipe.global_batch_packs} packs; raise data.global_batch_packs"
        )
    run_id = _announce(job, store)
    progress = ray.remote(num_cpus=0)(Progress).remote()
    args = WorkerArgs(
        assembly=job.assembly,
        train=job.train,
        optimizer=job.optimizer,
        engine=job.engine,
        tracking=job.tracking.absolute(Path.cwd()),
        stream=job.assembly.data.stream,
        run_url=store.url,
        run_name=job.run.name,
        plan_digest=plan.digest,
        shards_url=read_manifest(job.assembly.data.manifest).shards_url,
        identity=job.identity,
        code_version=code_version(),
        threads=job.cluster.threads_per_worker,
        progress=progress,
    )
    gpus = job.cluster.gpus_per_worker
    trainer = TorchTrainer(
        work,
        train_loop_config=args,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.cluster.num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={
                "CPU": job.cluster.cpus_per_worker,
                **({"GPU": 1} if gpus else {}),
            },
        ),
        run_config=ray.train.RunConfig(
            name=store.url.rsplit("/", 1)[-1],
            storage_path=_ray_storage(store),
            failure_config=ray.train.FailureConfig(max_failures=job.cluster.max_failures),
        ),
    )
    with _Watch(progress, show):
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise RuntimeError(f"training failed in {store.url}: {error}") from error
    checkpoint = Checkpoints(store.child("checkpoints")).latest()
    assert checkpoint is not None, store.url
    assert checkpoint.step == job.train.steps, checkpoint
    return Result(store, checkpoint, run_id, plan)


def _announce(job: Job, store: Store) -> str | None:
    """Open the run in the tracker with its config; its id, where the tracker answers."""
    tracker = open_tracker(job.tracking, store, job.run.name, "driver")
    tracker.log_params(job.identity)
    tracker.set_tags({"longtake.run": store.url, "longtake.code": code_version()})
    tracker.close(None)
    return tracker.run_id


def _ray_storage(store: Store) -> str:
    """Ray Train keeps its own bookkeeping beside ours; it wants a plain path where it is local."""
    ray_store = store.child("ray")
    return str(ray_store.local_path()) if ray_store.is_local else ray_store.url


class _Watch:
    """A thread that shows rank 0's lines while the trainer runs."""

    def __init__(self, progress: Any, show: Callable[[dict[str, Any]], None]) -> None:
        self._progress, self._show = progress, show
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        seen = -1
        while True:
            done = self._done.wait(1.0)
            try:
                count, line = ray.get(self._progress.last.remote(), timeout=10)
            except ray.exceptions.RayError:
                if done:
                    return
                continue
            if count != seen:
                self._show({**line, "time": time.time()})
                seen = count
            if done:
                return
