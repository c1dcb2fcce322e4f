"""What 8 to 4,096 ranks ask of a cluster, and what breaks first: a model fed with measured rates.

    python -m benchmarks.scale [--step-time 5] [--streams 1 8 32] [--window 15]

Measured here: the CPU time of decoding a pixel; and, with streams whose packs cost nothing to make,
the CPU time that a stream's executor, the processes of Ray's head and the node's own spend on a
second of a running executor, on a segment and on a task: least squares over numbers of streams and
three settings (segments of one step, of four, slow tasks). A stream is an actor with an
`open_stream` of its own, as a train worker is. Ray Data's coordinator of resources works on all
executors and nodes whenever a segment begins or ends, so its method is timed by itself, at each
size. The model has a line for each quantity; its assumptions are constants. The last line is JSON.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped]

from benchmarks.ingest import FPS, HEIGHT, NUM_FRAMES, WIDTH, render
from benchmarks.packing import RECIPE, mixture
from framework.batch import ReadStats
from framework.cluster import ClusterConfig, connect
from framework.data.config import StreamConfig
from framework.data.plan.cost import CostModel
from framework.data.plan.planner import make_epoch
from framework.data.plan.rows import ClipPlan
from framework.data.plan.store import Plan
from framework.data.plan.views import Geometry, ViewConfig, choose_views
from framework.data.stream.collate import ClipRead, ClipReader, VideoReader
from framework.data.stream.stream import open_stream, segment_steps
from framework.encoders import CaptionEncoder, Encoders
from framework.storage import Store
from framework.video import decode, encode
from model_zoo.codecs.identity import IdentityConfig
from model_zoo.text.byte import ByteTextConfig

RANKS = (8, 64, 512, 4096)
TEXT = ByteTextConfig()

# Assumptions: not measured here.
VALUES_PER_TOKEN = 64  # 16 channels of stride 4 x 8 x 8, patch 1 x 2 x 2; its codec is not counted
FILL = 0.99  # benchmarks/packing.py
BYTES_PER_PIXEL = 0.5e6 / (NUM_FRAMES * WIDTH * HEIGHT)  # as the clips of benchmarks/ingest.py
REQUESTS_PER_CLIP = 2  # GET, and HEAD to open a shard: of many shards, nearly each clip is in a new
PREFIX_REQUESTS_PER_S = 5500  # Amazon's figure for one prefix of S3
RUNNING_TASKS = 10_000  # at once, Ray's own envelope of tests
RANKS_PER_NODE = 8
CPUS_PER_NODE = 128

# Processes by the beginning of their titles. One each in a cluster but for the last two.
GROUPS = {
    "gcs": "gcs_server",
    "stats actor": "ray::_StatsActor",
    "coordinator": "ray::_AutoscalingCoordinator",
    "raylet": "raylet",
    "executor": "ray::Stream",
}
WAIT_S = 40.0  # for streams to begin, or to end
UNIT_NAMES = ("executor s", "segment", "task")


# Measuring


@dataclass(frozen=True)
class IdleReader(VideoReader):
    """Clips without a store and without decoding: zeros, after a pause for each pack."""

    pause_s: float = 0.0

    def read(self, clips: Sequence[ClipPlan]) -> Iterator[ClipRead]:
        """Zeros."""
        time.sleep(self.pause_s)
        for clip in clips:
            zeros = np.zeros((clip.tokens, self.token_size), np.float32)
            yield ClipRead(zeros, self.empty_text(clip), "", ReadStats(1))


def idle_reader(token_size: int, pause_s: float = 0.0) -> IdleReader:
    """A reader of nothing."""
    text = CaptionEncoder(Encoders(IdentityConfig(), TEXT))
    return IdleReader(Store("/"), token_size, frozenset(), no_tokens, text, pause_s)


def no_tokens(frames: np.ndarray) -> np.ndarray:
    """An idle reader has no frames."""
    raise AssertionError


@dataclass(frozen=True)
class Setting:
    """How the streams of a run are opened."""

    segment_steps: int
    pause_s: float


SETTINGS = (Setting(1, 0.0), Setting(4, 0.0), Setting(4, 1.0))  # up to 4: those do not grow


class Stream:
    """A rank without a model: an actor that takes its packs as fast as they come."""

    def __init__(self) -> None:
        self.steps = 0
        self._stop = False

    def take(
        self, plan: Plan, reader: ClipReader, config: StreamConfig, rank: int, ranks: int
    ) -> None:
        """All steps of the plan's first epoch, until `stop`."""
        self.steps, self._stop = 0, False
        with open_stream(plan, reader, config, 0, plan.num_steps(0), rank, ranks) as steps:
            for _ in steps:
                self.steps += 1
                if self._stop:
                    return
        raise ValueError("the plan ended before the run; more clips are needed")

    def done(self) -> int:
        """Steps taken in this run."""
        return self.steps

    def stop(self) -> None:
        """End `take` at the next step."""
        self._stop = True

    def memory_mb(self) -> float:
        """What this process alone holds."""
        return psutil.Process().memory_full_info().uss / 1e6


def tiny_plan(folder: str, ranks: int) -> Plan:
    """One clip of a few tokens in each pack, one pack for each rank in a step."""
    recipe = replace(
        RECIPE,
        views=ViewConfig(frames=(1,), sizes=((64, 64),), max_upscale=10),
        geometry=Geometry(1, 16, False, (1, 1, 1)),
        cost=CostModel(linear=1),
        max_tokens=16,
        max_text_tokens=48,
        max_clips=1,
        global_batch_packs=ranks,
    )
    store = Store(folder).child(str(ranks))
    return make_epoch(mixture(400 * 32), recipe, store, 0, TEXT.num_tokens, "bytes")


def cpu_by_group() -> Counter[str]:
    """CPU seconds of this process's descendants, by what they are; "worker" is all the rest."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
            times = process.cpu_times()
        except psutil.Error:
            continue
        name = title if title.startswith("ray::") else title.rpartition("/")[2]
        group = next((g for g, start in GROUPS.items() if name.startswith(start)), "worker")
        found[group] += times.user + times.system
    return found


@dataclass(frozen=True)
class Run:
    """What one run of some streams cost."""

    units: tuple[float, ...]  # seconds, executor seconds, segments, tasks
    num_idle: int  # streams that took no step
    cpu_s: Counter[str]  # by group


def run_streams(actors: list[Any], plan: Plan, setting: Setting, window_s: float) -> Run:
    """All actors at once for a while."""
    import ray

    reader = idle_reader(1, setting.pause_s)
    config = StreamConfig(max_tasks=1, segment_steps=setting.segment_steps, object_store_mb=64)

    def done() -> np.ndarray:
        return np.array(ray.get([actor.done.remote() for actor in actors]))

    taking = [
        actor.take.remote(plan, reader, config, rank, len(actors))
        for rank, actor in enumerate(actors)
    ]
    give_up = time.monotonic() + WAIT_S
    while done().min() < setting.segment_steps and time.monotonic() < give_up:
        time.sleep(0.5)
    before, cpu_before, began = done(), cpu_by_group(), time.perf_counter()
    time.sleep(window_s)
    steps, cpu, seconds = done() - before, cpu_by_group(), time.perf_counter() - began
    ray.get([actor.stop.remote() for actor in actors])
    ray.wait(taking, num_returns=len(taking), timeout=WAIT_S)
    time.sleep(1 + (setting.segment_steps + 1) * setting.pause_s)  # for what is in the making
    cpu.subtract(cpu_before)
    total = float(steps.sum())
    units = (seconds, seconds * len(actors), total / setting.segment_steps, total)
    return Run(units, int((steps == 0).sum()), cpu)


def fit(runs: Sequence[Run], group: str) -> np.ndarray:
    """CPU seconds of a group for each unit, (4,): least squares, none below zero."""
    units = np.array([run.units for run in runs])
    spent = np.array([run.cpu_s[group] for run in runs])
    kept = list(range(units.shape[1]))
    while True:
        found = np.linalg.lstsq(units[:, kept], spent, rcond=None)[0]
        if found.min() >= 0:
            rates = np.zeros(units.shape[1])
            rates[kept] = found
            return rates
        del kept[int(found.argmin())]


def coordinator_s(executors: int, nodes: int) -> float:
    """Seconds that Ray Data's coordinator takes when an executor comes or goes."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    resources = {"CPU": CPUS_PER_NODE, "memory": 1 << 40, "object_store_memory": 1 << 38}
    table = [{"Alive": True, "NodeID": f"{i:056x}", "Resources": resources} for i in range(nodes)]
    actor = module._AutoscalingCoordinatorActor(
        send_resources_request=lambda *_, **__: None, get_cluster_nodes=lambda: table
    )
    wanted = {"resources": [], "expire_after_s": 600.0, "request_remaining": list(resources)}
    settle = actor._refresh_resource_reservations
    actor._refresh_resource_reservations = lambda: None
    for i in range(executors - 1):
        actor.request_resources(f"data-{i}", **wanted)
    actor._refresh_resource_reservations = settle
    began = time.perf_counter()
    actor.request_resources("data-last", **wanted)
    return time.perf_counter() - began


def decode_s_per_pixel() -> float:
    """CPU seconds to decode a pixel of a file at nearly its own size, resizing included."""
    data = encode(render(0), FPS)
    times = []
    for _ in range(3):
        began = time.process_time()
        decode(data, range(NUM_FRAMES), HEIGHT // 16 * 16, WIDTH // 16 * 16)
        times.append(time.process_time() - began)
    return min(times) / (NUM_FRAMES * HEIGHT * WIDTH)


# The model


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    decode_s_per_pixel: float
    coordinator_s: float  # for each executor and node, when one executor comes or goes
    cpu_s: dict[str, np.ndarray]  # by group: of a second, executor second, segment and task
    executor_mb: float
    worker_mb: float


@dataclass(frozen=True)
class Pack:
    """The mean pack of the mixture."""

    clips: float
    pixels: float  # of the files, up to the last frame that is seen
    size_bytes: float  # of its tokens


def mean_pack(count: int = 50_000) -> Pack:
    """Of the mixture of benchmarks/packing.py."""
    table = mixture(count).table
    names = ("clip_id", "num_frames", "fps", "height", "width")
    columns = {name: table[name].to_numpy() for name in names}
    views = choose_views(columns, RECIPE.views, RECIPE.geometry, RECIPE.max_tokens, 0, 0)
    used = views.refused == ""
    clips = RECIPE.max_tokens * FILL / views.tokens[used].mean()
    frames = views.first_frame + views.stride * views.num_frames
    pixels = (frames * columns["height"] * columns["width"])[used].mean()
    return Pack(clips, clips * pixels, RECIPE.max_tokens * VALUES_PER_TOKEN * 4)


def demand(rates: Rates, pack: Pack, step_time: float, ranks: int) -> dict[str, float]:
    """What so many ranks ask for, one pack each a step."""
    config = StreamConfig()
    decode_s = pack.pixels * rates.decode_s_per_pixel
    at_once = ranks * min(1.0, decode_s / (config.max_tasks * step_time))
    nodes = -(-ranks // RANKS_PER_NODE)
    packs_per_s = ranks / step_time
    reader = idle_reader(VALUES_PER_TOKEN)
    segments_per_s = packs_per_s / segment_steps(RECIPE, reader, config, 1)
    units = np.array([1.0, at_once, segments_per_s, packs_per_s])
    by_group = {group: float(cost @ units) for group, cost in rates.cpu_s.items()}
    change_s = rates.coordinator_s * at_once * nodes
    return {
        "decode cores": packs_per_s * decode_s,
        "decode tasks a rank": decode_s / step_time,
        "executors at once": at_once,
        "requests/s": packs_per_s * pack.clips * REQUESTS_PER_CLIP,
        "MB/s from the store": packs_per_s * pack.pixels * BYTES_PER_PIXEL / 1e6,
        "object store GB": ranks * config.object_store_mb / 1024,
        "process memory GB": ranks * (rates.executor_mb + config.max_tasks * rates.worker_mb) / 1e3,
        "tasks/s": packs_per_s,
        "segments/s": segments_per_s,
        "executor cores": by_group["executor"],
        "raylet cores": by_group["raylet"],
        "gcs cores": by_group["gcs"],
        "stats actor cores": by_group["stats actor"],
        "coordinator cores": by_group["coordinator"] + 2 * segments_per_s * change_s,
        "CPUs an executor gets of a node": CPUS_PER_NODE // max(1, round(at_once)),
    }


def loads(rates: Rates, pack: Pack, step_time: float, ranks: int) -> dict[str, float]:
    """How much of what there is to have each limit takes: above 1 it breaks."""
    asked = demand(rates, pack, step_time, ranks)
    return {
        "requests to one prefix of S3": asked["requests/s"] / PREFIX_REQUESTS_PER_S,
        "decode tasks of a rank (max_tasks)": asked["decode tasks a rank"] / StreamConfig.max_tasks,
        "Ray's running tasks": ranks * StreamConfig.max_tasks / RUNNING_TASKS,
        "gcs_server, one core": asked["gcs cores"],
        "_StatsActor, one core": asked["stats actor cores"],
        "coordinator of resources, one core": asked["coordinator cores"],
        "an executor's share of a node, 1 CPU": asked["executors at once"] / CPUS_PER_NODE,
    }


def breaking_points(rates: Rates, pack: Pack, step_time: float) -> dict[str, int]:
    """The number of ranks from which on each limit is exceeded, nearest first."""
    found: dict[str, int] = {}
    for ranks in (round(8 * 1.05**i) for i in range(200)):
        for name, load in loads(rates, pack, step_time, ranks).items():
            if load > 1:
                found.setdefault(name, ranks)
    return found


def measure(streams: Sequence[int], window_s: float) -> Rates:
    """Print what is measured, as it comes."""
    pixel_s = decode_s_per_pixel()
    print(f"decoding {1e-6 / pixel_s:.1f} million pixels a CPU second")
    changes = {(e, n): coordinator_s(e, n) for e, n in ((64, 8), (512, 64), (2048, 256))}
    for (executors, nodes), seconds in changes.items():
        print(f"coordinator, {executors} executors, {nodes} nodes: {1e3 * seconds:.1f} ms a change")
    (executors, nodes), seconds = max(changes.items())

    connect(ClusterConfig(num_cpus=16, object_store_mb=1024))
    import ray

    actors = [
        ray.remote(num_cpus=0, max_concurrency=3)(Stream).remote() for _ in range(max(streams))
    ]
    ray.get([actor.done.remote() for actor in actors])
    print(f"{'streams':>7}{'steps/segment':>15}{'pause s':>9}{'steps/s':>9}", end="")
    print(f"{'idle':>6}   CPU ms a second of")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for count in streams:
            plan = tiny_plan(folder, count)
            for setting in SETTINGS:
                run = run_streams(actors[:count], plan, setting, window_s)
                runs.append(run)
                shares = ", ".join(
                    f"{group} {1e3 * spent / run.units[0]:.0f}"
                    for group, spent in sorted(run.cpu_s.items())
                )
                print(
                    f"{count:>7}{setting.segment_steps:>15}{setting.pause_s:>9.1f}"
                    f"{run.units[3] / run.units[0]:>9.1f}{run.num_idle:>6}   {shares}",
                    flush=True,
                )
    memory = ray.get([actor.memory_mb.remote() for actor in actors[: streams[0]]])
    worker = ray.get(ray.remote(worker_memory_mb).remote())
    rates = {group: fit(runs, group) for group in (*GROUPS, "worker")}
    print(f"\n{'CPU ms of':14}" + "".join(f"{name:>14}" for name in ("second", *UNIT_NAMES)))
    for group, cost in rates.items():
        print(f"{group:14}" + "".join(f"{1e3 * value:>14.2f}" for value in cost))
    print(f"an executor's process {np.mean(memory):.0f} MB of its own, a decoding one {worker:.0f}")
    per_pair = seconds / (executors * nodes)
    return Rates(pixel_s, per_pair, rates, float(np.mean(memory)), worker)


def worker_memory_mb() -> float:
    """What a decoding process alone holds."""
    return psutil.Process().memory_full_info().uss / 1e6


def main(step_time: float, streams: Sequence[int], window_s: float) -> None:
    """Measure, then print the table, what breaks, and one JSON line."""
    rates, pack = measure(streams, window_s), mean_pack()
    print(f"\nsteps of {step_time:g} s, a pack a rank: {pack.clips:.2f} clips, ", end="")
    print(f"{pack.pixels / 1e6:.0f} million pixels, {pack.size_bytes / 1e6:.1f} MB of tokens")
    tables = [demand(rates, pack, step_time, ranks) for ranks in RANKS]
    print(f"{'ranks':34}" + "".join(f"{ranks:>12,}" for ranks in RANKS))
    for name in tables[0]:
        print(f"{name:34}" + "".join(f"{table[name]:>12,.2f}" for table in tables))
    points = breaking_points(rates, pack, step_time)
    print("\nbreaks at about")
    for name, ranks in points.items():
        print(f"{ranks:>8,} ranks: {name}")
    first, at = next(iter(points.items()))
    largest = {name.replace(" ", "_"): round(value, 2) for name, value in tables[-1].items()}
    print(json.dumps({"breaks_first": first, "at_ranks": at, f"at_{RANKS[-1]}_ranks": largest}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-time", type=float, default=5.0)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--window", type=float, default=15.0)
    given = parser.parse_args()
    main(given.step_time, given.streams, given.window)
