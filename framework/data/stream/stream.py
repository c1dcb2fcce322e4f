"""Carry a plan out: fetch, decode, encode and pack, in plan order, for one rank.

Each rank opens its own column of the plan inside its train worker, as a chain of ordered Ray Data
datasets over consecutive segments of steps. A row is a pack: a task reads its clips from the plan,
fetches them by byte range, and returns them as arrays. So a resume is an integer, ranks need no
coordinator, and nothing is dropped mid-way.

A segment runs to its end while the one before it is used, and memory is bounded by two of them:
they fit into the share of the object store that the config gives, or are one step each. One dataset
over all steps would be held back by back-pressure most of the time, and then Ray Data's executor
(2.60) polls without a pause: it took half a core in each train process, and the demo
trained at about a third of the speed (benchmarks/results/2026-11-21-2-core-vm.md).

Invariant: what arrives is what the plan says, in its order; the consumer asserts it.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import ray.data
from ray.data import DataContext, ExecutionOptions, ExecutionResources

from framework.batch import Arrays, PackedBatch
from framework.data.config import StreamConfig
from framework.data.plan.recipe import Recipe
from framework.data.plan.rows import PackPlan
from framework.data.plan.store import Plan
from framework.data.stream.collate import ClipReader, assemble

FIRST_SEGMENT_STEPS = 4


@dataclass(frozen=True)
class _PackLoader:
    """The map function of a segment: rows count this rank's packs from the segment's first step."""

    plan: Plan
    reader: ClipReader
    dp_rank: int
    dp_size: int
    static_shapes: bool
    first_step: int = 0

    @property
    def packs_per_step(self) -> int:
        """ceil(G / dp_size), the same on every rank."""
        return -(-self.plan.recipe.global_batch_packs // self.dp_size)

    def __call__(self, row: dict[str, Any]) -> Arrays:
        ahead, pack = divmod(int(row["id"]), self.packs_per_step)
        epoch, epoch_step = self.plan.locate(self.first_step + ahead)
        packs = _step_packs(self.plan, epoch, epoch_step, self.dp_rank, self.dp_size)
        return assemble(
            packs[pack],
            self.reader,
            self.plan.recipe,
            self.static_shapes,
            epoch=epoch,
            epoch_step=epoch_step,
        ).to_arrays()


@functools.lru_cache(maxsize=1)  # the packs of a step follow one another in a task
def _step_packs(
    plan: Plan, epoch: int, epoch_step: int, dp_rank: int, dp_size: int
) -> tuple[PackPlan, ...]:
    return tuple(plan.packs(epoch, epoch_step, dp_rank, dp_size))


@contextmanager
def open_stream(
    plan: Plan,
    reader: ClipReader,
    config: StreamConfig,
    start: int,
    stop: int,
    dp_rank: int,
    dp_size: int,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Iterator[list[PackedBatch]]]:
    """This rank's packs of steps `start` to `stop`, a list for each step.

    The first of them are in the making from here on, before anybody asks for one: a rank builds its
    model meanwhile. The list has ceil(G / dp_size) packs on every rank; where dp_size does not
    divide G, some are dummies. Epochs follow one another without a gap; `waiting` is called, by a
    thread, again and again while the plan of one is not made yet.
    """
    loader = _PackLoader(plan, reader, dp_rank, dp_size, config.static_shapes)
    longest = segment_steps(plan.recipe, reader, config, loader.packs_per_step)
    segments = _segments(start, stop, longest)
    context = _context(config)
    ahead = ThreadPoolExecutor(1, "stream")

    def submit() -> list[Future[Iterator[Arrays]]]:
        """The next segment, if there is one, in the making."""
        return [
            ahead.submit(_make_segment, loader, config, context, segment, waiting)
            for segment in islice(segments, 1)
        ]

    def steps(pending: list[Future[Iterator[Arrays]]]) -> Iterator[list[PackedBatch]]:
        step = start
        while pending:
            rows = pending.pop().result()
            pending = submit()  # made while the one before it is used
            while packs := list(islice(rows, loader.packs_per_step)):
                yield _check(packs, plan, reader, step, dp_rank, dp_size)
                step += 1
        assert step == stop, (step, stop)

    try:
        yield steps(submit())
    finally:  # an error must not wait for a segment in the making
        ahead.shutdown(wait=False, cancel_futures=True)


def segment_steps(
    recipe: Recipe, reader: ClipReader, config: StreamConfig, packs_per_step: int
) -> int:
    """Steps in a segment: as configured, or fewer, so that two full segments fit; at least 1."""
    token_bytes = reader.token_size * np.dtype(np.float32).itemsize
    text_bytes = recipe.max_text_tokens * reader.text_token_bytes
    pack_bytes = recipe.max_tokens * token_bytes + text_bytes
    fitting = (config.object_store_mb << 20) // (2 * pack_bytes * packs_per_step)
    return min(config.segment_steps, max(1, fitting))


def _segments(start: int, stop: int, longest: int) -> Iterator[range]:
    """Ranges of steps that double in length, so that the first batch comes soon."""
    length = min(FIRST_SEGMENT_STEPS, longest)
    while start < stop:
        yield range(start, min(start + length, stop))
        start, length = start + length, min(2 * length, longest)


def _make_segment(
    loader: _PackLoader,
    config: StreamConfig,
    context: DataContext,
    segment: range,
    waiting: Callable[[], None],
) -> Iterator[Arrays]:
    """Run the tasks of a segment to their end; then its rows, fetched one by one."""
    loader.plan.wait_for(segment[-1], waiting=waiting)
    num_rows = len(segment) * loader.packs_per_step
    num_tasks = -(-len(segment) // config.steps_per_task)
    with DataContext.current(context):  # a dataset keeps the context that it was made in
        numbers = ray.data.range(num_rows, override_num_blocks=num_tasks)
        made = numbers.map(replace(loader, first_step=segment.start)).materialize()
    return iter(made.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=1))


def _context(config: StreamConfig) -> DataContext:
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # not a wrapper that has lost its cause
    context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(
            cpu=config.max_tasks, object_store_memory=config.object_store_mb << 20
        ),
    )
    return context


def _check(
    rows: list[Arrays],
    plan: Plan,
    reader: ClipReader,
    step: int,
    dp_rank: int,
    dp_size: int,
) -> list[PackedBatch]:
    """Turn the rows of a step into batches and assert that they are the plan's."""
    epoch, epoch_step = plan.locate(step)
    batches = []
    for row, pack in zip(rows, plan.packs(epoch, epoch_step, dp_rank, dp_size), strict=True):
        batch = PackedBatch.from_arrays({name: value[0] for name, value in row.items()})
        place, planned = (epoch, epoch_step, pack.index), [reader.seen_id(c) for c in pack.clips]
        assert (batch.epoch, batch.epoch_step, batch.pack) == place, (batch.epoch, place)
        assert batch.clip_ids[: len(planned)].tolist() == planned, place
        batches.append(batch)
    return batches
