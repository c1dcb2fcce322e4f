"""The driver of a run: claim the name, make the plan, start the workers, follow them.

It holds no training state. Killed and started again by the same command, it finds the run by its
name, and the workers go on from the latest committed checkpoint, in the same MLflow run.
"""

import contextlib
import threading
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
from framework.cluster import ClusterConfig, check_room, connect, num_nodes
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
    """A Ray actor: what rank 0 says, which the driver shows; it outlives worker restarts.

    It keeps every stage, and of the steps in between the last.
    """

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = [{"stage": "starting workers"}]

    def tell(self, line: dict[str, Any]) -> None:
        """Rank 0's next line."""
        if self._lines and "stage" not in line and "stage" not in self._lines[-1]:
            self._lines.pop()
        self._lines.append(line)

    def take(self) -> list[dict[str, Any]]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


def train(job: Job, show: Callable[[dict[str, Any]], None], store: Store | None = None) -> Result:
    """Run or resume the job to its last step; ValueError for a user's mistake.

    `store` is the run's folder where the caller has claimed it already. A run that has come to its
    last step is given back as it is, without Ray. SystemExit, with its cause, where training fails.
    """
    job.assembly.check()
    read_manifest(job.assembly.data.manifest)  # a mistake must not leave a claimed name behind
    if job.cluster.num_workers > (packs := job.assembly.data.global_batch_packs):
        raise ValueError(
            f"cluster.num_workers={job.cluster.num_workers} is more than "
            f"data.global_batch_packs={packs}; raise the latter"
        )
    store = store or claim(job.run, job.identity)
    show({"stage": "planning"})
    plan = job.assembly.make_plan(store, job.train.steps, lambda text: show({"text": text}))
    latest = Checkpoints(store.child("checkpoints")).latest()
    if latest is not None:
        _check_plan(latest, plan, store)
        if latest.step == job.train.steps:
            show({"text": f"all {latest.step} steps are done already"})
            return Result(store, latest, latest.meta["tracker_run_id"], plan)
    connect(job.cluster)
    check_room(job.cluster)
    job.tracking.check(num_nodes())
    if num_nodes() > 1 and store.is_local:
        show({"text": f"note: {store.url} must be shared by all {num_nodes()} nodes"})
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
        shards_url=job.assembly.pinned_manifest(store).shards_url,
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
            open_tracker(job.tracking, store, job.run.name, "driver").close("FAILED", timeout_s=5)
            raise SystemExit(f"training failed in {store.url}: {error}") from error
    checkpoint = Checkpoints(store.child("checkpoints")).latest()
    assert checkpoint is not None, store.url
    assert checkpoint.step == job.train.steps, checkpoint
    return Result(store, checkpoint, run_id, plan)


def _check_plan(latest: Checkpoint, plan: Plan, store: Store) -> None:
    """ValueError where the checkpoint is of another plan: its steps would be of other clips."""
    trained_on = latest.meta["plan_digest"]
    if trained_on != plan.digest:
        raise ValueError(
            f"{store.url} was trained on plan {trained_on}, which is now {plan.digest}: the "
            "planner or the text encoder has changed; choose another run.name, or run.fresh=true"
        )


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
        done = False
        while not done:
            done = self._done.wait(1.0)
            with contextlib.suppress(ray.exceptions.RayError):  # an outage of the head: ask again
                for line in ray.get(self._progress.take.remote(), timeout=10):
                    self._show(line)
