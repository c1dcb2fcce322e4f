"""A plan on disk: its index, and reading the packs of any step.

A reader trusts an epoch once its index is there, and not before. Any rank finds its rows of any
step by one look into the index and one window file, whose row groups hold a few steps each.
"""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framework.data.parquet import read_table
from framework.data.plan.recipe import Recipe, plan_digest
from framework.data.plan.rows import ClipPlan, PackPlan, dummy_clip
from framework.storage import Store

INDEX = pa.schema(
    [
        ("step", pa.int32()),
        ("window", pa.int32()),
        ("row_group", pa.int32()),
        ("packs", pa.int32()),
        ("clips", pa.int64()),
        ("tokens", pa.int64()),
        ("loss_tokens", pa.int64()),
        ("text_tokens", pa.int64()),
        ("pixels", pa.int64()),  # of views: frames times height times width
        ("cost", pa.int64()),
        ("max_cost", pa.int64()),
        ("fill", pa.float64()),
    ]
)


# What a loss may be averaged over -> the field of StepTotals that counts it.
AVERAGED_OVER = {"video_tokens": "loss_tokens", "text_tokens": "text_tokens", "pixels": "pixels"}


@dataclass(frozen=True)
class StepTotals:
    """Sums over all packs of a step, dummies left out but for the cost."""

    packs: int
    clips: int
    tokens: int
    loss_tokens: int
    text_tokens: int
    pixels: int  # of the views: frames times height times width
    cost: int
    max_cost: int  # of the dearest pack

    def averaged_over(self, what: str) -> int:
        """How many there are of what a loss is averaged over: a key of AVERAGED_OVER."""
        if what not in AVERAGED_OVER:
            raise ValueError(
                f"the objective's averaged_over={what!r} must be one of {', '.join(AVERAGED_OVER)}"
            )
        return int(getattr(self, AVERAGED_OVER[what]))


@dataclass(frozen=True)
class PlanSummary:
    """How good an epoch's plan is; `print` it."""

    digest: str
    epoch: int
    steps: int
    global_batch_packs: int
    dummies: int
    clips: int
    offered: int
    tokens: int
    refused: dict[str, int]  # clips by cause
    filtered: int  # clips that `where` left out; not among the offered
    fill: float  # tokens over the room for tokens, dummies left out
    text_fill: float
    imbalance: float  # sum over steps of the dearest pack's cost, over that of the mean pack's

    def __str__(self) -> str:
        causes = ", ".join(f"{n:,} {cause}" for cause, n in sorted(self.refused.items()))
        return "\n".join(
            [
                f"plan {self.digest}, epoch {self.epoch}",
                f"  steps      {self.steps:,} of {self.global_batch_packs} packs, "
                f"{self.tokens / self.steps:,.0f} tokens each; {self.dummies} dummy packs",
                f"  clips      {self.clips:,} of {self.offered:,} used "
                f"({self.clips / self.offered:.1%}); refused: {causes or 'none'}"
                + (f"; left out by data.where: {self.filtered:,}" if self.filtered else ""),
                f"  fill       {self.fill:.3f} of the tokens, {self.text_fill:.3f} of the text",
                f"  imbalance  {self.imbalance:.3f} (dearest pack over mean pack, by step)",
            ]
        )


class NotMadeYet(ValueError):
    """An epoch whose plan is not committed."""


class Plan:
    """A reader of one plan; picklable, and cheap to ask at random."""

    def __init__(self, store: Store, digest: str) -> None:
        """`store`: as `make_epoch` was given. ValueError where no such plan was made."""
        self.store = store.child("plan", digest)
        self.digest = digest
        try:
            made_from = json.loads(self.store.read("recipe.json"))
        except FileNotFoundError as error:
            raise ValueError(f"there is no plan {digest} in {store.url}; make it") from error
        found = plan_digest(made_from["identity"])
        if found != digest:
            raise ValueError(f"recipe.json of plan {digest} is that of {found}; delete the plan")
        self.recipe = Recipe.from_mapping(made_from["identity"]["recipe"])
        self.split: str = made_from["identity"]["split"]
        self.sources: tuple[str, ...] = tuple(made_from["sources"])
        self._dummy = dummy_clip(self.recipe, made_from["null_text_tokens"])

    def has_epoch(self, epoch: int) -> bool:
        """Whether the epoch's plan is committed."""
        return self.store.exists(f"{epoch_folder(epoch)}/index.parquet")

    def num_steps(self, epoch: int) -> int:
        """Steps in an epoch; ValueError where it was not made, here and in all below."""
        return self._index(epoch).num_rows

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, epoch_step) of a step counted from the run's start, through the epochs made."""
        if step < 0:
            raise ValueError(f"step={step} must not be negative")
        epoch, epoch_step = 0, step
        while epoch_step and epoch_step >= (num_steps := self.num_steps(epoch)):
            epoch, epoch_step = epoch + 1, epoch_step - num_steps
        return epoch, epoch_step

    def wait_for(
        self, step: int, poll_s: float = 1.0, waiting: Callable[[], None] = lambda: None
    ) -> None:
        """Wait until the epoch of a step is made: the driver makes one while another trains.

        Meanwhile `waiting` is called, again and again.
        """
        while True:
            try:
                self._index(self.locate(step)[0])
            except NotMadeYet:
                waiting()
                time.sleep(poll_s)
            else:
                return

    def epochs_of(self, steps: int) -> str:
        """How many epochs so many steps are, in words."""
        return f"  {steps:,} steps are {steps / self.num_steps(0):.1f} epochs"

    def totals(self, epoch: int, epoch_step: int) -> StepTotals:
        """Sums over a step of an epoch."""
        row = self._index_row(epoch, epoch_step)
        return StepTotals(**{name: row[name] for name in StepTotals.__dataclass_fields__})

    def packs(self, epoch: int, epoch_step: int, dp_rank: int, dp_size: int) -> list[PackPlan]:
        """Packs dp_rank, dp_rank + dp_size, … of a step: ceil(G / dp_size) on every rank.

        Where dp_size does not divide G, some ranks get a dummy. ValueError where dp_size > G.
        """
        num_packs = self.recipe.global_batch_packs
        if not 1 <= dp_size <= num_packs:
            raise ValueError(
                f"dp_size={dp_size} must lie between 1 and global_batch_packs={num_packs}; "
                "use fewer ranks or a larger global batch"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank={dp_rank} must lie between 0 and {dp_size - 1}")
        row = self._index_row(epoch, epoch_step)
        rows = _read_rows(self.store, epoch, row["window"], row["row_group"])
        borders = np.searchsorted(rows["step"].to_numpy(), [epoch_step, epoch_step + 1])
        start, stop = borders.tolist()
        rows = rows.slice(start, stop - start)
        mine = rows.filter(pa.array(rows["pack"].to_numpy() % dp_size == dp_rank))
        clips: defaultdict[int, list[ClipPlan]] = defaultdict(list)
        for values in mine.to_pylist():
            assert values["step"] == epoch_step, (values, epoch_step)
            clips[values["pack"]].append(ClipPlan.from_row(values, self.recipe.geometry))
        for index in range(num_packs, -(-num_packs // dp_size) * dp_size):
            if index % dp_size == dp_rank:
                clips[index] = [self._dummy]
        return [PackPlan(tuple(c), i, c[0].dummy) for i, c in sorted(clips.items())]

    def refused(self, epoch: int) -> list[tuple[str, str]]:
        """(key, cause) of each clip that the epoch cannot use."""
        self._index(epoch)  # only what is committed counts
        names = [n for n in self.store.list(epoch_folder(epoch)) if "/refused-" in n]
        tables = [read_table(self.store, name) for name in sorted(names)]
        return [(row["key"], row["cause"]) for table in tables for row in table.to_pylist()]

    def summary(self, epoch: int) -> PlanSummary:
        """Fill, balance and share of clips used of an epoch."""
        index = self._index(epoch)
        total = {name: pc.sum(index[name]).as_py() for name in ("packs", "clips", "tokens")}
        num_packs, recipe = total["packs"], self.recipe
        facts = read_epoch_facts(self.store, epoch)
        refused = facts["refused"]
        mean_cost = pc.sum(index["cost"]).as_py() / recipe.global_batch_packs
        return PlanSummary(
            digest=self.digest,
            epoch=epoch,
            steps=index.num_rows,
            global_batch_packs=recipe.global_batch_packs,
            dummies=index.num_rows * recipe.global_batch_packs - num_packs,
            clips=total["clips"],
            offered=total["clips"] + sum(refused.values()),
            tokens=total["tokens"],
            refused=refused,
            filtered=facts["filtered"],
            fill=total["tokens"] / (num_packs * recipe.max_tokens),
            text_fill=pc.sum(index["text_tokens"]).as_py() / (num_packs * recipe.max_text_tokens),
            imbalance=pc.sum(index["max_cost"]).as_py() / mean_cost,
        )

    def _index(self, epoch: int) -> pa.Table:
        try:
            return _read_index(self.store, epoch)
        except FileNotFoundError as error:
            raise NotMadeYet(
                f"epoch {epoch} of plan {self.digest} is not made yet; make more of the plan"
            ) from error

    def _index_row(self, epoch: int, epoch_step: int) -> dict[str, Any]:
        index = self._index(epoch)
        if not 0 <= epoch_step < index.num_rows:
            raise ValueError(
                f"epoch_step={epoch_step}: epoch {epoch} has steps 0 to {index.num_rows - 1}"
            )
        return index.slice(epoch_step, 1).to_pylist()[0]


def read_epoch_facts(plan: Store, epoch: int) -> dict[str, Any]:
    """What else the planner says of an epoch; `plan`: the plan's folder. ValueError: not made."""
    try:
        metadata = _read_index(plan, epoch).schema.metadata
    except FileNotFoundError as error:
        raise ValueError(f"epoch {epoch} of {plan.url} is not made yet; make it first") from error
    facts: dict[str, Any] = json.loads(metadata[b"facts"])
    return facts


def epoch_folder(epoch: int) -> str:
    """Where the files of an epoch lie, in the plan's folder."""
    return f"epoch-{epoch:05d}"


# What is committed never changes, so the caches belong to the process, not to one Plan: tasks that
# unpickle a plan again and again still read each file once.
@functools.lru_cache(maxsize=1024)
def _read_index(plan: Store, epoch: int) -> pa.Table:
    return read_table(plan, f"{epoch_folder(epoch)}/index.parquet")


@functools.lru_cache(maxsize=2)
def _read_window(plan: Store, epoch: int, window: int) -> pa.Buffer:
    return plan.read_buffer(f"{epoch_folder(epoch)}/window-{window:05d}.parquet")


@functools.lru_cache(maxsize=2)
def _read_rows(plan: Store, epoch: int, window: int, row_group: int) -> pa.Table:
    data = _read_window(plan, epoch, window)
    return pq.ParquetFile(pa.BufferReader(data)).read_row_group(row_group)
