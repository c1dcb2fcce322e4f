"""The driver of a run: claim the name, make the plan, start the workers, follow them.

It holds no training state. Killed and started again by the same command, it finds the run by its
name, and the workers go on from the latest committed checkpoint, in the same MLflow run.
"""

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import ray.train
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.train.torch import TorchTrainer

from framework.cluster import (
    ClusterConfig,
    check_room,
    connect,
    num_nodes,
    object_store_mb,
    room,
)
from framework.data.manifest.table import Manifest
from framework.data.plan.store import Plan
from framework.run.checkpoint import Checkpoint, Checkpoints
from framework.run.fence import Fence
from framework.run.identity import code_version, name_freed_if_refused
from framework.storage import TRAINING, Store
from framework.terminal import Show
from framework.tracking.run_tracker import open_tracker
from framework.tracking.tracker import Status
from framework.train.driver.attempts import Attempts
from framework.train.driver.follow import Stopped
from framework.train.job import Job
from framework.train.preflight import check_driver, refusal, show_checks
from framework.train.rank.bootstrap import start
from framework.train.rank.notice import NoticingTorchConfig
from framework.train.rank.rank import WorkerArgs

# Of a checkpoint: float32 weights, two moments of Adam, and the EMA.
BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    store: Store  # the run's folder
    checkpoint: Checkpoint
    tracker_run_id: str | None
    plan: Plan


def train(job: Job, show: Show, store: Store) -> Result:
    """Run or resume the job, checked before, in its claimed folder `store`, to its last step.

    A run that has come to its last step is given back as it is, without Ray. ValueError for a
    user's mistake or bug; SystemExit, with its cause, where training fails again and again; Stopped
    where Ctrl-C or SIGTERM ended it.
    """
    began = time.time()
    show({"stage": "planning"})
    planner = job.assembly.planner()
    latest = Checkpoints(store.child("checkpoints")).latest()
    first = latest.step if latest is not None and latest.step < job.train.steps else 0
    with name_freed_if_refused(store):
        plan = planner.make(store, first + 1, lambda text: show({"text": text}))
    show({"text": plan.epochs_of(job.train.steps)})
    if latest is not None:
        _check_plan(latest, plan, store)
        if latest.step == job.train.steps:
            show({"text": f"all {latest.step} steps are done already"})
            return Result(store, latest, latest.meta["tracker_run_id"], plan)
    connect(job.cluster)
    if job.cluster.standing_address is None:  # it will not grow
        check_room(job.cluster)
    job.tracking.check(num_nodes())
    if num_nodes() > 1 and store.is_local:
        show({"text": f"note: {store.url} must be shared by all {num_nodes()} nodes"})
    manifest = planner.pinned_manifest(store)
    run_id = _preflight(job, store, manifest, show)

    for_ranks = replace(job, tracking=job.tracking.absolute(Path.cwd()))

    def fit(num_workers: int, fence: Fence, restarts: int, mailbox: ActorHandle) -> None:
        args = WorkerArgs(
            job=for_ranks,
            plan_digest=plan.digest,
            shards_url=manifest.shards_url,
            first_shard=manifest.first_shard,
            code_version=code_version(),
            fence=fence,
            restarts=restarts,
            session_began=began,
            mailbox=mailbox,
        )
        _trainer(job.cluster, num_workers, store, args).fit()

    # From here on a restart would cost more than to wait.
    store = store.with_retry(TRAINING)
    ahead = _PlanAhead(job, store)
    attempts = Attempts(store, job.cluster, job.train.steps, show, ahead.check, fit)
    try:
        attempts.run_until_done()
    except BaseException as error:
        if attempts.is_newest():  # else the run is another driver's
            _close(job, store, "KILLED" if isinstance(error, Stopped) else "FAILED")
        raise
    checkpoint = Checkpoints(store.child("checkpoints")).latest()
    assert checkpoint is not None, store.url
    assert checkpoint.step == job.train.steps, checkpoint
    return Result(store, checkpoint, run_id, plan)


class _PlanAhead:
    """Makes the epochs that training will come to, while the ones before them train."""

    def __init__(self, job: Job, store: Store) -> None:
        self._raised: Exception | None = None

        planner = job.assembly.with_retry(store.retry).planner()

        def run() -> None:
            try:
                planner.make(store, job.train.steps, lambda text: None)
            except Exception as error:
                self._raised = error

        threading.Thread(target=run, name="plan ahead", daemon=True).start()

    def check(self) -> None:
        """Raise what planning raised: the workers would wait for its next epoch for ever."""
        if self._raised is not None:
            raise self._raised


def _trainer(
    cluster: ClusterConfig, num_workers: int, store: Store, args: WorkerArgs
) -> TorchTrainer:
    """Ray Train's part: start the workers as a group, once."""
    gpus = cluster.gpus_per_worker
    return TorchTrainer(
        start,
        train_loop_config=cloudpickle.dumps(args),
        torch_config=NoticingTorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=store.url.rsplit("/", 1)[-1],
            storage_path=_ray_storage(store),
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
        ),
    )


def _check_plan(latest: Checkpoint, plan: Plan, store: Store) -> None:
    """ValueError where the checkpoint is of another plan: its steps would be of other clips."""
    trained_on = latest.meta["plan_digest"]
    if trained_on != plan.digest:
        raise ValueError(
            f"{store.url} was trained on plan {trained_on}, which is now {plan.digest}: the "
            "planner or the text encoder has changed; choose another run.name, or run.fresh=true"
        )


def _preflight(job: Job, store: Store, manifest: Manifest, show: Show) -> str | None:
    """Look at storage, shards, tracker and memory, and open the run in the tracker with its config.

    The tracker's id of the run, where it answers; ValueError where a check fails.
    """
    tracker = open_tracker(job.tracking, store, job.run.name, "driver")
    checks = check_driver(
        store,
        manifest.shards_url,
        manifest.first_shard,
        tracker,
        checkpoint_bytes=BYTES_PER_PARAMETER * job.assembly.num_parameters(),
        streams_mb=max(room(job.cluster), job.cluster.min_workers)
        * job.assembly.data.stream.object_store_mb,
        object_store_mb=object_store_mb(),
    )
    show_checks(checks, "driver", lambda text: show({"text": text}))
    tracker.log_params(job.identity.parameters())
    tracker.set_tags({"longtake.run": store.url, "longtake.code": code_version()})
    if why := refusal(checks):
        tracker.close("FAILED", timeout_s=5)
        raise ValueError(why)
    tracker.close(None)
    return tracker.run_id


def _close(job: Job, store: Store, status: Status) -> None:
    open_tracker(job.tracking, store, job.run.name, "driver").close(status, timeout_s=5)


def _ray_storage(store: Store) -> str:
    """Ray Train keeps its own bookkeeping beside ours; it wants a plain path where it is local."""
    ray_store = store.child("ray")
    return str(ray_store.local_path()) if ray_store.is_local else ray_store.url
