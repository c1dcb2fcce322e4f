"""What watches a session: one small protocol.

A session calls every observer at the same moments and in the same order on every rank, so that an
observer may use collectives. It knows none of them by name.
"""

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from framework.train.loop import StepOutput


@dataclass(frozen=True)
class Kept:
    """What an observer leaves with a checkpoint.

    `meta`: plain JSON for the checkpoint's meta.json. `files`: of the run's folder by name; the
    thread that writes the checkpoint asks for their bytes. `spare_files`: a checkpoint can do
    without them, where they cannot be read or written. `folders`: of the run's folder, which are
    this checkpoint's own: what an earlier attempt left in them is deleted first.
    """

    meta: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    spare_files: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    folders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was written, or was not: then `error` says why, on every rank alike."""

    steps_done: int
    write_s: float
    error: Exception | None = None


class Observer(Protocol):
    """Inherit from it, and say what you want to know; what you leave out does nothing."""

    def begin(self) -> None:
        """Training begins."""
        return

    def step(self, output: StepOutput) -> None:
        """A step is over."""
        return

    def window(self) -> None:
        """`train.log_every` steps are over, or a checkpoint is due."""
        return

    def commit(self, steps_done: int) -> Kept:
        """A checkpoint is due; what goes into it."""
        return Kept()

    def stalled(self, steps_done: int, seconds: float) -> None:
        """Training stood still for so long, for the checkpoint that is written from now on."""
        return

    def committed(self, saved: Saved) -> None:
        """A checkpoint has been written, or could not be."""
        return

    def end(self, error: BaseException | None) -> None:
        """Training is over; `error` is what ended it, None where nothing went wrong."""
        return


def end_all(observers: Iterable[Observer], error: BaseException | None) -> None:
    """End every observer. What one raises hides neither the others' last words nor `error`."""
    failed: list[Exception] = []
    for observer in observers:
        try:
            observer.end(error)
        except Exception as another:
            traceback.print_exc()
            failed.append(another)
    if failed and error is None:
        raise failed[0]
