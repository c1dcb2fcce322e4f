"""Memory and speed of planning, by the number of clips in the manifest.

    python -m benchmarks.planning [CLIPS ...]

Each size is planned in a process of its own, from a manifest whose parts are made when they are
asked for, so that what grows is the planner's own. The last line is JSON: peak memory of each size
in MiB, and clips a second.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, replace

import pyarrow as pa

from benchmarks.packing import RECIPE, mixture
from framework.data.manifest.writer import PART_ROWS
from framework.data.plan.planner import make_epoch
from framework.storage import Store


@dataclass(frozen=True)
class MadeParts:
    """A manifest of that many clips, whose parts are never held together."""

    num_clips: int
    sources: tuple[str, ...] = ("web",)
    scores: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Of its size."""
        return f"made-{self.num_clips}"

    @property
    def num_parts(self) -> int:
        """As a manifest of this size has."""
        return -(-self.num_clips // PART_ROWS)

    def part(self, index: int) -> pa.Table:
        """Clips with ids and files of their own."""
        count = min(PART_ROWS, self.num_clips - index * PART_ROWS)
        table = mixture(count, seed=index).table
        at = table.schema.get_field_index("clip_id")
        ids = table["clip_id"].to_numpy() ^ (index << 20)
        return table.set_column(at, "clip_id", pa.array(ids))


def plan(num_clips: int) -> tuple[float, float, int]:
    """Peak memory in MiB, seconds, and steps of a plan of so many clips."""
    recipe = replace(RECIPE, global_batch_packs=512)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        made = make_epoch(
            MadeParts(num_clips), recipe, Store(folder), 0, lambda text: len(text) + 1, "bytes"
        )
        seconds = time.perf_counter() - began
        steps = made.num_steps(0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds, steps


def main(sizes: list[int]) -> None:
    """Print the table, then one JSON line."""
    print(f"{'clips':>14}{'parts':>8}{'steps':>10}{'peak MiB':>11}{'clips/s':>10}")
    found = {}
    for size in sizes:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peak, seconds, steps = pool.apply(plan, (size,))
        parts = MadeParts(size).num_parts
        print(
            f"{size:>14,}{parts:>8}{steps:>10,}{peak:>11,.0f}{size / seconds:>10,.0f}", flush=True
        )
        found[str(size)] = {"peak_mib": round(peak), "clips_per_s": round(size / seconds)}
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(text) for text in sys.argv[1:]] or [100_000, 1_000_000, 4_000_000])
