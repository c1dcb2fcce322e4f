"""Which ranks are slow follows from the figures; what the probe measures is left to the clock."""

import pytest
import torch

from framework.train.observers.meters.probe import probe, slow_ranks


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([], []),
        ([2.0], []),
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 1.6, 1.0, 0.9], [1]),
        ([1.0, 1.5, 1.0], []),  # not more than the factor
        ([1.0, 2.0], [1]),  # of two, the faster is the measure
        ([3.0, 1.0, 1.0, 3.0, 1.1], [0, 3]),
        ([1.0, 3.0, 3.0], []),  # most are slow: none stands out
    ],
)
def test_ranks_far_from_the_median_are_named(seconds: list[float], slow: list[int]) -> None:
    assert slow_ranks(seconds) == slow


def test_neither_the_unit_nor_the_order_of_ranks_matters() -> None:
    seconds = [0.010, 0.011, 0.030, 0.009, 0.016]
    slow = slow_ranks(seconds)
    assert slow_ranks([1000 * s for s in seconds]) == slow
    assert slow_ranks(seconds[::-1]) == sorted(4 - rank for rank in slow)


def test_a_larger_factor_names_fewer() -> None:
    seconds = [1.0, 1.0, 1.3, 1.7, 1.0]
    found = [set(slow_ranks(seconds, factor)) for factor in (1.2, 1.5, 2.0)]
    assert found == [{2, 3}, {3}, set()]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_factor_that_would_name_the_median_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match=r"factor=.*above 1"):
        slow_ranks([1.0], factor)


def test_the_probe_leaves_the_random_state_and_the_dtype_alone() -> None:
    before = torch.random.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert probe(torch.device("cpu")) > 0
    assert torch.equal(torch.random.get_rng_state(), before)
