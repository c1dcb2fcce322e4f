"""What passes between the driver and rank 0 while a run trains: lines to show, and a wish to stop.

Ctrl-C (or SIGTERM, which `ray job stop` sends) once asks the workers to commit a checkpoint and
stop; twice stops at once. The workers look for the wish at the end of each logging window, all at
the same step.
"""

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray

Line = dict[str, Any]


class Stopped(KeyboardInterrupt):
    """A run was stopped on purpose; the same command goes on with it."""


class Board:
    """A Ray actor that outlives worker restarts: lines of rank 0, and what the driver asks for.

    It keeps every line of text, and of the steps in between the last.
    """

    def __init__(self) -> None:
        self._lines: list[Line] = [{"stage": "starting workers"}]
        self._stop = False
        self._refusal: str | None = None

    def tell(self, line: Line) -> None:
        """Rank 0's next line."""
        if self._lines and "step" in line and "step" in self._lines[-1] and "loss" in line:
            self._lines.pop()
        self._lines.append(line)

    def take(self) -> list[Line]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def ask_stop(self) -> None:
        """The driver wants the run committed and stopped."""
        self._stop = True

    def stop_asked(self) -> bool:
        """Whether to stop."""
        return self._stop

    def refuse(self, why: str) -> None:
        """The workers will not train, and a restart would not help: not a failure of a worker."""
        self._refusal = why

    def refusal(self) -> str | None:
        """Why the workers did not train, if they did not."""
        return self._refusal


def make_board() -> Any:
    """A handle of a new board, on a node of Ray's choice."""
    return ray.remote(num_cpus=0)(Board).remote()


def stop_asked(board: Any) -> bool:
    """Whether the driver wants a stop; False where it cannot be asked."""
    try:
        return bool(ray.get(board.stop_asked.remote(), timeout=10))
    except ray.exceptions.RayError:
        return False


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
    board: Any, fit: Callable[[], object], show: Callable[[Line], None], check: Callable[[], None]
) -> bool:
    """Run `fit` to its end, showing the board's lines; whether a stop was asked for meanwhile.

    `check` is called every second. What either raises is raised here.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            fit()
        except BaseException as error:
            raised.append(error)

    # In a thread of its own: in the main one Ray Train would take Ctrl-C for itself.
    thread = threading.Thread(target=run, name="fit", daemon=True)
    with Interrupts() as interrupts:
        thread.start()
        told = False
        while thread.is_alive():
            thread.join(1.0)
            if interrupts.count and not told:
                told = True
                show({"text": "stopping after a checkpoint; once more to stop at once"})
                board.ask_stop.remote()
            _show_lines(board, show)
            check()
    if raised:
        raise raised[0]
    return told


def _show_lines(board: Any, show: Callable[[Line], None]) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # an outage of the head: ask again later
        for line in ray.get(board.take.remote(), timeout=10):
            show(line)
