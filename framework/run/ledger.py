"""The ledger: a run's account of itself, for each step the clips of each rank and the loss.

A segment is written just before the checkpoint that ends it, under that checkpoint's name, so that
a step done again after a failure replaces its first account: the ledger holds the last execution of
each step.
"""

import json
from typing import Any

from framework.run.checkpoint import Checkpoints
from framework.storage import Store


def ledger_folder(step: int) -> str:
    """The folder of the ledger segment that the checkpoint of `step` ends; each rank has a file."""
    return f"ledger/step-{step:08d}"


def ledger_name(step: int, rank: int) -> str:
    """Where one rank's part of it lies."""
    return f"{ledger_folder(step)}/rank-{rank:05d}.jsonl"


def quarantine_folder(step: int) -> str:
    """Where clips of the segment are named that could not be read; a file a rank."""
    return f"quarantine/step-{step:08d}"


def quarantine_name(step: int, rank: int) -> str:
    """Where one rank's part of it lies."""
    return f"{quarantine_folder(step)}/rank-{rank:05d}.json"


def read_ledger(run: Store) -> dict[int, dict[str, Any]]:
    """step -> {"clips": sorted ids over all ranks, "loss": float}, up to the last checkpoint.

    `run` is the run's folder. A segment whose checkpoint was not committed may lack a rank; its
    steps are told again by a newer segment, or will be: so the newest segment counts.
    """
    committed = Checkpoints(run.child("checkpoints")).committed_steps()
    steps: dict[int, dict[str, Any]] = {}
    told_by: dict[int, int] = {}  # step -> the segment that tells it
    for name in run.list("ledger"):  # older segments come first
        segment = int(name.split("/")[1].removeprefix("step-"))
        if not committed or segment > committed[-1]:
            continue
        for line in run.read(name).decode().splitlines():
            row = json.loads(line)
            if told_by.get(row["step"]) != segment:
                steps[row["step"]] = {"clips": [], "loss": row["loss"]}
                told_by[row["step"]] = segment
            entry = steps[row["step"]]
            entry["clips"] = sorted(entry["clips"] + row["clips"])
    return steps


def segment_loss(run: Store, step: int) -> tuple[int, float] | None:
    """Number of steps and mean loss of the ledger segment that the checkpoint of `step` ends.

    None where there is no such segment in the run's folder `run`.
    """
    try:
        lines = run.read(ledger_name(step, 0)).decode().splitlines()  # all ranks have the loss
    except FileNotFoundError:
        return None
    rows = [json.loads(line) for line in lines]
    losses = [row["loss"] for row in rows if row["loss"] is not None]
    return (len(losses), sum(losses) / len(losses)) if losses else None
