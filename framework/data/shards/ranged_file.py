"""An object of a store as a file, of which only what is read is fetched.

A tar's headers lie between its payloads, and a video's headers before or behind its pictures: to
read them takes a few requests and some KB of a file of gigabytes.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable

# A request to an object store takes tens of milliseconds, the time of some MB: 16 KiB cost
# nothing, and usually hold the next clip's JSON, caption and all three headers.
FIRST_READ_BYTES = 16 << 10
# Whoever goes on this near to what was read last gets twice as much as then: below it the bytes
# between cost less than a request (framework/data/shards/fetch.py).
NEAR_BYTES = 512 << 10
MAX_READ_BYTES = 8 << 20


class RangedFile:
    """A seekable binary file, for reading; it keeps what it fetched last."""

    def __init__(
        self, read_at: Callable[[int, int], bytes], size_bytes: int, head: bytes = b""
    ) -> None:
        """read_at(offset, size) gives bytes of the object; `head` is its beginning, if at hand."""
        self.size_bytes = size_bytes
        self._read_at = read_at
        self._position = 0
        self._start, self._block = 0, head
        self._gap_starts: list[int] = []
        self._gap_stops: list[int] = []

    def leave_out(self, ranges: Iterable[tuple[int, int]]) -> None:
        """From now on these (offset, size) read as zeros and are not fetched."""
        for offset, size in sorted(ranges):
            stop = min(offset + size, self.size_bytes)
            if self._gap_stops and offset <= self._gap_stops[-1]:
                self._gap_stops[-1] = max(stop, self._gap_stops[-1])
            elif offset < stop:
                self._gap_starts.append(offset)
                self._gap_stops.append(stop)

    def tell(self) -> int:
        """Where the next read begins."""
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file."""
        self._position = offset + (0, self._position, self.size_bytes)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, all to the end for -1; fewer at the border of what is left out."""
        stop = self.size_bytes if size < 0 else min(self._position + size, self.size_bytes)
        if stop <= self._position:
            return b""
        gap = bisect_right(self._gap_starts, self._position)
        if gap and self._position < self._gap_stops[gap - 1]:
            data = bytes(min(stop, self._gap_stops[gap - 1]) - self._position)
        else:
            if gap < len(self._gap_starts):
                stop = min(stop, self._gap_starts[gap])
            data = self._fetch(stop)
        self._position += len(data)
        return data

    def _fetch(self, stop: int) -> bytes:
        """The bytes from the position to `stop`, and some behind them into the block."""
        start, end = self._position, self._start + len(self._block)
        if not self._start <= start <= stop <= end:
            ahead = FIRST_READ_BYTES
            if self._block and self._start <= start <= end + NEAR_BYTES:
                ahead = min(2 * len(self._block), MAX_READ_BYTES)
            count = min(max(stop - start, ahead), self.size_bytes - start)
            self._start, self._block = start, self._read_at(start, count)
        return self._block[start - self._start : stop - self._start]
