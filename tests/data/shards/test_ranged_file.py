import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.shards.ranged_file import FIRST_READ_BYTES, RangedFile

DATA = bytes(range(256)) * 3000


class Counted:
    """The object, and what was asked of it."""

    def __init__(self, data=DATA):
        self.data = data
        self.requests = []

    def __call__(self, offset, size):
        assert 0 <= offset <= offset + size <= len(self.data)
        self.requests.append((offset, size))
        return self.data[offset : offset + size]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 90_000)), max_size=12),
    st.integers(0, 70_000),
)
def test_it_reads_what_a_file_reads(reads, head):
    ranged, plain = RangedFile(Counted(), len(DATA), DATA[:head]), io.BytesIO(DATA)
    for start, size in reads:
        assert ranged.seek(start) == plain.seek(start)
        assert ranged.read(size) == plain.read(size)
        assert ranged.tell() == plain.tell()


def test_seeking_from_here_and_from_the_end():
    file = RangedFile(Counted(), len(DATA))
    file.seek(10)
    assert file.seek(5, 1) == 15
    assert file.seek(-4, 2) == len(DATA) - 4
    assert file.read() == DATA[-4:]
    assert file.read(9) == b""


def test_small_reads_cost_few_requests_and_distant_ones_few_bytes():
    counted = Counted()
    file = RangedFile(counted, len(DATA))
    for start in range(0, 4000, 100):
        file.seek(start)
        file.read(64)
    assert counted.requests == [(0, FIRST_READ_BYTES)]
    file.seek(700_000)
    file.read(64)
    assert counted.requests[1:] == [(700_000, FIRST_READ_BYTES)]


def test_reading_on_takes_ever_more_at_once():
    counted = Counted()
    file = RangedFile(counted, len(DATA))
    while file.read(1000):
        pass
    assert sum(size for _, size in counted.requests) < 1.1 * len(DATA)
    assert len(counted.requests) < 10


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3000)), max_size=5),
    st.lists(st.tuples(st.integers(0, 6000), st.integers(1, 4000)), max_size=8),
)
def test_what_is_left_out_reads_as_zeros_and_is_not_fetched(gaps, reads):
    data = DATA[1:7001].replace(b"\0", b"\1")
    expected = bytearray(data)
    for start, size in gaps:
        expected[start : start + size] = bytes(len(expected[start : start + size]))
    file = RangedFile(lambda offset, size: data[offset : offset + size], len(data))
    file.leave_out(gaps)
    for start, size in reads:
        file.seek(start)
        found = b""
        while len(found) < size and (more := file.read(size - len(found))):
            found += more
        assert found == bytes(expected[start : start + size])


@pytest.mark.parametrize("size", [0, 1, FIRST_READ_BYTES])
def test_no_request_for_nothing(size):
    counted = Counted()
    file = RangedFile(counted, 5_000_000)
    file.leave_out([(0, 5_000_000)])
    assert file.read(size) == bytes(size)
    assert counted.requests == []
