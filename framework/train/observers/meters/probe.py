"""How fast a rank is by itself: the same few matrix products on each, timed alone.

In training all ranks take equally long, since each collective waits for the slowest. The probe has
no collective in it, so a slow rank stands out: a GPU that is hot, throttled or shared, a CPU with
a neighbour. It does not see what a matrix product does not need: storage, decoding, the network, a
slow link between GPUs; nor a rank that was slow between two probes and is not now.
"""

import platform
import statistics
import time
from collections.abc import Sequence

import torch

from framework.terminal import Show
from framework.train.observers.meters.meter import Meter

SLOW_WINDOWS = 5  # after so many in a row a rank is named; chosen by hand

# Width of the matrices, products in a round, their dtype; chosen by hand. A round takes 13 ms on
# a CPU core of 90 GFLOP/s, longer than the kernel lets one process run where several share a core,
# and, by arithmetic, 0.7 ms on a GPU of 500 TFLOP/s.
_CPU = (512, 4, torch.float32)
_GPU = (2048, 20, torch.bfloat16)
_ROUNDS = 3


class SlowRanks(Meter[tuple[float, str]]):
    """Probes every rank at each window's end, and names one that is slow again and again."""

    def __init__(self, device: torch.device, show: Show) -> None:
        self._device, self._show = device, show
        self._slow_for: dict[int, int] = {}  # windows in a row, by rank

    def measure(self) -> tuple[float, str]:
        """Seconds of this rank's probe, and its host."""
        return probe(self._device), platform.node()

    def figures(self, by_rank: Sequence[tuple[float, str]]) -> dict[str, float]:
        """The slowest rank's seconds over the median."""
        seconds = [of_rank for of_rank, _ in by_rank]
        median = max(statistics.median_low(seconds), 1e-9)
        slow = slow_ranks(seconds)
        # A neighbour may pass: once, when it has been slow for some windows in a row.
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in slow}
        for rank in (r for r, windows in self._slow_for.items() if windows == SLOW_WINDOWS):
            self._show(
                {
                    "text": f"rank {rank} on {by_rank[rank][1]} is slow: the same matrix products "
                    f"take it {seconds[rank] / median:.1f} times as long as the median rank"
                }
            )
        return {"speed/slowest_rank": max(seconds) / median}


def probe(device: torch.device) -> float:
    """Seconds of a round of products, the least of three: a passing disturbance does not count.

    It first waits for what the device still has to do. It draws no random number.
    """
    width, num_products, dtype = _GPU if device.type == "cuda" else _CPU
    with torch.autocast(device.type, enabled=False):
        # Values of all kinds: a GPU takes less power for zeros, and is not throttled then.
        numbers = torch.arange(width, dtype=torch.float32, device=device)
        matrix = torch.outer(numbers, numbers).cos().to(dtype)
        product = matrix @ matrix  # loads the kernel
        seconds = []
        for _ in range(_ROUNDS):
            _wait_for(device)
            began = time.perf_counter()
            for _ in range(num_products):
                torch.mm(matrix, matrix, out=product)
            _wait_for(device)
            seconds.append(time.perf_counter() - began)
    return min(seconds)


def slow_ranks(seconds_by_rank: Sequence[float], factor: float = 1.5) -> list[int]:
    """Ranks whose `probe` took more than `factor` times the median, of an even number the lower.

    Where more than half of the ranks are slow, the median is, and none is named.
    """
    if factor <= 1:
        raise ValueError(f"factor={factor} must be above 1; try 1.5")
    if not seconds_by_rank:
        return []
    limit = factor * statistics.median_low(seconds_by_rank)
    return [rank for rank, seconds in enumerate(seconds_by_rank) if seconds > limit]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
