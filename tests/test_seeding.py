import math

import numpy as np
import pytest

from framework.seeding import Draws, draws, hash64, hash64_array

# Pinned: a run that resumes under another library or on another machine must draw the same.
NOISE = draws(seed=7, epoch=2, clip_id=123456789, purpose="noise")


def test_hashes_are_pinned() -> None:
    assert hash64() == 0
    assert hash64(0) == 16294208416658607535  # the first output of splitmix64 from state 0
    assert hash64(1, 2, 3) == 7702586659592502839
    assert hash64(1, "crop", -1) == 725415562753570120
    assert hash64("noise") == 10203037326812047036
    assert hash64_array(hash64(7, "order", 0), np.arange(3)).tolist() == [
        5256869019387811049,
        10305281215218470671,
        812459664768112384,
    ]


def test_draws_are_pinned() -> None:
    assert NOISE.key == 3415846505234054807
    uniform = [float.fromhex("0x1.0b5721dbd444cp-3"), float.fromhex("0x1.78abb9528b190p-3")]
    assert NOISE.uniform(2).tolist() == uniform
    assert NOISE.integer(0, 1000) == 228
    normal = [-1.9998323917388916, 0.2699309289455414, -0.7616975903511047, 1.675204873085022]
    # The logarithm and cosine of float32 may differ in the last bit from one CPU to the next.
    assert NOISE.normal(4).tolist() == pytest.approx(normal, rel=1e-6, abs=1e-6)


def test_an_array_hashes_as_its_elements_do() -> None:
    ids = np.array([0, 1, -1, 2**31, 2**63 - 1, -(2**63)], dtype=np.int64)
    hashes = hash64_array(hash64(3, "a"), ids)
    assert hashes.dtype == np.uint64
    assert hashes.tolist() == [hash64(3, "a", int(i)) for i in ids]
    assert hash64_array(hash64(3, "a"), ids.astype(np.uint64)).tolist() == hashes.tolist()


def test_every_part_and_its_place_counts() -> None:
    keys = {
        draws(seed, epoch, clip_id, purpose).key
        for seed in range(4)
        for epoch in range(4)
        for clip_id in range(64)
        for purpose in ("noise", "timestep", "crop")
    }
    assert len(keys) == 4 * 4 * 64 * 3
    assert hash64(1, 2) != hash64(2, 1)
    assert hash64(1) != hash64("1")


def test_calls_commute_and_prefixes_agree() -> None:
    one, two = Draws(5), Draws(5)
    first = one.uniform(8).tolist()
    two.normal(3)
    two.integer(0, 10)
    assert two.uniform(8).tolist() == first == one.uniform(8).tolist()
    assert one.normal(5).tolist() == one.normal(6)[:5].tolist()
    assert one.normal(0).shape == one.uniform(0).shape == (0,)


def test_uniform_and_normal_have_their_moments() -> None:
    n = 200_000
    uniform = draws(0, 0, 1, "uniform").uniform(n)
    assert uniform.min() >= 0.0
    assert uniform.max() < 1.0
    # Five standard errors each; the draws are fixed, so the test cannot flicker.
    assert uniform.mean() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / n))
    counts, _ = np.histogram(uniform, bins=20, range=(0, 1))
    assert np.abs(counts - n / 20).max() < 5 * math.sqrt(n / 20)

    normal = draws(0, 0, 1, "normal").normal(n)
    assert normal.dtype == np.float32
    assert np.isfinite(normal).all()
    x = normal.astype(np.float64)
    assert x.mean() == pytest.approx(0.0, abs=5 / math.sqrt(n))
    assert (x**2).mean() == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))
    assert (x**3).mean() == pytest.approx(0.0, abs=5 * math.sqrt(15 / n))
    assert (x**4).mean() == pytest.approx(3.0, abs=5 * math.sqrt(96 / n))
    # The two of one word, neighbours, and clips that follow each other are independent.
    other = draws(0, 0, 2, "normal").normal(n)
    for a, b in ((x[::2], x[1::2]), (x[1:-1:2], x[2::2]), (x, other)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))


def test_integers_lie_in_their_range() -> None:
    values = {draws(0, 0, clip_id, "crop").integer(-2, 3) for clip_id in range(200)}
    assert values == {-2, -1, 0, 1, 2}
    with pytest.raises(ValueError, match="low=3"):
        Draws(0).integer(3, 3)


def test_the_sort_key_shuffles() -> None:
    ids = np.arange(1000)
    orders = [np.argsort(hash64_array(hash64(0, "order", epoch), ids)) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == ids.tolist()
        assert abs(np.corrcoef(order, ids)[0, 1]) < 5 / math.sqrt(len(ids))
    assert (orders[0] != orders[1]).mean() > 0.9
