"""What passes between the driver and the workers while a run trains: lines to show, wishes.

Ctrl-C (or SIGTERM, which `ray job stop` sends) once asks the workers to commit a checkpoint and
stop; twice stops at once. The driver asks likewise when nodes come or go. All ranks follow at the
end of the same step.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from framework.train.watchdog import EXIT_CODE

Line = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """A run was stopped on purpose; the same command goes on with it."""


class Board:
    """A Ray actor beside the driver: lines of rank 0, and what the driver asks for.

    It keeps every line of text, and of the steps in between the last.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = [{"stage": "starting workers"}]
        self._wish = ""
        self._refusal: str | None = None
        self._left = ""

    def tell(self, line: Line) -> None:
        """Rank 0's next line."""
        if self._lines and "step" in line and "step" in self._lines[-1] and "loss" in line:
            self._lines.pop()
        self._lines.append(line)

    def take(self) -> list[Line]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def ask(self, wish: str) -> None:
        """The driver wants the run committed and left, and says why."""
        self._wish = wish

    def wish(self) -> str:
        """Why to leave; empty where there is no wish."""
        return self._wish

    def leave(self, why: str) -> None:
        """The workers have committed and left before the last step."""
        self._left = why

    def left(self) -> str:
        """Why the workers left, if they did."""
        return self._left

    def refuse(self, why: str) -> None:
        """The workers will not train, and a restart would not help; the first reason counts."""
        self._refusal = self._refusal or why

    def refusal(self) -> str | None:
        """Why the workers will not train, if they will not."""
        return self._refusal


def make_board() -> Any:
    """A handle of a new board, on the driver's own node: it goes with no other."""
    here = ray.get_runtime_context().get_node_id()
    beside = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=beside).remote()


NO_ROOM = "no room"  # how a wish begins that workers may be unable to follow
NO_ROOM_GRACE_S = 60.0  # chosen by hand: to end a step and commit it


class Wishes:
    """Asks the board every second, in a thread, so that no step waits for the head; rank 0 does.

    Where nodes have gone that carried no worker but made the batches, no step ends any more: a rank
    that cannot follow such a wish in time ends itself, and the group starts again where there is
    room.
    """

    EVERY_S = 1.0

    def __init__(self, board: Any) -> None:
        """`board`: None where there is nobody to ask, and no wish."""
        self._board, self._closed, self.wish = board, threading.Event(), ""
        self._thread = threading.Thread(target=self._run, name="wishes", daemon=True)

    def __enter__(self) -> "Wishes":
        if self._board is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _run(self) -> None:
        asked = 0.0
        while not self._closed.wait(self.EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):  # an outage of the head
                self.wish = str(ray.get(self._board.wish.remote(), timeout=10))
            if self.wish.startswith(NO_ROOM):
                asked = asked or time.monotonic()
                if time.monotonic() - asked > NO_ROOM_GRACE_S:
                    print(f"{self.wish}, and no step ends: this rank does", flush=True)
                    os._exit(EXIT_CODE)


class Interrupts:
    """Counts Ctrl-C and SIGTERM instead of dying of the first; the second is KeyboardInterrupt."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.count = 0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._old = {s: signal.signal(s, self._handle) for s in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        if self.count > 1:
            raise Stopped("stopped at once; the same command goes on from the last checkpoint")


def follow(
    board: Any,
    fit: Callable[[], object],
    show: Callable[[Line], None],
    interrupts: Interrupts,
    wish: Callable[[], str],
) -> None:
    """Run `fit` to its end, showing the board's lines. What it raises is raised here.

    `wish` is called every second; where it gives a reason to leave, the workers are asked to, once.
    So they are after an interrupt.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            raised.append(error)

    # In a thread of its own: in the main one Ray Train would take Ctrl-C for itself.
    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    asked = ""
    while thread.is_alive():
        thread.join(1.0)
        why = "stop" if interrupts.count else wish()
        if why and why != asked:
            if why == "stop":
                show({"text": "stopping after a checkpoint; once more to stop at once"})
            asked = why
            board.ask.remote(why)
        _show_lines(board, show)
    _show_lines(board, show)  # what was told in the last second
    if raised:
        raise raised[0]


def _show_lines(board: Any, show: Callable[[Line], None]) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # an outage of the head: ask again later
        for line in ray.get(board.take.remote(), timeout=10):
            show(line)
