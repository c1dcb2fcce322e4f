"""Carry a plan out: fetch, decode, encode and pack, in plan order, for one rank.

Each rank opens its own column of the plan as one Ray Data dataset inside its train worker. A row is
a step: a task reads the step's rows of the plan, fetches the clips by byte range, and returns the
rank's packs as arrays. So a resume is an integer, ranks need no coordinator, and nothing is dropped
mid-way.

Invariant: what arrives is what the plan says, in its order; the consumer asserts it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray.data
from ray.data import ExecutionOptions, ExecutionResources

from framework.batch import PackedBatch
from framework.data.collate import Arrays, ClipReader, assemble, to_batch
from framework.data.config import StreamConfig
from framework.data.plan import Plan


@dataclass(frozen=True)
class _StepLoader:
    """The map function of the dataset: the row's id is a step counted from `start`."""

    plan: Plan
    reader: ClipReader
    start: int
    dp_rank: int
    dp_size: int

    def __call__(self, row: dict[str, Any]) -> Arrays:
        epoch, step = self.plan.locate(self.start + int(row["id"]))
        packs = self.plan.packs(epoch, step, self.dp_rank, self.dp_size)
        parts = [assemble(pack, self.reader, self.plan.recipe) for pack in packs]
        stacked = {
            name: np.stack([part[name] for part in parts]) for name in parts[0] if name != "failed"
        }
        # One JSON text of lists: Ray would turn a list of strings into an object array.
        return {**stacked, "failed": json.dumps([json.loads(part["failed"]) for part in parts])}


def open_stream(
    plan: Plan,
    reader: ClipReader,
    config: StreamConfig,
    start: int,
    stop: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[list[PackedBatch]]:
    """This rank's packs of global steps `start` to `stop`, a list for each step.

    The list has ceil(G / dp_size) packs on every rank; where dp_size does not divide G, some are
    dummies. Epochs follow one another without a gap; their plans must have been made.
    """
    if start >= stop:
        return
    num_steps = stop - start
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(
            cpu=config.max_tasks, object_store_memory=config.object_store_mb << 20
        ),
    )
    loader = _StepLoader(plan, reader, start, dp_rank, dp_size)
    with ray.data.DataContext.current(context):  # a dataset keeps the context it was made in
        blocks = -(-num_steps // config.steps_per_task)
        steps = ray.data.range(num_steps, override_num_blocks=blocks).map(loader)
    rows = steps.iter_batches(
        batch_size=1, batch_format="numpy", prefetch_batches=config.prefetch_steps
    )
    for number, row in zip(range(start, stop), rows, strict=True):
        yield _check(row, plan, number, dp_rank, dp_size)


def _check(row: Arrays, plan: Plan, number: int, dp_rank: int, dp_size: int) -> list[PackedBatch]:
    """Turn a row into batches and assert that they are the plan's."""
    epoch, step = plan.locate(number)
    failed = json.loads(str(row["failed"][0]))
    batches = []
    for i, pack in enumerate(plan.packs(epoch, step, dp_rank, dp_size)):
        arrays = {name: value[0][i] for name, value in row.items() if name != "failed"}
        arrays["failed"] = json.dumps(failed[i])
        batch = to_batch(arrays, epoch, step, pack.index)
        planned = [clip.clip_id for clip in pack.clips]
        assert batch.clip_ids[: len(planned)].tolist() == planned, (epoch, step, pack.index)
        batches.append(batch)
    return batches
