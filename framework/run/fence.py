"""Each start of the workers is an attempt with an id of its own; only the newest may commit.

A worker on a node that was cut off lives on for a while after the run has begun again without it,
and a second driver may be started by mistake: both look at `attempt.json` before they commit.
"""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from framework.storage import Store

_NAME = "attempt.json"


class Superseded(RuntimeError):
    """Another attempt of this run has begun: this one must write nothing more."""


@dataclass(frozen=True)
class Fence:
    """The right of one attempt to write to a run."""

    run: Store
    number: int  # from 1, over all drivers of the run
    attempt: str  # its id

    def check(self) -> None:
        """Superseded where a newer attempt has begun."""
        newest = read_attempt(self.run)
        if newest.get("id") != self.attempt:
            raise Superseded(
                f"attempt {self.number} of {self.run.url} was superseded by attempt "
                f"{newest.get('number')}, begun at {newest.get('began')}; nothing more is written"
            )


def begin_attempt(run: Store, num_workers: int) -> Fence:
    """The right to write, taken from whoever had it."""
    fence = Fence(run, read_attempt(run).get("number", 0) + 1, uuid.uuid4().hex[:12])
    record = {
        "number": fence.number,
        "id": fence.attempt,
        "num_workers": num_workers,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    run.write(_NAME, json.dumps(record).encode())
    return fence


def read_attempt(run: Store) -> dict[str, Any]:
    """The newest attempt of a run; empty before the first."""
    return dict(json.loads(run.read(_NAME))) if run.exists(_NAME) else {}
