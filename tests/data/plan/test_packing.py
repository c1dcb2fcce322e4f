"""Bin packing: cases with capacities and packs by hand, then the laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.plan.packing import Packer, PackLimits

WIDE = PackLimits(max_tokens=10, max_text_tokens=1000, max_clips=100)


def packed(tokens, limits=WIDE, lookahead=1000, text=None, buckets=None, cut=None):
    """Packs of all clips, given at once or in two pieces."""
    packer = Packer(limits, lookahead, key=0)
    text = text or [1] * len(tokens)
    buckets = buckets or [None] * len(tokens)
    packs = list(packer.add(0, tokens[:cut], text[:cut], buckets[:cut]))
    if cut is not None:
        packs += packer.add(cut, tokens[cut:], text[cut:], buckets[cut:])
    seen = [*packer.waiting(), *(i for pack in packs for i in pack)]
    assert sorted(seen) == list(range(len(tokens)))
    return [*packs, *packer.finish()]


def as_sets(packs):
    return sorted(sorted(pack) for pack in packs)


@pytest.mark.parametrize(
    ("tokens", "packs"),
    [
        ([], []),
        ([10], [[0]]),
        # 6 and 5 open packs of room 4 and 5; 4 goes where less room is left, then 5 beside 5.
        ([6, 5, 4, 5], [[0, 2], [1, 3]]),
        # Equal room: the older pack.
        ([6, 6, 4], [[0, 2], [1]]),
        # Largest first: 8 with 2, 5 with 5.
        ([2, 5, 8, 5], [[0, 2], [1, 3]]),
        ([3, 3, 3, 3, 7, 7], [[0, 4], [1, 5], [2, 3]]),
    ],
)
def test_best_fit_decreasing_by_hand(tokens, packs):
    assert as_sets(packed(tokens)) == packs


def test_text_and_the_number_of_clips_are_limits_like_tokens():
    limits = PackLimits(max_tokens=100, max_text_tokens=10, max_clips=10)
    assert as_sets(packed([3, 2, 1], limits, text=[6, 6, 4])) == [[0, 2], [1]]
    limits = PackLimits(max_tokens=100, max_text_tokens=100, max_clips=2)
    assert as_sets(packed([1] * 5, limits)) == [[0, 1], [2, 3], [4]]


def test_the_emptiest_pack_waits_for_what_follows():
    # Of the first four, 5 has most room: it is taken apart, and meets the 5 that follows.
    assert as_sets(packed([7, 6, 6, 5, 5, 4, 3, 1], lookahead=4)) == [
        [0], [1], [2], [3, 4], [5, 6, 7],
    ]  # fmt: skip
    assert as_sets(packed([7, 6, 6, 5, 5, 4, 3, 1])) == [[0, 6], [1, 5], [2, 7], [3, 4]]


def test_packs_of_a_bucket_are_of_that_bucket():
    tokens, buckets = [4, 5, 4, 4, 5, 5], ["a", "b", "a", "a", "b", "b"]
    for lookahead in (2, 3, 1000):
        packs = as_sets(packed(tokens, lookahead=lookahead, buckets=buckets))
        assert packs == [[0, 2], [1, 4], [3], [5]]


def test_the_order_of_packs_does_not_follow_their_clips_sizes():
    tokens = np.random.default_rng(0).integers(1, 10, 2000).tolist()
    largest = [max(tokens[i] for i in pack) for pack in packed(tokens, lookahead=500)]
    place = np.arange(len(largest))
    assert abs(np.corrcoef(place, largest)[0, 1]) < 0.15


LIMITS = st.builds(
    PackLimits,
    max_tokens=st.integers(20, 60),
    max_text_tokens=st.integers(8, 30),
    max_clips=st.integers(1, 6),
)
CLIPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(CLIPS, LIMITS, st.integers(1, 70), st.booleans())
def test_every_clip_once_and_no_pack_over_a_limit(clips, limits, lookahead, bucketed):
    tokens, text = [c[0] for c in clips], [c[1] for c in clips]
    buckets = tokens if bucketed else None
    packs = packed(tokens, limits, lookahead, text, buckets)
    assert packed(tokens, limits, lookahead, text, buckets, cut=len(clips) // 2) == packs
    assert sorted(i for pack in packs for i in pack) == list(range(len(clips)))
    for pack in packs:
        assert 0 < len(pack) <= limits.max_clips
        assert sum(tokens[i] for i in pack) <= limits.max_tokens
        assert sum(text[i] for i in pack) <= limits.max_text_tokens
        assert not bucketed or len({tokens[i] for i in pack}) == 1
