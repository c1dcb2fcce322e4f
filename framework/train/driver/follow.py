"""Follow a group of workers from the driver: show its lines, pass on Ctrl-C and other requests.

Ctrl-C (or SIGTERM, which `ray job stop` sends) once asks the workers to commit a checkpoint and
stop; twice stops at once.
"""

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray
from ray.actor import ActorHandle

from framework.terminal import Show


class Stopped(KeyboardInterrupt):
    """A run was stopped on purpose; the same command goes on with it."""


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
    mailbox: ActorHandle,
    fit: Callable[[], object],
    show: Show,
    interrupts: Interrupts,
    why_leave: Callable[[], str],
) -> None:
    """Run `fit` to its end, showing the mailbox's lines. What it raises is raised here.

    `why_leave` is called every second; where it gives a reason, the workers are asked to leave,
    once. So they are after an interrupt.
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
        why = "stop" if interrupts.count else why_leave()
        if why and why != asked:
            if why == "stop":
                show({"text": "stopping after a checkpoint; once more to stop at once"})
            asked = why
            mailbox.ask_to_leave.remote(why)
        _show_lines(mailbox, show)
    _show_lines(mailbox, show)  # what was told in the last second
    if raised:
        raise raised[0]


def _show_lines(mailbox: ActorHandle, show: Show) -> None:
    with contextlib.suppress(ray.exceptions.RayError):  # an outage of the head: ask again later
        for line in ray.get(mailbox.take.remote(), timeout=10):
            show(line)
