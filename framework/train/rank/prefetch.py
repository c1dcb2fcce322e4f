"""Run an iterator ahead of its consumer, in a thread."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

POLL_S = 0.05  # how often a thread that waits for room looks whether it is still wanted


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Prefetch(Generic[T]):
    """Iterate `items` in a thread, at most `depth` ahead; an error in it is raised by the consumer.

    Leaving the `with` block closes `items`, if it is a generator, and ends the thread. A thread
    that sits in next(items) cannot be ended: after `deadline_s` it is left behind, as a daemon, so
    that an exception leaves the block in any case.
    """

    def __init__(
        self,
        items: Iterator[T],
        depth: int,
        deadline_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._items = items
        self._clock, self._wait_s = clock, 0.0
        self._deadline_s = deadline_s
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._closed = threading.Event()
        self._end: _End | None = None
        self._taken = self._ready = 0
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._end = self._end or _End(None)
        self._thread.join(self._deadline_s)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._end is None:
            self._taken += 1
            self._ready += self._queue.qsize()
            began = self._clock()
            item = self._queue.get()
            self._wait_s += self._clock() - began
            if not isinstance(item, _End):
                return item
            self._end = item  # whoever asks again gets the same answer
        raise self._end.error or StopIteration

    def take_wait_s(self) -> float:
        """Seconds that the consumer waited for items, since the last call."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def mean_ready(self) -> float:
        """How many items lay ready when one was asked for, on the average since the last call."""
        mean = self._ready / max(1, self._taken)
        self._taken = self._ready = 0
        return mean

    def _run(self) -> None:
        try:
            self._produce()
        except BaseException as error:
            self._put(_End(error))
        else:
            self._put(_End(None))

    def _produce(self) -> None:
        try:
            for item in self._items:
                self._put(item)
                if self._closed.is_set():
                    return
        finally:  # in this thread: another one must not close a generator that runs
            getattr(self._items, "close", lambda: None)()

    def _put(self, item: T | _End) -> None:
        """Wait for room, as long as there is a reader."""
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=POLL_S)
            except queue.Full:
                continue
