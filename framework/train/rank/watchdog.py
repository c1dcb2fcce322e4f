"""A rank that makes no progress says where it stands, and ends, so that the run starts again.

In a hang all ranks but one wait in a collective, for ever; so every rank watches itself, writes
down the stacks of all its threads, and exits. Ray sees it die, which is a failure like any other.
"""

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
# A thread that holds the interpreter's lock keeps the watchdog's own thread from running; then
# faulthandler's, which is plain C, ends the process this much later.
LAST_RESORT = 2.0


class Hung(RuntimeError):
    """A rank made no progress for too long."""


class Watchdog:
    """Ends this process when `beat` was not called for `timeout_s`; 0 never does.

    `report` is handed the stacks before; it may take as long again, and no longer.
    """

    def __init__(self, timeout_s: float, report: Callable[[str], None]) -> None:
        self._timeout_s, self._report = timeout_s, report
        self._last = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._timeout_s:
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """There is progress."""
        self._last = time.monotonic()
        if self._timeout_s and not self._done.is_set():
            faulthandler.dump_traceback_later(LAST_RESORT * self._timeout_s, exit=True)

    def _watch(self) -> None:
        while not self._done.wait(max(0.1, self._last + self._timeout_s - time.monotonic())):
            if time.monotonic() - self._last >= self._timeout_s:
                try:
                    self._report(stacks())
                finally:
                    os._exit(EXIT_CODE)


def stacks() -> str:
    """Where each thread of this process is, the innermost call first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
