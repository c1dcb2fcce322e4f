"""Who watches a session: its observers, and the meters of its metrics.

This is the one place that names them all; a new metric is a meter in this list.
"""

from collections.abc import Sequence
from typing import Any

from framework.run.checkpoint import Checkpoint
from framework.tracking.gauges import Gauges
from framework.tracking.tracker import Tracker
from framework.train.engine.protocol import Engine
from framework.train.loop import StepInput
from framework.train.observers.checkpoints import CheckpointReport
from framework.train.observers.ledger import LedgerKeeper
from framework.train.observers.meters.goodput import Goodput
from framework.train.observers.meters.imbalance import Imbalance
from framework.train.observers.meters.losses import LossParts
from framework.train.observers.meters.lost_clips import LostClips
from framework.train.observers.meters.memory import Memory
from framework.train.observers.meters.meter import Meter
from framework.train.observers.meters.probe import SlowRanks
from framework.train.observers.meters.speed import Speed
from framework.train.observers.meters.weight_norm import WeightNorm
from framework.train.observers.metrics import Metrics, Outputs
from framework.train.observers.observer import Observer
from framework.train.observers.profile import ProfileKeeper
from framework.train.rank.prefetch import Prefetch
from framework.train.rank.rank import Rank


def observers_of(
    rank: Rank,
    engine: Engine,
    tracker: Tracker,
    steps: Prefetch[StepInput],
    latest: Checkpoint | None,
) -> list[Observer]:
    """The observers of a session on this rank, which goes on from `latest`."""
    args, job = rank.args, rank.job
    meters = meters_of(rank, engine, steps, latest)
    outputs = Outputs(tracker, Gauges(job.run.name, rank.dp_rank), rank.tell)
    return [
        ProfileKeeper(job.train.profiler, job.profile, rank.dp_rank, rank.store, tracker),
        LedgerKeeper(rank.store, rank.dp_rank, args.fence.number),
        Metrics(meters, outputs, rank.dp_size, job.train.steps),
        CheckpointReport(rank.checkpoints, tracker, rank.tell, rank.log),
    ]


def meters_of(
    rank: Rank, engine: Engine, steps: Prefetch[StepInput], latest: Checkpoint | None
) -> Sequence[Meter[Any]]:
    """What is measured, in the order in which it is measured."""
    args, job, config = rank.args, rank.job, rank.job.train
    speed = Speed(steps, job.assembly.work(), config.peak_tflops, rank.dp_size)
    clock = latest.meta.get("clock", {}) if latest is not None else {}
    return [
        speed,
        WeightNorm(engine),
        SlowRanks(rank.device, rank.tell),
        Memory(rank.device),
        LossParts(rank.plan.sources),
        Imbalance(rank.plan.recipe.cost),
        LostClips(config.max_lost_share),
        Goodput(speed, args.session_began, args.fence.number - 1, clock),
    ]
