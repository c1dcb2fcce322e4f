"""Keeps the run's ledger: rows of steps until the checkpoint that ends their segment is written.

A checkpoint that could not be written leaves its rows to the next one.
"""

import contextlib
import json
import math
from typing import Any

from framework.run.ledger import ledger_folder, ledger_name, quarantine_folder, quarantine_name
from framework.storage import Store
from framework.train.loop import StepOutput
from framework.train.observers.observer import Kept, Observer, Saved


class LedgerKeeper(Observer):
    """One rank's rows; see `framework.run.ledger`."""

    def __init__(self, run: Store, dp_rank: int, attempt: int) -> None:
        """`attempt`: the number of this attempt, for what a failure leaves behind."""
        self._run, self._dp_rank, self._attempt = run, dp_rank, attempt
        self._rows: list[dict[str, Any]] = []  # of steps that are in no committed checkpoint
        self._failed: list[str] = []  # clips of these steps, with the cause
        self._saving = (0, 0)  # so many of both are in the checkpoint that is being written

    def step(self, output: StepOutput) -> None:
        """Add a row."""
        self._rows.append(ledger_row(output))
        self._failed += [name for batch, _ in output.inputs.packs for name in batch.failed]

    def commit(self, steps_done: int) -> Kept:
        """The segment that this checkpoint ends."""
        self._saving = len(self._rows), len(self._failed)
        rows, failed = lines(self._rows), json.dumps(self._failed, indent=1).encode()
        files = {ledger_name(steps_done, self._dp_rank): lambda: rows}
        if self._failed:
            files[quarantine_name(steps_done, self._dp_rank)] = lambda: failed
        return Kept(files=files, folders=(ledger_folder(steps_done), quarantine_folder(steps_done)))

    def committed(self, saved: Saved) -> None:
        """Let go of what is told."""
        if saved.error is None:
            num_rows, num_failed = self._saving
            del self._rows[:num_rows]
            del self._failed[:num_failed]

    def end(self, error: BaseException | None) -> None:
        """Keep the rows of all steps that no checkpoint has, as far as this rank has heard."""
        if error is None:
            return
        name = f"failed/attempt-{self._attempt:04d}/rank-{self._dp_rank:05d}.jsonl"
        with contextlib.suppress(OSError):  # it must not stand in for what was raised
            self._run.write(name, lines(self._rows))


def ledger_row(output: StepOutput) -> dict[str, Any]:
    """A step in the ledger; a loss that is no number is null there."""
    batches = [batch for batch, _ in output.inputs.packs]
    row: dict[str, Any] = {
        "step": output.inputs.step,
        "clips": [i for batch in batches for i in batch.clip_ids.tolist() if i >= 0],
        "loss": output.loss if math.isfinite(output.loss) else None,
    }
    if failed := [name for batch in batches for name in batch.failed]:
        row["failed"] = failed
    if output.skipped:
        row["skipped"] = output.skipped
    return row


def lines(rows: list[dict[str, Any]]) -> bytes:
    """A line of JSON for each step."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
