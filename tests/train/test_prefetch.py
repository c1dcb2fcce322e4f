"""Items come in order; an error reaches the consumer; leaving early ends the thread."""

import threading
from collections.abc import Iterator

import pytest

from framework.train.prefetch import Prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_end() -> None:
    with Prefetch(iter(range(5)), depth=2) as items:
        assert list(items) == [0, 1, 2, 3, 4]
        assert list(items) == []
    assert not prefetch_threads()


def test_an_error_comes_after_the_items_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the shard is gone")

    with Prefetch(broken(), depth=2) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the shard is gone"):
                next(items)


def test_leaving_early_ends_an_endless_producer() -> None:
    def endless() -> Iterator[int]:
        number = 0
        while True:
            yield number
            number += 1

    with Prefetch(endless(), depth=2) as items:
        assert next(items) == 0
    assert not prefetch_threads()
