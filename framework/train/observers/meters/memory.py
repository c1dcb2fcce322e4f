"""How much memory a rank takes, and how much there is; the most of any rank is logged.

On a GPU: what torch has allocated there. On a CPU: the process's resident set, so what the stream
and Ray keep in this process counts too.
"""

import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from framework.train.observers.meters.meter import Meter

GIB = float(1 << 30)


class Memory(Meter[dict[str, float]]):
    """`memory_stats` of the rank that has most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def measure(self) -> dict[str, float]:
        """Of this rank."""
        return memory_stats(self._device)

    def figures(self, by_rank: Sequence[dict[str, float]]) -> dict[str, float]:
        """The most of any rank."""
        return {name: max(of_rank[name] for of_rank in by_rank) for name in by_rank[0]}


def memory_stats(device: torch.device) -> dict[str, float]:
    """Figures in GiB, named as metrics; call it once a window.

    memory/used_gib is of now. memory/peak_gib is, on a GPU, the most since the last call; on a CPU
    the most since the process began, which the kernel does not let one reset. GPUs have
    memory/reserved_gib as well: with what torch's allocator keeps for later.
    """
    if device.type == "cuda":
        figures = {
            "memory/used_gib": torch.cuda.memory_allocated(device) / GIB,
            "memory/peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "memory/reserved_gib": torch.cuda.memory_reserved(device) / GIB,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return figures
    used, peak = _resident_bytes(), _peak_resident_bytes()
    # Two counters of the kernel, one of them updated in batches: the peak may lag behind.
    return {"memory/used_gib": used / GIB, "memory/peak_gib": max(used, peak) / GIB}


def memory_limit_gib(device: torch.device) -> float:
    """GiB of the GPU, or of the machine; a container's own limit may be lower."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB


def _peak_resident_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB, but bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")  # proc(5): the second field is the resident set, in pages
    if not statm.exists():
        return _peak_resident_bytes()
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
