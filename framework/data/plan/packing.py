"""Pure bin packing: clips in epoch order -> packs, each a list of numbers of clips.

Clips are packed by best fit decreasing (Johnson 1974) among the next few thousand of the epoch, so
that a pack holds clips that are near one another in the epoch. On log-normal durations that fills
as much as packing all clips at once. The emptiest pack is taken apart again and packed with the
clips that follow. It knows nothing of steps and windows, so that nothing is padded at a border.

Invariant: every clip is in exactly one pack, and no pack exceeds a limit.
"""

import bisect
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from framework.seeding import hash64_array

# Packs with room enough that are asked for a clip before a new one is begun. More than one matters
# only where text or the number of clips is what fills packs.
MAX_PROBES = 64


@dataclass(frozen=True)
class PackLimits:
    """What one pack may hold at most."""

    max_tokens: int
    max_text_tokens: int
    max_clips: int


@dataclass(frozen=True)
class _Clip:
    number: int
    tokens: int
    text_tokens: int
    bucket: Hashable


@dataclass(eq=False)
class _Pack:
    """A pack that is being filled, with the room left under each limit."""

    tokens: int
    text_tokens: int
    clips: int
    members: list[_Clip] = field(default_factory=list)

    def add(self, clip: _Clip) -> None:
        self.members.append(clip)
        self.tokens -= clip.tokens
        self.text_tokens -= clip.text_tokens
        self.clips -= 1
        assert min(self.tokens, self.text_tokens, self.clips) >= 0, clip


class Packer:
    """Packs clips as they come, `lookahead` of them at a time.

    Packs are of one bucket: with one bucket for all clips they hold clips of any size, with the
    token grid as bucket the clips of a pack are alike. `key` seeds the order in which packs come,
    which would else be that of their clips' sizes.
    """

    def __init__(self, limits: PackLimits, lookahead: int, key: int) -> None:
        self._limits = limits
        self._lookahead = lookahead
        self._key = key
        self._pool: list[_Clip] = []
        self._new = 0  # clips of the pool that no packs were made of yet

    def add(
        self,
        first: int,
        tokens: Sequence[int],
        text_tokens: Sequence[int],
        buckets: Sequence[Hashable] | None = None,
    ) -> Iterator[list[int]]:
        """Add clips numbered from `first`; yield the packs that this completes."""
        buckets = buckets or [None] * len(tokens)
        for clip in map(_Clip, count(first), tokens, text_tokens, buckets):
            self._pool.append(clip)
            self._new += 1
            if self._new == self._lookahead:
                yield from self._pack(last=False)

    def finish(self) -> Iterator[list[int]]:
        """The last packs, when the clips have ended."""
        yield from self._pack(last=True)

    def waiting(self) -> list[int]:
        """The clips that are in no pack yet."""
        return [clip.number for clip in self._pool]

    def _pack(self, last: bool) -> Iterator[list[int]]:
        by_bucket: defaultdict[Hashable, list[_Clip]] = defaultdict(list)
        for clip in self._pool:
            by_bucket[clip.bucket].append(clip)
        self._pool, self._new = [], 0
        packs: list[list[int]] = []
        for clips in by_bucket.values():
            made = _best_fit_decreasing(clips, self._limits)
            kept = len(made) if last else len(made) - 1
            self._pool += [clip for pack in made[kept:] for clip in pack.members]
            packs += [[clip.number for clip in pack.members] for pack in made[:kept]]
        order = hash64_array(self._key, np.array([pack[0] for pack in packs], np.int64))
        yield from (packs[i] for i in np.argsort(order, kind="stable"))


def _best_fit_decreasing(clips: Sequence[_Clip], limits: PackLimits) -> list[_Pack]:
    """Packs of all clips, those that may take no more first, then by the tokens of room.

    Each clip, largest first, goes where it leaves the fewest tokens of room.
    """
    full: list[_Pack] = []
    rooms: list[tuple[int, int]] = []  # (tokens of room, number in `packs`), ascending
    packs: list[_Pack] = []
    for clip in sorted(clips, key=lambda clip: (-clip.tokens, clip.number)):
        at = _fitting(clip, rooms, packs)
        if at is None:
            number = len(packs)
            packs.append(_Pack(limits.max_tokens, limits.max_text_tokens, limits.max_clips))
        else:
            number = rooms.pop(at)[1]
        pack = packs[number]
        pack.add(clip)
        if pack.tokens and pack.text_tokens and pack.clips:
            bisect.insort(rooms, (pack.tokens, number))
        else:
            full.append(pack)
    return full + [packs[number] for _, number in rooms]


def _fitting(clip: _Clip, rooms: list[tuple[int, int]], packs: list[_Pack]) -> int | None:
    """Where in `rooms` the fullest pack stands that the clip fits into."""
    start = bisect.bisect_left(rooms, (clip.tokens, -1))
    for at in range(start, min(len(rooms), start + MAX_PROBES)):
        if packs[rooms[at][1]].text_tokens >= clip.text_tokens:
            return at
    return None
