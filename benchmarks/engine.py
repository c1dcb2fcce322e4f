"""What the engine's parts cost: the real line, ZeRO-3, saves, restarts, loads on other ranks.

    python -m benchmarks.engine [--quick] [--only steps saves kills]

dit_s on the synthetic clips, float32; two ranks of one thread everywhere, unless it says otherwise.

step_overhead: a step of the real line (`framework.train`: Ray Train, stream, ZeRO-3, MLflow on
SQLite) over the plain engine on two gloo ranks with the very same packs in memory, both by
`framework.train.loop`. zero_share: ZeRO-3 on those packs over plain. All three take turns, each in
processes of its own. A window is `train.log_every` steps, the first is warm-up; the ratio is of
medians over windows, and beside it of sums, since decoding ahead comes in bursts.

async_stall: seconds for which training stands still to save beside the next steps, over those of a
save in the foreground, of the same state to an S3 server (moto) in a process of its own.

kill_to_step_s: from kill -9 of one of the two ranks of a real run to the first step that is trained
again (and, in the table, to the first that was not done before). It is set against a cold start:
from the command to its first step, where the plan is made and there is a checkpoint to go on from.

reshard_over_same: seconds of `engine.load`, by the slowest rank, of a checkpoint of two ranks on
three over on two: from local disk, where no store hides the work. Three ranks on two cores have
less CPU each; the table has one rank as well, which reads twice as much, and how many ranges a rank
reads, each a request where the store is S3. (moto reads a whole object for each range of it.)

The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.engine_ranks import Work, run_ranks
from benchmarks.real_run import RealRun, make_data
from framework.demo.local_s3 import s3_server

Figures = dict[str, float]
BASE = ["experiment=demo", "model=dit_s", "~evaluate.gates"]
QUICK = [*BASE, "model.hidden_size=64", "model.ffn=128", "model.num_heads=2", "model.depth=2"]
SEED = 0  # of which rank is killed


class Bench:
    """One benchmark, below a folder."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.base = QUICK if quick else BASE
        self.data = make_data(f"{folder}/data", 96 if quick else 600)
        self.plans = f"{folder}/plans"

    def line(self, max_tokens: int, steps: int, *more: str) -> list[str]:
        """Overrides of a run."""
        return [
            *self.base,
            *self.data,
            f"data.max_tokens={max_tokens}",
            f"train.steps={steps}",
            *more,
        ]

    def ranks_line(self, max_tokens: int, steps: int) -> list[str]:
        """The same without Ray."""
        return [*self.line(max_tokens, steps), f"run.root={self.folder}", "run.name=ranks"]

    def steps(self) -> Figures:
        """step_overhead and zero_share."""
        turns, steps, window = (1, 12, 2) if self.quick else (3, 30, 5)
        max_tokens = 192 if self.quick else 512
        seconds: dict[str, list[float]] = {"plain": [], "zero": [], "real": []}
        for turn in range(turns):
            line = self.line(
                max_tokens, steps, f"train.log_every={window}", f"train.checkpoint_every={steps}"
            )
            with RealRun(self.folder / f"steps-{turn}", line) as run:
                run.start()
                run.finish()
                ends = [s for s in run.steps if "speed/step_s" in s.figures]
            assert [s.number + 1 for s in ends] == list(range(window, steps + 1, window)), ends
            work = Work(self.ranks_line(max_tokens, steps), self.plans, steps)
            seconds["real"] += [s.figures["speed/step_s"] for s in ends[1:]]
            for name in ("plain", "zero"):
                bare = run_ranks(name, 2, work, self.folder / "ranks")
                for i in range(window, steps, window):
                    seconds[name].append(statistics.fmean(bare[i : i + window]))
        print(f"\nseconds of a step, in {len(seconds['real'])} windows of {window} steps")
        print(f"{'':22}{'median':>9}{'least':>9}{'most':>9}{'mean':>9}")
        for name, title in (
            ("plain", "plain, in memory"),
            ("zero", "ZeRO-3, in memory"),
            ("real", "the real line"),
        ):
            t = seconds[name]
            row = (statistics.median(t), min(t), max(t), statistics.fmean(t))
            print(f"{title:22}" + "".join(f"{x:>9.3f}" for x in row))
        return {
            "step_overhead": _ratio(seconds["real"], seconds["plain"]),
            "step_overhead_of_sums": round(sum(seconds["real"]) / sum(seconds["plain"]), 3),
            "zero_share": _ratio(seconds["zero"], seconds["plain"]),
        }

    def saves_and_loads(self) -> Figures:
        """async_stall and reshard_over_same."""
        stores = {"local": f"{self.folder}/checkpoint", "s3": "s3://bench/checkpoint"}
        steps, saves = (2, 2) if self.quick else (4, 5)
        line = self.ranks_line(192, steps)
        work = Work(line, self.plans, steps, saves, stores)
        with s3_server("bench", self.folder / "s3.log") as environment:
            saved = run_ranks("saves", 2, work, self.folder / "ranks", environment)
        loads = {w: run_ranks("loads", w, work, self.folder / "ranks") for w in (2, 3, 1)}
        size = sum(p.stat().st_size for p in (self.folder / "checkpoint").rglob("*.*")) / 1e6
        print(f"\na checkpoint of {size:,.0f} MB, saved by two ranks to S3, seconds")
        for name, title in (
            ("stall", "training stands still"),
            ("write", "then it is written"),
            ("foreground", "in the foreground"),
            ("beside", "a step beside a save"),
            ("alone", "a step alone"),
        ):
            print(f"{title:24}{_spread(saved[name])}")
        print("\nloaded from local disk, seconds")
        for world, load in sorted(loads.items()):
            title = f"{world} rank{'s' * (world > 1)}"
            print(f"{title:24}{_spread(load['seconds'])}, {load['reads']} reads a rank")
        figures = {
            "async_stall": _ratio(saved["stall"], saved["foreground"], 4),
            "step_beside_save": _ratio(saved["beside"], saved["alone"]),
            "reshard_over_same": _ratio(loads[3]["seconds"], loads[2]["seconds"]),
            "reshard_1_over_2": _ratio(loads[1]["seconds"], loads[2]["seconds"]),
            "reshard_reads_over_same": round(loads[3]["reads"] / loads[2]["reads"], 1),
        }
        return figures

    def kills(self) -> Figures:
        """kill_to_step_s, and over a cold start."""
        repeats = 1 if self.quick else 5
        line = self.line(192, 300, "train.log_every=1", "train.checkpoint_every=5")
        cold: list[float] = []
        again: list[float] = []
        new: list[float] = []
        chosen = random.Random(SEED)
        with RealRun(self.folder / "kills", line) as run:
            for turn in range(repeats + 1):
                begun = run.start_and_train()
                if turn == 0:  # it makes the plan
                    run.wait_for(lambda: run.committed() > 0)
                else:
                    cold.append(begun)
                    self._kill_one(run, chosen, again, new)
                run.kill()
        print("\nseconds")
        print(f"{'command to first step':24}{_spread(cold)}")
        print(f"{'kill to first step':24}{_spread(again)}")
        print(f"{'kill to first new step':24}{_spread(new)}")
        return {
            "cold_start_s": round(statistics.median(cold), 2),
            "kill_to_step_s": round(statistics.median(again), 2),
            "kill_to_new_step_s": round(statistics.median(new), 2),
            "kill_to_step_over_cold_start": _ratio(again, cold),
        }

    def _kill_one(
        self, run: RealRun, chosen: random.Random, again: list[float], new: list[float]
    ) -> None:
        """After the next commit; adds the seconds to the first step and the first new one."""
        committed = run.committed()
        run.wait_for(lambda: run.committed() > committed)
        last, killed_at = run.steps[-1], time.time()
        chosen.choice(run.workers()).kill()
        again.append(run.wait_for_step(lambda s: s.attempt > last.attempt).at - killed_at)
        done = max(s.number for s in run.steps if s.attempt == last.attempt)
        first_new = run.wait_for_step(lambda s: s.attempt > last.attempt and s.number > done)
        new.append(first_new.at - killed_at)


def _ratio(ours: list[float], theirs: list[float], digits: int = 3) -> float:
    return round(statistics.median(ours) / statistics.median(theirs), digits)


def _spread(seconds: list[float]) -> str:
    return (
        f"{statistics.median(seconds):>9.3f} (of {len(seconds)}, "
        f"{min(seconds):.3f} to {max(seconds):.3f})"
    )


def main() -> None:
    """Print the tables, then one JSON line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a tiny model, few repeats")
    parser.add_argument("--only", nargs="*", choices=("steps", "saves", "kills"))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    os.environ["OMP_NUM_THREADS"] = "1"  # as Ray sets it for its workers
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.quick)
        parts = {"steps": bench.steps, "saves": bench.saves_and_loads, "kills": bench.kills}
        for name, part in parts.items():
            if not options.only or name in options.only:
                figures |= part()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
