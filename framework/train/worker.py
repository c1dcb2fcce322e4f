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
from framework.batch import PackedBatch
from framework.checkpoint import Checkpoint, Checkpoints
from framework.data.config import StreamConfig
from framework.data.plan import Plan
from framework.data.stream import open_stream
from framework.diffusion.objective import Objective
from framework.logs import RunLog
from framework.storage import Store
from framework.tracking import NoTracker, Tracker
from framework.train.config import TrainConfig
from framework.train.engine import Engine
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


@dataclass(frozen=True)
class _Rank:
    """This worker: its place among the others, and what it works on."""

    args: WorkerArgs
    number: int
    dp_size: int
    device: torch.device
    store: Store  # the run's folder
    plan: Plan
    checkpoints: Checkpoints
    log: RunLog

    @property
    def is_first(self) -> bool:
        """Whether it is rank 0, which speaks for all."""
        return self.number == 0

    def tell(self, line: dict[str, Any]) -> None:
        """Show a line on the driver's terminal, once for all ranks."""
        if self.is_first:
            self.args.board.tell.remote(line)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self.dp_size > 1:
            distributed.barrier()


def work(args: WorkerArgs) -> None:
    """Train this rank's share from the latest committed checkpoint to the last step."""
    rank = _set_up(args)
    checks = check_workers(rank.store, args.shards_url, args.first_shard, rank.device)
    if rank.is_first:
        show_checks(checks, "workers", lambda text: rank.tell({"text": text}))
    if why := refusal(checks):  # found alike on all ranks; a restart would find it again
        ray.get(args.board.refuse.remote(why))
        rank.log.save()
        return

    latest = _agree_on_latest(rank)
    start = 0 if latest is None else latest.step
    reader, steps = args.assembly.reader(args.shards_url), args.train.steps
    with open_stream(
        rank.plan, reader, args.stream, start, steps, rank.number, rank.dp_size
    ) as stream:  # the first steps are fetched and decoded while the engine is built
        rank.tell({"stage": "building the engine"})
        engine = args.engine.build(partial(_model, args), args.optimizer, steps, rank.device)
        if latest is not None:
            engine.load(latest.store)
        rank.tell({"stage": "training", "step": start, "resumed": latest is not None})
        _train(rank, engine, enumerate(stream, start))
    rank.log.save()


def _set_up(args: WorkerArgs) -> _Rank:
    """Find this worker's place, and set torch and its log up."""
    context = ray.train.get_context()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(args.train.deterministic, warn_only=True)
    store, number = Store(args.run_url), context.get_world_rank()
    log = RunLog(store, f"rank-{number:05d}")
    log.copy()
    return _Rank(
        args=args,
        number=number,
        dp_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
        store=store,
        plan=Plan(store, args.plan_digest),
        checkpoints=Checkpoints(store.child("checkpoints")),
        log=log,
    )


def _train(rank: _Rank, engine: Engine, stream: Iterator[tuple[int, list[PackedBatch]]]) -> None:
    """Train on the stream's numbered steps, report and commit; the log is saved where it fails."""
    args, objective = rank.args, rank.args.assembly.build_objective()
    tracker: Tracker = NoTracker()
    if rank.is_first:
        tracker = open_tracker(args.tracking, rank.store, args.run_name, "rank-0")
    throughput = Throughput(
        time.perf_counter, peak_tflops=args.train.peak_tflops, num_devices=rank.dp_size
    )
    prefetch = Prefetch(_inputs(rank, objective, stream), depth=2)
    reporter = Reporter(
        rank.store,
        tracker,
        throughput,
        rank.tell,
        lambda: stop_asked(args.board),
        prefetch.mean_ready,
        rank=rank.number,
        dp_size=rank.dp_size,
        train=args.train,
    )

    def commit(done: int) -> None:
        began = time.perf_counter()
        folder = rank.checkpoints.folder(done)
        if rank.is_first:
            rank.checkpoints.begin(done)
            reporter.clear_ledger(done)
        rank.barrier()
        engine.save(folder)
        reporter.write_ledger(done)
        rank.barrier()
        if rank.is_first:
            if tracker.journal_path is not None:
                rank.store.write("tracking-journal.jsonl", tracker.journal_path.read_bytes())
            meta = _meta(rank, done, tracker.run_id, reporter.average_speed())
            rank.checkpoints.commit(done, meta)
            rank.checkpoints.retain(args.train.keep_checkpoints)
            tracker.log_checkpoint(folder.url, done)
            tracker.log_metrics({"speed/checkpoint_s": time.perf_counter() - began}, done - 1)
        rank.log.save()
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
        with prefetch as steps:
            train(
                engine,
                objective,
                throughput.waits(steps),
                after_step,
                dp_size=rank.dp_size,
                device=rank.device,
            )
    except BaseException:
        tracker.close("FAILED", timeout_s=5)
        traceback.print_exc()
        rank.log.save()
        raise
    # The driver ends the MLflow run: evaluation still writes to it.
    tracker.flush(timeout_s=60)


def _flops(args: WorkerArgs, inputs: StepInput) -> float:
    """Model FLOPs of a step over all ranks, taking this rank's clips for the mixture of all."""
    grids = []
    for batch, _ in inputs.packs:
        lengths = batch.cu_seqlens.diff().tolist()
        for b in (batch.clip_ids >= 0).nonzero().flatten().tolist():
            f, h, w = batch.grid[b].tolist()
            is_whole = f * h * w == lengths[b]  # no token of it is dropped
            grids.append((f, h, w) if is_whole else (lengths[b], 1, 1))
    return training_flops_per_token(args.assembly.work(), grids) * inputs.tokens


def _model(args: WorkerArgs) -> nn.Module:
    model: Any = args.assembly.build_model()
    model.set_checkpointing(args.train.activation_checkpointing)
    return model


def _inputs(
    rank: _Rank, objective: Objective, stream: Iterator[tuple[int, list[PackedBatch]]]
) -> Iterator[StepInput]:
    """Steps with their random draws; runs in the prefetch thread."""
    for number, batches in stream:
        epoch, step = rank.plan.locate(number)
        totals = rank.plan.totals(epoch, step)
        packs = [(batch, objective.draw(batch, rank.args.assembly.seed)) for batch in batches]
        yield StepInput(number, epoch, step, totals.loss_tokens, totals.tokens, packs)


def _agree_on_latest(rank: _Rank) -> Checkpoint | None:
    """Rank 0 looks; all take what it found, also where one of them would see an older listing."""
    found = [rank.checkpoints.latest() if rank.is_first else None]
    if rank.dp_size > 1:
        distributed.broadcast_object_list(found)
    return found[0]


def _meta(rank: _Rank, done: int, run_id: str | None, speed: dict[str, float]) -> dict[str, Any]:
    epoch, step = rank.plan.locate(done - 1)
    return {
        "step": done,
        "epoch": epoch,
        "step_in_epoch": step,
        "plan_digest": rank.args.plan_digest,
        "dp_size": rank.dp_size,
        "config": rank.args.identity,
        "code_version": rank.args.code_version,
        "tracker_run_id": run_id,
        "speed": speed,
    }
