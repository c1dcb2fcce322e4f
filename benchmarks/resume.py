"""How long the first batch takes: deep in the fourth epoch, against step 0.

    python -m benchmarks.resume

Opens the stream of a small line in turns at both places, so that the load of the machine meets
both; the median of five each. The last line is JSON.
"""

import json
import statistics
import tempfile
import time

from framework.assembly import Assembly
from framework.cluster import ClusterConfig, connect
from framework.config import compose
from framework.data.config import IndexConfig, SyntheticConfig
from framework.data.index.job import write_index
from framework.data.index.shard import index_shard
from framework.data.plan.store import Plan
from framework.data.stream.stream import open_stream
from framework.demo.clips.moving_shapes import write_dataset
from framework.storage import Store

TURNS = 5


def line(folder: str) -> tuple[Assembly, str]:
    """1,200 clips of the demo, indexed."""
    write_dataset(SyntheticConfig(num_clips=1200), f"{folder}/clips", processes=2)
    store = Store(f"{folder}/clips")
    shards = [name for name in store.list() if name.endswith(".tar")]
    found = {name: index_shard(store.url, name, IndexConfig()) for name in shards}
    write_index(store.url, f"{folder}/manifest", found, IndexConfig())
    data = [f"data.shards={folder}/clips", f"data.manifest={folder}/manifest"]
    return Assembly.of(compose(["experiment=demo", *data])), store.url


def seconds_to_first_batch(plan: Plan, assembly: Assembly, shards: str, step: int) -> float:
    """From opening to the first batch."""
    began = time.perf_counter()
    reader, config = assembly.reader(shards), assembly.data.stream
    with open_stream(plan, reader, config, step, step + 8, 0, 1) as steps:
        next(steps)
        return time.perf_counter() - began


def main() -> None:
    """Print both medians, then one JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        assembly, shards = line(folder)
        run = Store(folder).child("run")
        per_epoch = assembly.planner().make(run, 1, print).num_steps(0)
        deep = 3 * per_epoch + per_epoch // 2
        plan = assembly.planner().make(run, deep + 9, lambda text: None)
        connect(ClusterConfig(num_cpus=3))
        seconds_to_first_batch(plan, assembly, shards, 0)  # starts the workers
        found: dict[int, list[float]] = {0: [], deep: []}
        for _ in range(TURNS):
            for step, times in found.items():
                times.append(seconds_to_first_batch(plan, assembly, shards, step))
        for step, times in found.items():
            print(f"step {step:>6}: {statistics.median(times):.2f} s, of {sorted(times)}")
        ratio = statistics.median(found[deep]) / statistics.median(found[0])
        print(json.dumps({"deep_over_zero": round(ratio, 3)}))


if __name__ == "__main__":
    main()
