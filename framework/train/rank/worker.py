"""One rank of a run: set up, resume from the latest committed checkpoint, train.

The same function serves CPU ranks on gloo and GPU ranks on NCCL. A restart asks the store for the
latest committed checkpoint, never Ray: Ray's controller may not have heard of the newest one.
"""

import contextlib
import gc
import traceback
from dataclasses import replace
from functools import partial

import ray
import ray.train
import ray.train.torch
import torch
from torch import nn

from framework.data.plan.store import Plan
from framework.data.stream.collate import ClipReader, VideoReader
from framework.data.stream.stream import open_stream
from framework.objectives.objective import Objective
from framework.run.checkpoint import Checkpoints
from framework.run.logs import RunLog
from framework.storage import COMMAND, TRAINING
from framework.tracking.run_tracker import open_tracker
from framework.tracking.tracker import NoTracker, Tracker
from framework.train.engine.protocol import Engine
from framework.train.job import Job
from framework.train.preflight import check_workers, refusal, show_checks
from framework.train.rank.failures import is_retryable, words_of
from framework.train.rank.largest_packs import (
    codec_too_large,
    largest_packs,
    longest_view,
    try_longest_view,
    try_packs,
)
from framework.train.rank.prefetch import Prefetch
from framework.train.rank.rank import Rank, WorkerArgs
from framework.train.rank.session import Session, read_left_out, step_inputs
from framework.train.rank.watchdog import Watchdog
from framework.train.rank.watchers import observers_of


def work(args: WorkerArgs) -> None:
    """Train this rank's share from the latest committed checkpoint to the last step.

    What another attempt would not change is told to the driver, which then makes none.
    """
    log: RunLog | None = None
    try:
        rank = _set_up(args)
        log = rank.log
        with Watchdog(args.job.train.hang_timeout_s, rank.report_hang) as watchdog:
            tracker = _work(rank, watchdog)
        # The driver ends the MLflow run: evaluation still writes to it.
        tracker.flush(timeout_s=60 if tracker.problem is None else 5)
    except BaseException as error:
        traceback.print_exc()
        if not is_retryable(error):
            ray.get(args.mailbox.refuse.remote(words_of(error)))
        raise
    finally:
        if log is not None:
            with contextlib.suppress(OSError):  # it must not stand in for what was raised
                log.save()


def _work(rank: Rank, watchdog: Watchdog) -> Tracker:
    """Train; the tracker that rank 0 told of it."""
    args, job = rank.args, rank.job
    checks = check_workers(
        rank.store, args.shards_url, args.first_shard, rank.device, job.identity.packages
    )
    if rank.is_first:
        show_checks(checks, "workers", lambda text: rank.tell({"text": text}))
    if why := refusal(checks):
        # What was right at the first start may be right again at the next.
        raise OSError(why) if args.restarts else ValueError(why)
    rank = _patient(rank)
    tracker: Tracker = NoTracker()
    if rank.is_first:
        tracker = open_tracker(job.tracking, rank.store, job.run.name, "rank-0")

    objective = job.assembly.build_objective()
    reader = job.assembly.with_retry(TRAINING).reader(args.shards_url)
    engine: Engine | None = None
    again = True
    while again:
        watchdog.beat()
        latest = rank.latest_checkpoint()
        left_out = frozenset(rank.from_rank_0(lambda: read_left_out(rank.store)))
        watchdog.beat()
        start = 0 if latest is None else latest.step
        with open_stream(
            *(rank.plan, reader, job.assembly.data.stream),
            *(start, job.train.steps, rank.dp_rank, rank.dp_size),
            waiting=watchdog.beat,  # for the driver's plan is no hang
        ) as stream:  # the first steps are fetched and decoded while the engine is built
            if engine is None:
                rank.tell({"stage": "building the engine"})
                engine = _build_engine(rank, objective, reader, watchdog, is_fresh=latest is None)
            if latest is not None:
                engine.load(latest.store)
            watchdog.beat()
            rank.tell({"stage": "training", "step": start, "resumed": latest is not None})
            steps = Prefetch(step_inputs(rank, objective, stream, start, left_out), depth=2)
            observers = observers_of(rank, engine, tracker, steps, latest)
            again = Session(rank, engine, objective, observers, watchdog, latest).run(steps)
    return tracker


def _set_up(args: WorkerArgs) -> Rank:
    """Find this worker's place, and set torch and its log up."""
    context, job = ray.train.get_context(), args.job
    torch.set_num_threads(job.cluster.threads_per_worker)
    torch.use_deterministic_algorithms(job.train.deterministic, warn_only=True)
    # A first start that cannot reach its store says so soon; a restart waits for it.
    store = args.fence.run.with_retry(TRAINING if args.restarts else COMMAND)
    dp_rank = context.get_world_rank()
    log = RunLog(store.with_retry(TRAINING), f"rank-{dp_rank:05d}")
    log.copy()
    return Rank(
        args=args,
        dp_rank=dp_rank,
        dp_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        store=store,
        plan=Plan(store, args.plan_digest),
        checkpoints=Checkpoints(store.child("checkpoints")),
        log=log,
    )


def _patient(rank: Rank) -> Rank:
    """The same rank, whose stores ride out a longer outage."""
    store = rank.store.with_retry(TRAINING)
    plan, checkpoints = Plan(store, rank.plan.digest), Checkpoints(store.child("checkpoints"))
    return replace(rank, store=store, plan=plan, checkpoints=checkpoints)


def _build_engine(
    rank: Rank, objective: Objective, reader: ClipReader, watchdog: Watchdog, is_fresh: bool
) -> Engine:
    """The engine at step 0; before that, one that is tried on the largest packs of the plan."""
    job, recipe = rank.job, rank.plan.recipe

    def build() -> Engine:
        return job.engine.build(partial(_model, job), job.optimizer, job.train.steps, rank.device)

    if is_fresh and job.train.try_largest_packs:
        rank.tell({"stage": "trying the largest packs"})
        encoding = _encode_longest_view(rank, reader)
        stream = job.assembly.data.stream
        packs = largest_packs(recipe, reader, job.assembly.text.max_tokens, stream.static_shapes)
        per_step = -(-recipe.global_batch_packs // rank.dp_size)
        try_packs(build(), objective, packs, rank.device, packs_per_step=per_step)
        try:
            while encoding and ray.wait(encoding, timeout=1.0)[1]:
                watchdog.beat()  # a task may wait for its turn, and die by itself
            ray.get(encoding)
        except ray.exceptions.OutOfMemoryError as error:  # Ray ended the task to save the machine
            raise codec_too_large(longest_view(recipe), error) from error
        gc.collect()
        watchdog.beat()
        if rank.device.type == "cuda":
            torch.cuda.empty_cache()
    return build()


def _encode_longest_view(rank: Rank, reader: ClipReader) -> list[ray.ObjectRef[None]]:
    """The codec's trial, in a task like the stream's; none where the stream does not encode."""
    if not rank.is_first or not isinstance(reader, VideoReader):
        return []
    return [ray.remote(max_retries=1)(try_longest_view).remote(rank.plan.recipe, reader)]


def _model(job: Job) -> nn.Module:
    model = job.assembly.build_model()
    model.set_checkpointing(job.train.activation_checkpointing)
    return model
