"""Pure bin packing: clips in epoch order -> packs, each a list of positions in that order.

Packing is online with a bounded number of open bins, so that a pack holds clips that are near one
another in the epoch; it knows nothing of steps and windows, so that nothing is padded at a border.

Invariant: every clip is in exactly one pack, and no pack exceeds a limit.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PackLimits:
    """What one pack may hold at most."""

    max_tokens: int
    max_text_tokens: int
    max_clips: int


@dataclass(eq=False)
class _Bin:
    """A pack that is being filled, with the room left under each limit."""

    tokens: int
    text_tokens: int
    clips: int
    members: list[int] = field(default_factory=list)

    def fits(self, tokens: int, text_tokens: int) -> bool:
        return tokens <= self.tokens and text_tokens <= self.text_tokens and self.clips > 0


class _OpenBins:
    """At most `max_bins` bins; `smallest` is the least (tokens, text tokens) of clips to come."""

    def __init__(self, limits: PackLimits, max_bins: int, smallest: tuple[int, int]) -> None:
        self.limits = limits
        self.max_bins = max_bins
        self.smallest = smallest
        self.bins: list[_Bin] = []  # oldest first

    def add(self, clip: int, tokens: int, text_tokens: int) -> Iterator[list[int]]:
        """Put a clip where it leaves the fewest tokens of room; yield what packs this closes."""
        fitting = [b for b in self.bins if b.fits(tokens, text_tokens)]
        if fitting:
            target = min(fitting, key=lambda b: b.tokens)
        else:
            if len(self.bins) == self.max_bins:
                fullest = min(self.bins, key=self._room)
                self.bins.remove(fullest)
                yield fullest.members
            limits = self.limits
            target = _Bin(limits.max_tokens, limits.max_text_tokens, limits.max_clips)
            assert target.fits(tokens, text_tokens), (clip, tokens, text_tokens, limits)
            self.bins.append(target)
        target.tokens -= tokens
        target.text_tokens -= text_tokens
        target.clips -= 1
        target.members.append(clip)
        if not target.fits(*self.smallest):
            self.bins.remove(target)
            yield target.members

    def _room(self, b: _Bin) -> int:
        """Room under the scarcest limit, as a share of it, brought to whole numbers."""
        tokens, text_tokens = self.limits.max_tokens, self.limits.max_text_tokens
        clips = self.limits.max_clips
        return min(
            b.tokens * text_tokens * clips,
            b.text_tokens * tokens * clips,
            b.clips * tokens * text_tokens,
        )


def pack_mixed(
    tokens: Sequence[int], text_tokens: Sequence[int], limits: PackLimits, open_bins: int
) -> Iterator[list[int]]:
    """Packs of clips of any size, by best fit among `open_bins` bins.

    Where a clip fits nowhere a bin is opened; with all open already, the fullest one is closed
    first. A bin that could not take even the smallest clip is closed at once. Ties go to the older
    bin. When the clips end, those in open bins are packed anew, largest first: an epoch then ends
    in about one part-filled pack, not in `open_bins`.
    """
    if not tokens:
        return
    smallest = (min(tokens), min(text_tokens))
    online = _OpenBins(limits, open_bins, smallest)
    for i, (n, k) in enumerate(zip(tokens, text_tokens, strict=True)):
        yield from online.add(i, n, k)
    rest = sorted((i for b in online.bins for i in b.members), key=lambda i: (-tokens[i], i))
    final = _OpenBins(limits, len(rest), smallest)
    for i in rest:
        yield from final.add(i, tokens[i], text_tokens[i])
    yield from (b.members for b in final.bins)


def pack_bucketed(
    tokens: Sequence[int],
    text_tokens: Sequence[int],
    buckets: Sequence[Hashable],
    limits: PackLimits,
) -> Iterator[list[int]]:
    """Packs of clips of one bucket each, with one open bin a bucket.

    All clips of a bucket have the same number of tokens. Part-filled packs come at the end, one a
    bucket, in the order in which the buckets first appeared.
    """
    shortest_text = min(text_tokens, default=0)
    open_bins: dict[Hashable, _OpenBins] = {}
    for i, (n, k, bucket) in enumerate(zip(tokens, text_tokens, buckets, strict=True)):
        if bucket not in open_bins:
            open_bins[bucket] = _OpenBins(limits, 1, (n, shortest_text))
        yield from open_bins[bucket].add(i, n, k)
    for last in open_bins.values():
        yield from (b.members for b in last.bins)
