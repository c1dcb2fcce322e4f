"""Items come in order; an error reaches the consumer; leaving early ends the thread."""

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from framework.train.rank.prefetch import Prefetch


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_end() -> None:
    with Prefetch(iter(range(5)), depth=2) as items:
        assert list(items) == [0, 1, 2, 3, 4]
        assert list(items) == []
    assert not prefetch_threads()


def test_how_many_lay_ready_is_the_mean_since_it_was_asked() -> None:
    produced = threading.Semaphore(0)

    def items() -> Iterator[int]:
        yield from range(4)
        produced.release()  # all four are in the queue, or taken

    with Prefetch(items(), depth=4) as ready:
        assert produced.acquire(timeout=60)
        assert [next(ready) for _ in range(4)] == [0, 1, 2, 3]
        mean = ready.mean_ready()
        assert 2.5 <= mean <= 3.5  # 4, 3, 2, 1, and the end of it where that came in time
        assert ready.mean_ready() == 0


def test_waiting_is_counted_until_it_is_asked() -> None:
    asked, now, readings = threading.Semaphore(0), [100.0], count()

    def items() -> Iterator[int]:
        for number, wait_s in enumerate((1.0, 3.0)):
            assert asked.acquire(timeout=60)
            now[0] += wait_s
            yield number

    def clock() -> float:
        reading = now[0]
        if next(readings) % 2 == 0:  # the consumer begins to wait
            asked.release()
        return reading

    with Prefetch(items(), depth=1, clock=clock) as steps:
        assert next(steps) == 0
        first = steps.take_wait_s()
        assert next(steps) == 1
    assert (first, steps.take_wait_s()) == (1.0, 3.0)
    assert steps.take_wait_s() == 0.0


def test_an_error_comes_after_the_items_before_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("the shard is gone")

    with Prefetch(broken(), depth=1) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the shard is gone"):
                next(items)


def test_leaving_early_closes_an_endless_producer() -> None:
    closed_by = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed_by.append(threading.current_thread().name)

    with Prefetch(endless(), depth=2) as items:
        assert next(items) == 0
    assert closed_by == ["prefetch"]
    assert not prefetch_threads()
    assert list(items) == []  # and does not wait


def test_an_error_leaves_the_block_although_the_producer_is_stuck() -> None:
    release = threading.Event()
    producers = []

    def stuck() -> Iterator[int]:
        producers.append(threading.current_thread())
        yield 0
        release.wait()  # not set before the block is left: a store that never answers
        yield 1
        yield 2

    def consume() -> None:
        with Prefetch(stuck(), depth=1, deadline_s=0.2) as items:
            assert next(items) == 0
            raise ValueError("a loss that is not finite")

    began = time.monotonic()
    with pytest.raises(ValueError, match="a loss that is not finite"):
        consume()
    assert time.monotonic() - began < 5  # 0.2 s and a busy machine
    (producer,) = producers
    assert producer.is_alive()
    assert producer.daemon
    release.set()
    producer.join(timeout=5)
    assert not producer.is_alive()  # it goes once it can, full queue or not
