"""Run an iterator ahead of its consumer, in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterate `items` in a thread, at most `depth` ahead; an error in it is raised by the consumer.

    Leaving the `with` block ends the thread.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetch[T]":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        while self._thread.is_alive():  # make room for a put that waits
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        kind, value = self._queue.get()
        if kind == "item":
            return value  # type: ignore[return-value]
        self._queue.put((kind, value))  # whoever asks again gets the same answer
        if kind == "error":
            assert isinstance(value, BaseException)
            raise value
        raise StopIteration

    def _run(self) -> None:
        try:
            for item in self._items:
                self._queue.put(("item", item))
                if self._closed.is_set():
                    return
            self._queue.put(("end", None))
        except BaseException as error:
            self._queue.put(("error", error))
