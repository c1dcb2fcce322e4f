"""Memory as the kernel counts it."""

import torch

from framework.train.observers.meters.memory import GIB, memory_limit_gib, memory_stats

CPU = torch.device("cpu")


def test_what_is_held_is_seen_and_the_peak_remembers_it() -> None:
    before = memory_stats(CPU)
    held = torch.ones(int(GIB) // 16)  # a quarter of a GiB, written to
    during = memory_stats(CPU)
    # Some of it may have been in the allocator's reserve.
    assert during["memory/used_gib"] > before["memory/used_gib"] + 0.2
    del held
    after = memory_stats(CPU)
    assert after["memory/used_gib"] < during["memory/used_gib"]
    assert after["memory/peak_gib"] >= during["memory/used_gib"] - 0.01  # counted in batches
    assert memory_limit_gib(CPU) > after["memory/peak_gib"]
