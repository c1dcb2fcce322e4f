"""Whether the driver wants this run committed and left; rank 0 asks, in a thread."""

import contextlib
import os
import threading
import time
from typing import Any

import ray

from framework.train.mailbox import NO_ROOM
from framework.train.rank.watchdog import EXIT_CODE

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
