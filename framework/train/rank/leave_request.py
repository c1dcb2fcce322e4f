"""Whether the driver wants this run committed and left; rank 0 asks, in a thread."""

import contextlib
import os
import threading
import time

import ray
from ray.actor import ActorHandle

from framework.train.mailbox import NO_ROOM
from framework.train.rank.watchdog import EXIT_CODE

NO_ROOM_GRACE_S = 60.0  # chosen by hand: to end a step and commit it


class LeaveRequest:
    """Looks into the mailbox every second, in a thread, so that no step waits for the head.

    Where nodes have gone that carried no worker but made the batches, no step ends any more: a rank
    that cannot follow such a request in time ends itself, and the group starts again where there is
    room.
    """

    EVERY_S = 1.0

    def __init__(self, mailbox: ActorHandle | None) -> None:
        """`mailbox`: None on ranks that do not look, for whom there is no request."""
        self._mailbox, self._closed = mailbox, threading.Event()
        self.why = ""  # the driver wants this run left; empty where it does not
        self._thread = threading.Thread(target=self._run, name="leave request", daemon=True)

    def __enter__(self) -> "LeaveRequest":
        if self._mailbox is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _run(self) -> None:
        assert self._mailbox is not None
        asked = 0.0
        while not self._closed.wait(self.EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):  # an outage of the head
                self.why = str(ray.get(self._mailbox.leave_request.remote(), timeout=10))
            if self.why.startswith(NO_ROOM):
                asked = asked or time.monotonic()
                if time.monotonic() - asked > NO_ROOM_GRACE_S:
                    print(f"{self.why}, and no step ends: this rank does", flush=True)
                    os._exit(EXIT_CODE)
