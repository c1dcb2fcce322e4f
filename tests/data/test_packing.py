"""Bin packing: cases with capacities and bins by hand, then the laws."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.data.packing import PackLimits, pack_bucketed, pack_mixed

WIDE = PackLimits(max_tokens=10, max_text_tokens=1000, max_clips=100)


def mixed(tokens, limits=WIDE, open_bins=2, text=None):
    return list(pack_mixed(tokens, text or [1] * len(tokens), limits, open_bins))


@pytest.mark.parametrize(
    ("tokens", "open_bins", "packs"),
    [
        ([], 2, []),
        ([10], 2, [[0]]),
        # 4 fits beside 6 (room 4) and beside 5 (room 5): the tighter one is taken, and closed.
        ([6, 5, 4, 5], 2, [[0, 2], [1, 3]]),
        # Equal room: the older bin.
        ([6, 6, 4], 2, [[0, 2], [1]]),
        # 5 fits nowhere and both bins are taken: the fullest (7) is closed first.
        ([7, 6, 5, 4], 2, [[0], [1, 3], [2]]),
        # One bin is next fit.
        ([7, 6, 5, 4], 1, [[0], [1], [2, 3]]),
        # Three bins are open at the end ([2, 5], [8], [5]); packed anew they make two.
        ([2, 5, 8, 5], 3, [[1, 3], [2, 0]]),
    ],
)
def test_best_fit_by_hand(tokens, open_bins, packs):
    assert mixed(tokens, open_bins=open_bins) == packs


def test_a_bin_without_room_for_another_clip_is_closed_at_once():
    limits = PackLimits(max_tokens=10, max_text_tokens=100, max_clips=2)
    assert mixed([1, 1, 1, 1, 1], limits) == [[0, 1], [2, 3], [4]]
    # 2 tokens of room, and the smallest clip has 3.
    assert next(pack_mixed([8, 3, 3], [1, 1, 1], WIDE, 2)) == [0]


def test_the_scarcest_limit_says_which_bin_is_fullest():
    limits = PackLimits(max_tokens=100, max_text_tokens=10, max_clips=10)
    # The first bin holds fewer tokens but nearly all its text; the third clip fits in neither.
    assert next(pack_mixed([5, 60, 50, 1], [9, 2, 9, 1], limits, 2)) == [0]


def test_text_is_a_limit_like_tokens():
    limits = PackLimits(max_tokens=100, max_text_tokens=10, max_clips=10)
    assert mixed([1, 1, 1], limits, text=[6, 6, 4]) == [[0, 2], [1]]


def test_bucketed_by_hand():
    limits = PackLimits(max_tokens=10, max_text_tokens=1000, max_clips=100)
    tokens, buckets = [4, 5, 4, 4, 5, 5], ["a", "b", "a", "a", "b", "b"]
    packs = list(pack_bucketed(tokens, [1] * 6, buckets, limits))
    # "a" closes at 8 of 10, since its third clip would not fit; the rest come bucket by bucket.
    assert packs == [[0, 2], [1, 4], [3], [5]]


LIMITS = st.builds(
    PackLimits,
    max_tokens=st.integers(20, 60),
    max_text_tokens=st.integers(8, 30),
    max_clips=st.integers(1, 6),
)
CLIPS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), max_size=60)


def check_laws(packs, clips, limits):
    assert sorted(i for pack in packs for i in pack) == list(range(len(clips)))
    for pack in packs:
        assert 0 < len(pack) <= limits.max_clips
        assert sum(clips[i][0] for i in pack) <= limits.max_tokens
        assert sum(clips[i][1] for i in pack) <= limits.max_text_tokens


@settings(max_examples=60, deadline=None)
@given(CLIPS, LIMITS, st.integers(1, 5))
def test_every_clip_once_and_no_pack_over_a_limit(clips, limits, open_bins):
    tokens, text = [c[0] for c in clips], [c[1] for c in clips]
    packs = list(pack_mixed(tokens, text, limits, open_bins))
    check_laws(packs, clips, limits)
    buckets = [n % 3 for n in tokens]
    packs = list(pack_bucketed(tokens, text, buckets, limits))
    check_laws(packs, clips, limits)
    assert all(len({buckets[i] for i in pack}) == 1 for pack in packs)
