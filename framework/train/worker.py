"""One rank of a run: set up, resume from the latest committed checkpoint, train, commit.

The same function serves CPU ranks on gloo and GPU ranks on NCCL. A restart asks the store for the
latest committed checkpoint, never Ray: Ray's controller may not have heard of the newest one.
"""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.actor import ActorHandle
from torch import distributed, nn

from framework.assembly import Assembly
from framework.checkpoint import Checkpoint, Checkpoints
from framework.data.config import StreamConfig
from framework.data.plan import Plan
from framework.data.stream import open_stream
from framework.diffusion.objective import Objective
from framework.logs import RunLog
from framework.storage import Store
from framework.tracking import NoTracker, Tracker
from framework.train.config import TrainConfig
from framework.train.loop import StepInput, StepOutput, train
from framework.train.prefetch import Prefetch
from framework.train.preflight import check_workers, refusal, show_checks
from framework.train.progress import stop_asked
from framework.train.report import Reporter
from framework.train.run_tracker import open_tracker
from framework.train.throughput import Throughput
from model_zoo.flops import training_flops_per_token


@dataclass(frozen=True)
class WorkerArgs:
    """All that a rank needs, picklable; made once by the driver."""

    assembly: Assembly
    train: TrainConfig
    optimizer: Any
    engine: Any
    tracking: Any
    stream: StreamConfig
    run_url: str
    run_name: str
    plan_digest: str
    shards_url: str
    first_shard: str
    identity: dict[str, Any]  # the run's config, kept in each checkpoint
    code_version: str
    threads: int
    board: ActorHandle


def work(args: WorkerArgs) -> None:
    """Train this rank's share from the latest committed checkpoint to the last step."""
    context = ray.train.get_context()
    rank, dp_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.train.deterministic, warn_only=True)
    store = Store(args.run_url)
    log = RunLog(store, f"rank-{rank:05d}")
    log.copy()
    checks = check_workers(store, args.shards_url, args.first_shard, device)
    if rank == 0:
        show_checks(checks, "workers", lambda text: _tell(args, rank, {"text": text}))
    if why := refusal(checks):  # found alike on all ranks; a restart would find it again
        ray.get(args.board.refuse.remote(why))
        log.save()
        return
    _tell(args, rank, {"stage": "building the engine"})

    plan = Plan(store, args.plan_digest)
    engine = args.engine.build(partial(_model, args), args.optimizer, args.train.steps, device)
    checkpoints = Checkpoints(store.child("checkpoints"))
    start = 0
    latest = _agree_on_latest(checkpoints, rank, dp_size)
    if latest is not None:
        engine.load(latest.store)
        start = latest.step
    _tell(args, rank, {"stage": "training", "step": start, "resumed": latest is not None})

    objective = args.assembly.build_objective()
    tracker: Tracker = NoTracker()
    if rank == 0:
        tracker = open_tracker(args.tracking, store, args.run_name, "rank-0")
    throughput = Throughput(
        time.perf_counter, peak_tflops=args.train.peak_tflops, num_devices=dp_size
    )
    reporter = Reporter(
        store,
        tracker,
        throughput,
        lambda line: _tell(args, rank, line),
        lambda: stop_asked(args.board),
        rank=rank,
        dp_size=dp_size,
        train=args.train,
    )

    def commit(done: int) -> None:
        began = time.perf_counter()
        folder = checkpoints.folder(done)
        if rank == 0:
            checkpoints.begin(done)
            reporter.clear_ledger(done)
        _barrier(dp_size)
        engine.save(folder)
        reporter.write_ledger(done)
        _barrier(dp_size)
        if rank == 0:
            if tracker.journal_path is not None:
                store.write("tracking-journal.jsonl", tracker.journal_path.read_bytes())
            meta = _meta(args, plan, done, dp_size, tracker.run_id, reporter.average_speed())
            checkpoints.commit(done, meta)
            checkpoints.retain(args.train.keep_checkpoints)
            tracker.log_checkpoint(folder.url, done)
            tracker.log_metrics({"speed/checkpoint_s": time.perf_counter() - began}, done - 1)
        log.save()
        throughput.skip()

    def after_step(output: StepOutput) -> bool:
        inputs = output.inputs
        throughput.step(inputs.tokens, _flops(args, inputs) if args.train.peak_tflops else 0.0)
        stop = reporter.record(output)
        done = inputs.number + 1
        if stop or done % args.train.checkpoint_every == 0 or done == args.train.steps:
            commit(done)
        return not stop

    try:
        inputs = _inputs(args, plan, objective, start, rank, dp_size)
        with Prefetch(inputs, depth=2) as steps:
            train(
                engine,
                objective,
                throughput.waits(steps),
                after_step,
                dp_size=dp_size,
                device=device,
            )
    except BaseException:
        tracker.close("FAILED", timeout_s=5)
        traceback.print_exc()
        log.save()
        raise
    # The driver ends the MLflow run: evaluation still writes to it.
    tracker.flush(timeout_s=60)
    log.save()


def _flops(args: WorkerArgs, inputs: StepInput) -> float:
    """Model FLOPs of a step over all ranks, taking this rank's clips for the mixture of all."""
    lengths = [
        length
        for batch, _ in inputs.packs
        for length in batch.cu_seqlens.diff()[batch.clip_ids >= 0].tolist()
    ]
    per_token = training_flops_per_token(args.assembly.model, args.assembly.token_size, lengths)
    return per_token * inputs.tokens


def _model(args: WorkerArgs) -> nn.Module:
    model: Any = args.assembly.build_model()
    model.set_checkpointing(args.train.activation_checkpointing)
    return model


def _inputs(
    args: WorkerArgs, plan: Plan, objective: Objective, start: int, rank: int, dp_size: int
) -> Iterator[StepInput]:
    """Steps with their random draws; runs in the prefetch thread."""
    reader = args.assembly.reader(args.shards_url)
    stream = open_stream(plan, reader, args.stream, start, args.train.steps, rank, dp_size)
    for number, batches in enumerate(stream, start):
        epoch, step = plan.locate(number)
        totals = plan.totals(epoch, step)
        packs = [(batch, objective.draw(batch, args.assembly.seed)) for batch in batches]
        yield StepInput(number, epoch, step, totals.loss_tokens, totals.tokens, packs)


def _agree_on_latest(checkpoints: Checkpoints, rank: int, dp_size: int) -> Checkpoint | None:
    """Rank 0 looks; all take what it found, also where one of them would see an older listing."""
    found = [checkpoints.latest() if rank == 0 else None]
    if dp_size > 1:
        distributed.broadcast_object_list(found)
    return found[0]


def _barrier(dp_size: int) -> None:
    if dp_size > 1:
        distributed.barrier()


def _meta(
    args: WorkerArgs,
    plan: Plan,
    done: int,
    dp_size: int,
    run_id: str | None,
    speed: dict[str, float],
) -> dict[str, Any]:
    epoch, step = plan.locate(done - 1)
    return {
        "step": done,
        "epoch": epoch,
        "step_in_epoch": step,
        "plan_digest": args.plan_digest,
        "dp_size": dp_size,
        "config": args.identity,
        "code_version": args.code_version,
        "tracker_run_id": run_id,
        "speed": speed,
    }


def _tell(args: WorkerArgs, rank: int, line: dict[str, Any]) -> None:
    if rank == 0:
        args.board.tell.remote(line)
